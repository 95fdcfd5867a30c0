"""Stratified splits."""

import numpy as np
import pytest

from scbert.data.splits import stratified_split

CLASSES = np.repeat([0, 1, 2], [100, 20, 3])


def test_every_class_has_its_share_in_every_split():
    splits = stratified_split(CLASSES, 0.2, 0.1, seed=0)
    for name, expected in {"test": [20, 4, 1], "validation": [10, 2, 1], "train": [70, 14, 1]}.items():
        assert np.bincount(CLASSES[splits == name], minlength=3).tolist() == expected


def test_seed_decides():
    first = stratified_split(CLASSES, 0.2, 0.1, seed=0)
    assert (first == stratified_split(CLASSES, 0.2, 0.1, seed=0)).all()
    assert (first != stratified_split(CLASSES, 0.2, 0.1, seed=1)).any()


def test_a_fraction_of_zero_takes_nothing():
    splits = stratified_split(CLASSES, 0.0, 0.1)
    assert set(splits) == {"train", "validation"}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_training_comes_first(n):
    splits = stratified_split(np.zeros(n, dtype=int), 0.3, 0.3).tolist()
    assert sorted(splits) == sorted(["train", "test", "validation"][:n])
