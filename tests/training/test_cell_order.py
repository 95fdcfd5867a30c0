"""Orders of cells: by chance, by length, by class; decided by seed and epoch alone."""

import numpy as np

from scbert.training.cell_order import EpochSampler, LengthGroupedSampler, OversamplingSampler

TARGETS = np.array([0] * 90 + [1] * 8 + [2] * 2)
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


def test_every_class_is_drawn_equally_often():
    drawn = np.array([TARGETS[i] for epoch in range(30) for i in draw_of(epoch)])
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), 1 / 3, atol=0.05)


def draw_of(epoch, seed=0):
    sampler = OversamplingSampler(TARGETS, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_draw_of_classes_depends_on_seed_and_epoch_alone():
    assert len(draw_of(3)) == len(TARGETS)
    assert draw_of(3) == draw_of(3)
    assert draw_of(3) != draw_of(4)
    assert draw_of(3) != draw_of(3, seed=1)


def test_every_cell_once_an_epoch_in_a_new_order():
    sampler = EpochSampler(10, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == list(range(10)) and sorted(second) == list(range(10, 20))
    assert [draw - 10 for draw in second] != first
    assert list(EpochSampler(10, seed=1)) != first
