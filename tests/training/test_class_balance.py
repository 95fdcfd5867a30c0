"""Weights for rare classes."""

import numpy as np
import torch

from scbert.training.finetune_trainer import class_weights, weighted_loss

TARGETS = np.array([0] * 90 + [1] * 8 + [2] * 2)


def test_weights_have_mean_one_over_cells_and_balance_the_classes():
    weights = class_weights(TARGETS, 3).numpy()
    np.testing.assert_allclose(weights[TARGETS].mean(), 1, rtol=1e-6)
    totals = np.bincount(TARGETS, weights=weights[TARGETS])
    np.testing.assert_allclose(totals, totals[0], rtol=1e-6)


def test_loss_of_parts_adds_up_to_the_loss_of_the_whole():
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 3), torch.randint(0, 3, (12,))
    loss = weighted_loss(torch.tensor([0.2, 1.0, 5.0]))
    whole = loss({"logits": logits}, labels, num_items_in_batch=12)
    parts = sum(loss({"logits": logits[i : i + 3]}, labels[i : i + 3], 12) for i in range(0, 12, 3))
    torch.testing.assert_close(parts, whole)
