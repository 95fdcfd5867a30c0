import math

import numpy as np
import pytest
import torch

from scbert.evaluation.per_gene_mode import PerGeneModeBaseline
from scbert.training.masked_metrics import MaskedScores


@pytest.mark.parametrize("gene_ids", [None, torch.tensor([[2, 0, 1, 3]])])
def test_scores_of_a_small_batch(gene_ids):
    baseline = PerGeneModeBaseline(np.array([[0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 9, 0]]))
    scores = MaskedScores(baseline, vocab_size=4)
    # asked for at 0, 1 (hidden) and 2 (in sight); mask id 3
    batch = {"input_ids": torch.tensor([[3, 3, 2, 0]]), "labels": torch.tensor([[1, 2, 2, -100]])}
    if gene_ids is not None:
        batch["gene_ids"] = gene_ids
    logits = torch.log(torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.1, 0.5, 0.3, 0.1], [0.1, 0.1, 0.7, 0.1]]))
    scores.add(logits, batch, mask_token_id=3)
    found = scores.metrics()
    assert found["loss"] == pytest.approx(-(2 * math.log(0.7) + math.log(0.3)) / 3)
    assert found["masked_tokens"] == 2
    assert found["masked_accuracy"] == 0.5 and found["masked_accuracy_bin_2"] == 0.0
    # by its place gene 0 is commonly 1 and gene 1 commonly 2; by the given ids it is the other way round
    assert found["baseline_masked_accuracy"] == (1.0 if gene_ids is None else 0.0)
    assert found["masked_accuracy_bin_mean"] == 0.5
    # the one gene in sight has bin 2
    assert found["cell_baseline_masked_accuracy"] == 0.5
