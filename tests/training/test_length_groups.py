"""Cells of like length together, every one once."""

import numpy as np

from scbert.training.length_groups import LengthGroupedSampler

LENGTHS = np.random.default_rng(0).integers(100, 3000, size=403)


def order_of(epoch, seed=0):
    sampler = LengthGroupedSampler(LENGTHS, 16, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def padded(order):
    batches = [LENGTHS[order[i : i + 16]] for i in range(0, len(order), 16)]
    return sum(batch.max() * len(batch) for batch in batches)


def test_every_cell_once_and_less_padding():
    order = order_of(0)
    assert sorted(order) == list(range(403))
    assert padded(order) < 1.2 * LENGTHS.sum() < padded(list(range(403)))


def test_the_order_depends_on_seed_and_epoch_alone():
    assert order_of(1) == order_of(1)
    assert order_of(1) != order_of(2)
    assert order_of(1) != order_of(1, seed=1)
