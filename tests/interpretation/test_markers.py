"""Top genes, marker overlap and differential expression, with hand-worked numbers."""

import gzip

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.stats import hypergeom

from scbert.interpretation.markers import (
    differential_expression_agreement,
    marker_overlap,
    read_marker_table,
    top_genes_table,
)
from scbert.tokenization import InputError

SCORES = pd.DataFrame(
    {"T cell": [4.0, 1.0, 2.0, 1.0], "B": [0.0, 3.0, 2.0, 1.0]}, index=["CD3D", "MS4A1", "ACTB", "GAPDH"]
)


def test_top_genes_and_their_z_scores_by_hand():
    table = top_genes_table(SCORES, n_top=2)
    assert table["gene"].tolist() == ["CD3D", "ACTB", "MS4A1", "ACTB"]
    assert table["rank"].tolist() == [1, 2, 1, 2]
    # T cell: mean 2, variance (4 + 1 + 0 + 1) / 4 = 1.5.
    assert table["z_score"].tolist()[:2] == pytest.approx([2 / 1.5**0.5, 0.0])
    # CD3D over types: 4 and 0; ACTB is the same in both.
    assert table["specificity"].tolist()[:2] == pytest.approx([1.0, 0.0])


def test_constant_scores_have_z_scores_of_zero():
    table = top_genes_table(pd.DataFrame({"a": [0.1] * 3, "b": [0.1] * 3}, index=list("xyz")), 5)
    assert table["gene"].tolist() == list("xyzxyz")
    assert not table[["z_score", "specificity"]].to_numpy().any()


def test_marker_tables_of_every_known_format(tmp_path):
    panglao = tmp_path / "panglao.tsv.gz"
    rows = [
        "species\tofficial gene symbol\tcell type",
        "Mm Hs\tCD3D\tT cells",
        "Mm\tCd3e\tT cells",
        "Hs\tMS4A1\tB cells",
    ]
    panglao.write_bytes(gzip.compress("\n".join(rows).encode()))
    assert read_marker_table(panglao) == {"B cells": ["MS4A1"], "T cells": ["CD3D"]}
    cellmarker = tmp_path / "cellmarker.csv"
    cellmarker.write_text('Tissue,CT,Gene\nBlood,T cell,"CD3E, CD3D"\nLung,T cell,CD2\n')
    assert read_marker_table(cellmarker) == {"T cell": ["CD2", "CD3D", "CD3E"]}
    second = tmp_path / "cellmarker2.csv"
    second.write_text("species,cell_name,Symbol\nHuman,T cell,CD3D\nMouse,T cell,Cd3e\n")
    assert read_marker_table(second) == {"T cell": ["CD3D"]}
    second.write_text("species,cell_name,Symbol\nMouse,T cell,Cd3e\n")
    with pytest.raises(InputError, match="no marker of a human"):
        read_marker_table(second)
    second.write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match="no table of text"):
        read_marker_table(second)
    other = tmp_path / "other.tsv"
    other.write_text("name\tsymbol\nT\tCD3D\n")
    with pytest.raises(InputError, match="is no marker table"):
        read_marker_table(other)


def test_marker_overlap_by_hand():
    background = ["CD3D", "CD3E", "MS4A1", "CD79A", "ACTB", "GAPDH"]
    top = {"T cell": ["CD3D", "ACTB", "NOT_IN_PANEL"], "B": ["MS4A1"], "Platelet": ["ACTB"]}
    markers = {"T cells": ["CD3D", "CD3E", "CD2"], "B cells": ["MS4A1", "CD79A"]}
    table = marker_overlap(top, markers, background).set_index("cell_type")
    row = table.loc["T cell"]
    assert (row["known_as"], row["n_top"], row["n_markers"], row["n_overlap"], row["genes"]) == (
        "T cells",
        2,
        2,
        1,
        "CD3D",
    )
    assert row["expected"] == pytest.approx(2 * 2 / 6)
    # at least one of 2 draws without return among 2 of 6: 1 - (4 * 3) / (6 * 5).
    assert row["p_value"] == pytest.approx(1 - 12 / 30)
    assert table.loc["B", "p_value"] == pytest.approx(hypergeom.sf(0, 6, 2, 1))
    assert table.loc["Platelet", "known_as"] == "" and np.isnan(table.loc["Platelet", "n_overlap"])
    # two types are tested, at 0.6 and 1/3: twice the smaller is more than the larger, which both then have
    assert table["adjusted_p_value"].tolist()[:2] == pytest.approx([0.6, 0.6])
    assert np.isnan(table.loc["Platelet", "adjusted_p_value"])


def test_markers_are_found_however_they_are_cased():
    top = {"B cell": ["C1orf54", "ACTB"]}
    row = marker_overlap(top, {"B cells": ["C1ORF54", "MS4A1"]}, ["C1orf54", "MS4A1", "ACTB"]).iloc[0]
    assert (row["n_markers"], row["n_overlap"], row["genes"]) == (2, 1, "C1orf54")


def test_marker_names_may_be_given_and_must_exist():
    markers = {"T memory cells": ["CD3D"], "T helper cells": ["CD4"]}
    names = {"CD4 T": ["T memory cells", "T helper cells"]}
    row = marker_overlap({"CD4 T": ["CD3D", "CD4"]}, markers, ["CD3D", "CD4", "ACTB"], names).iloc[0]
    assert (row["n_overlap"], row["known_as"]) == (2, "T memory cells;T helper cells")
    with pytest.raises(InputError, match="no cell type 'Tx'"):
        marker_overlap({"CD4 T": []}, markers, [], {"CD4 T": "Tx"})


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    rates = np.ones((60, 20))
    rates[:30, :4] = 20.0
    rates[30:, 4:8] = 20.0
    genes = [f"G{i}" for i in range(20)]
    obs = pd.DataFrame({"type": ["a"] * 30 + ["b"] * 30}, index=[f"c{i}" for i in range(60)])
    return anndata.AnnData(rng.poisson(rates).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))


def test_differential_expression_agreement_by_construction(cells):
    genes = [*cells.var_names[::-1], "ELSEWHERE"]
    right = pd.DataFrame({"a": 0.0, "b": 0.0}, index=genes)
    right.loc[["G0", "G1", "G2", "G3"], "a"] = 1.0
    right.loc[["G0", "G1", "G4", "G5"], "b"] = 1.0
    before = cells.X.copy()
    table = differential_expression_agreement(right, cells, "type", n_top=4).set_index("cell_type")
    assert table["overlap"].tolist() == [1.0, 0.5]
    assert table["n_genes"].tolist() == [20, 20] and table.loc["a", "expected"] == pytest.approx(4 / 20)
    assert table.loc["a", "genes"] == "G0;G1;G2;G3" and table.loc["a", "spearman"] > 0.5
    np.testing.assert_array_equal(cells.X, before)


def test_differential_expression_leaves_out_types_without_cells_and_constant_scores(cells):
    scores = pd.DataFrame({"a": 1.0, "nowhere": 1.0}, index=cells.var_names)
    table = differential_expression_agreement(scores, cells, "type", n_top=4)
    assert table["cell_type"].tolist() == ["a"] and np.isnan(table.loc[0, "spearman"])
    with pytest.raises(InputError, match="Nothing can be compared"):
        differential_expression_agreement(scores[["nowhere"]], cells, "type")
