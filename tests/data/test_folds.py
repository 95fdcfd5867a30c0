import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scbert.data.folds import group_folds, group_split, read_split, stratified_folds, write_split
from scbert.tokenization import InputError


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


def test_seeds_differ():
    classes = np.zeros(50)
    assert (stratified_folds(classes, 5, 0) != stratified_folds(classes, 5, 1)).any()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=30, max_size=80), n=st.integers(2, 4), seed=st.integers(0, 9)
)
def test_groups_are_never_torn(groups, n, seed):
    groups = np.array([*groups, *range(10)])
    classes = np.arange(len(groups)) % 3
    folds = group_folds(groups, classes, n, seed)
    assert set(folds) == set(range(n))
    for group in set(groups):
        assert len(set(folds[groups == group])) == 1


def test_group_split_is_near_the_shares():
    rng = np.random.default_rng(0)
    groups, classes = rng.integers(0, 40, 2_000), rng.integers(0, 4, 2_000)
    split = group_split(groups, classes, 0.2, 0.1)
    shares = {name: np.mean(split == name) for name in ("train", "validation", "test")}
    assert abs(shares["test"] - 0.2) < 0.04 and abs(shares["validation"] - 0.1) < 0.04
    assert set(group_split(groups, classes, 0.2, 0.0)) == {"train", "test"}


def test_impossible_folds():
    with pytest.raises(InputError, match="two folds"):
        stratified_folds(np.zeros(10), 1)
    with pytest.raises(InputError, match="3 cells"):
        stratified_folds(np.zeros(3), 5)
    with pytest.raises(InputError, match="2 groups"):
        group_folds(np.array(["a", "b", "b"]), np.zeros(3), 3)
    with pytest.raises(InputError, match="shares"):
        group_split(np.arange(9), np.zeros(9), 0.7, 0.3)


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
