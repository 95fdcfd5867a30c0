"""Label columns as they stand in files."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.data.labels import choose_classes, copy_notes, find_labels
from scbert.tokenization import InputError


def labels_of(values):
    return find_labels(pd.DataFrame({"type": values}), "type").tolist()


def test_names_stay_as_they_are():
    names = ["CD8+/CD45RA+ T", "单核细胞", "β cell", "a" * 300]
    assert labels_of(pd.Categorical(names)) == names


@pytest.mark.parametrize("missing", [None, np.nan, "", "nan", "unassigned", "Unassigned", " unassigned "])
def test_no_label(missing):
    assert labels_of(["B", missing, "T"]) == ["B", None, "T"]


def test_numbers_become_names():
    assert labels_of([0, 1, 1]) == ["0", "1", "1"]
    assert labels_of([0.0, np.nan, 1.0]) == ["0", None, "1"]
    assert labels_of([True, False]) == ["True", "False"]


def test_measurements_are_refused():
    with pytest.raises(InputError, match="measurements"):
        labels_of(np.linspace(0.1, 0.9, 50))


def test_missing_column_shows_the_others():
    for key in ("cell_type", ["cell_type"]):
        with pytest.raises(InputError, match=r"no column .*'cell_type'.* it has: type"):
            find_labels(pd.DataFrame({"type": ["B"]}), key)


def test_small_classes_are_learnt_and_reported():
    classes, report = choose_classes(["B"] * 3 + ["T"] * 4 + ["Mast"] * 2 + [None], "type")
    assert classes == ["B", "Mast", "T"]
    assert report == {"unlabelled": 1, "small_classes": {"Mast": 2}}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["B"] * 9, "only 'B'"),
        ([None] * 4, "4 of 4 cells have no label"),
    ],
)
def test_fewer_than_two_classes(labels, message):
    with pytest.raises(InputError, match=message):
        choose_classes(labels, "type")


def test_cells_whose_few_genes_are_all_in_the_highest_bin_are_no_copies():
    markers = sp.csr_matrix(np.full((9, 30), 5, dtype=np.int8))
    assert copy_notes([markers]) == []
    # unless there are others, such as peaks, which are 0 or 1
    peaks = sp.csr_matrix((markers.data, markers.indices, markers.indptr), shape=(9, 60))
    assert copy_notes([peaks])[0].startswith("8 of 9 cells are copies")
