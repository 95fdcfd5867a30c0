"""Stratified splits and folds, and files of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbert.data.splits import read_split, stratified_folds, stratified_split, write_split
from scbert.tokenization import InputError

CLASSES = np.repeat([0, 1, 2], [100, 20, 3])


def test_every_class_has_its_share_in_every_split():
    splits = stratified_split(CLASSES, 0.2, 0.1, seed=0)
    for name, expected in {"test": [20, 4, 1], "validation": [10, 2, 1], "train": [70, 14, 1]}.items():
        assert np.bincount(CLASSES[splits == name], minlength=3).tolist() == expected


def test_seed_decides_the_split():
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


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.sampled_from("abc"), min_size=5, max_size=60),
    n=st.integers(2, 5),
    seed=st.integers(0, 9),
)
def test_folds_spread_every_class(classes, n, seed):
    classes = np.array(classes)
    folds = stratified_folds(classes, n, seed)
    sizes = np.bincount(folds, minlength=n)
    assert sizes.max() - sizes.min() <= 1
    for name in set(classes):
        per_fold = np.bincount(folds[classes == name], minlength=n)
        assert per_fold.max() - per_fold.min() <= 1
    np.testing.assert_array_equal(folds, stratified_folds(classes, n, seed))


def test_seed_decides_the_folds():
    classes = np.zeros(50)
    assert (stratified_folds(classes, 5, 0) != stratified_folds(classes, 5, 1)).any()


def test_impossible_folds():
    with pytest.raises(InputError, match="two folds"):
        stratified_folds(np.zeros(10), 1)
    with pytest.raises(InputError, match="3 cells"):
        stratified_folds(np.zeros(3), 5)


def test_split_files(tmp_path):
    cells, path = ["c1", "c,2", "ç3"], tmp_path / "folds.csv"
    write_split(path, cells, np.array([0, 1, 1]))
    assert read_split(path, ["ç3", "c1"]).tolist() == ["1", "0"]
    with pytest.raises(InputError, match="--overwrite"):
        write_split(path, cells, [0, 1, 1])
    with pytest.raises(InputError, match=r"lacks 1 of the 2 cells \(first: c9\)"):
        read_split(path, ["c1", "c9"])
    with pytest.raises(InputError, match="share names"):
        write_split(tmp_path / "x.csv", ["a", "a"], [0, 1])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", "needs the columns"), ("cell,split\nx,1\nx,2\n", "more than once"), ("", "CSV")],
)
def test_bad_split_files(tmp_path, text, words):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_split(tmp_path / "s.csv", ["x"])
    with pytest.raises(InputError, match="no split file"):
        read_split(tmp_path / "none.csv", ["x"])
