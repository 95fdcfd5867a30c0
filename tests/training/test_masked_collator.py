import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils.data import DataLoader

from scbert import ScBertTokenizer
from scbert.training.cell_batches import CellDataset, DataCollatorForMaskedExpression, mask_expression
from scbert.training.cell_order import EpochSampler

GENES = 200


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    bins = rng.integers(1, 6, (40, GENES)) * (rng.random((40, GENES)) < rng.random((40, 1)))
    bins[0] = 0
    bins[1, 1:] = 0
    bins[1, 0] = 3
    return CellDataset(sp.csr_matrix(bins.astype(np.int8)))


@pytest.fixture(params=[True, False], ids=["every gene", "expressed genes"])
def tokenizer(request):
    return ScBertTokenizer(gene_panel=[f"G{i}" for i in range(GENES)], keep_zeros=request.param)


def test_counts_and_values(cells, tokenizer):
    batch = DataCollatorForMaskedExpression(tokenizer)(cells.__getitems__(range(40)))
    plain = torch.from_numpy(tokenizer.encode_bins(cells.bins)["input_ids"])
    chosen = batch["labels"] != -100
    for row, expressed in enumerate(np.diff(cells.bins.indptr)):
        # 0.15 as a fraction: the ceiling of the true number, not of its nearest float
        assert chosen[row].sum() == math.ceil(15 * int(expressed) / 100)
    assert torch.equal(batch["labels"][chosen], plain[chosen])
    assert (plain[chosen] > 0).all()
    changed = batch["input_ids"] != plain
    assert (batch["input_ids"][changed] == tokenizer.mask_token_id).all()
    assert not (changed & ~chosen).any()
    assert 0.8 < changed.sum() / chosen.sum() < 0.97
    if not tokenizer.keep_zeros:
        assert not chosen[batch["attention_mask"] == 0].any()


def test_masks_are_uniform_and_hide_nine_in_ten():
    ids = np.ones((20_000, 10), dtype=np.int64)
    masked, labels = mask_expression(ids, 6, np.random.default_rng(0).random((200_000, 2)), 0.3)
    assert ((labels == 1).sum(axis=1) == 3).all()
    np.testing.assert_allclose((labels == 1).mean(axis=0), 0.3, atol=0.015)
    assert (masked == 6).sum() / (labels == 1).sum() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("expressed", [1, 2, 6, 7, 20, 40, 60, 140, 180, 200])
def test_quota_is_the_true_ceiling(expressed):
    ids = np.ones((1, expressed), dtype=np.int64)
    _, labels = mask_expression(ids, 6, np.random.default_rng(0).random((expressed, 2)))
    assert (labels == 1).sum() == -(-15 * expressed // 100)


def test_the_input_is_not_written_to():
    ids = np.ones((1, 20), dtype=np.int64)
    mask_expression(ids, 6, np.zeros((20, 2)))
    assert (ids == 1).all()


def test_extreme_probabilities(cells, tokenizer):
    items = cells.__getitems__(range(2, 6))
    everything = DataCollatorForMaskedExpression(tokenizer, 1.0, 1.0)(items)
    assert set(everything["input_ids"].unique().tolist()) <= {0, tokenizer.mask_token_id}
    in_sight = DataCollatorForMaskedExpression(tokenizer, 0.15, 0.0)(items)
    assert (in_sight["input_ids"] != tokenizer.mask_token_id).all()


def test_a_visit_decides_its_mask(cells, tokenizer):
    """In any batch, any worker and any order."""
    visits = (7, 9, 47)
    collator = DataCollatorForMaskedExpression(tokenizer)
    alone = {index: collator(cells.__getitems__([index])) for index in visits}
    together = collator(cells.__getitems__(visits[::-1]))
    for row, index in enumerate(visits[::-1]):
        length = alone[index]["labels"].shape[1]
        assert torch.equal(together["labels"][row, :length], alone[index]["labels"][0])
    # 47 is cell 7, an epoch later
    assert not torch.equal(alone[7]["labels"], alone[47]["labels"])
    other = DataCollatorForMaskedExpression(tokenizer, seed=1)(cells.__getitems__([7]))
    assert not torch.equal(other["labels"], alone[7]["labels"])


def test_workers_give_the_same_batches(cells, tokenizer):
    def batches(workers):
        sampler = EpochSampler(len(cells), seed=2)
        sampler.set_epoch(3)
        collator = DataCollatorForMaskedExpression(tokenizer)
        loader = DataLoader(cells, 8, sampler=sampler, collate_fn=collator, num_workers=workers)
        return [batch["input_ids"] for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2)))
