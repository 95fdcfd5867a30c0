"""What the scripts that make the shipped annotators, and measure back-off, do with cells."""

import anndata
import numpy as np
import pandas as pd
import pytest

import backoff
import blood_cells
import tissue_cells
from annotator_parts import named_cells, named_genes
from blood_cells import kind_of, read_by_markers, read_cohort, types_of_clusters
from make_tissue import COSTS, TESTED
from studies_left_out import REGRESSIONS, scores
from tissue_cells import LEARNT, TABLES, capped, joined, panel_of, types_by_markers


def study(genes, labels, seed=0):
    counts = np.random.default_rng(seed).poisson(2.0, (len(labels), len(genes))).astype(np.float32)
    obs = pd.DataFrame({"label": labels, "dataset": f"study {seed}"})
    obs.index = [f"{seed}:{number}" for number in range(len(labels))]
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def test_genes_of_clones_and_loci_have_no_name():
    clones = ["AC012345.1", "RP11-34P13.7", "CTD-2571L23.6", "LINC00115", "LOC100288069", "ENSG00000237613"]
    named = ["CD3D", "HLA-A", "MT-CO1", "NKX2-5", "HOXA10-AS", "C1orf56"]
    assert named_genes(clones + named) == named


def test_cells_get_common_names_and_others_are_left_out():
    cells = study(["A", "B"], ["x"] * 4)
    given, names = np.array(["T1", None, "B", "odd"], dtype=object), pd.Series({"T1": "T", "B": "B cell"})
    named = named_cells(cells, given, names, "s")
    assert named.obs["label"].tolist() == ["T", "B cell"] and set(named.obs["dataset"]) == {"s"}
    assert np.array_equal(named.X.toarray(), cells.X[[0, 2]])


def test_a_gene_is_in_the_panel_if_enough_studies_express_it():
    studies = [study(["A", "B", "LINC01"], ["t"] * 9), study(["B", "LINC01", "C"], ["t"] * 9, 1)]
    studies[1].X[:, 2] = 0
    assert panel_of(studies, min_cells=3, min_studies=2) == ["B"]
    assert panel_of(studies, min_cells=3, min_studies=1) == ["A", "B"]
    assert panel_of(studies, min_cells=10, min_studies=1) == []


def test_studies_are_joined_over_one_panel_with_few_cells_of_each_type(monkeypatch):
    monkeypatch.setattr(tissue_cells, "PANEL_RULE", {"min_cells": 1, "min_studies": 1})
    studies = [study(["A", "B"], ["t"] * 8 + ["u"] * 2), study(["C", "B"], ["t"] * 5, 1)]
    cells = joined(studies, most_cells=3)
    assert list(cells.var_names) == ["A", "B", "C"]
    assert cells.obs.value_counts().to_dict() == {
        ("t", "study 0"): 3,
        ("u", "study 0"): 2,
        ("t", "study 1"): 3,
    }
    second = cells[cells.obs["dataset"] == "study 1"]
    origin = studies[1][second.obs_names]
    assert np.array_equal(second.X.toarray(), np.column_stack([np.zeros(3), origin.X[:, 1], origin.X[:, 0]]))
    assert capped(np.array(["a"] * 10)).tolist() == capped(np.array(["a"] * 10)).tolist()


def cells_of_kinds(markers, kinds):
    """60 cells of each kind: high in its markers, if it has some, and in genes of its own."""
    genes = sorted({gene for names in markers for gene in names}) + [f"GENE{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(len(kinds)), 60)
    rates = np.tile(rng.lognormal(0.5, 0.7, len(genes)), (len(truth), 1))
    rates[:, : len(genes) - 200] = 0.02
    for number, names in enumerate(kinds):
        own = np.arange(len(genes) - 200 + 30 * number, len(genes) - 170 + 30 * number)
        rates[np.ix_(truth == number, own)] *= 6
        rates[np.ix_(truth == number, np.flatnonzero(np.isin(genes, names)))] = 5
    return anndata.AnnData(rng.poisson(rates).astype(np.float32), var=pd.DataFrame(index=genes)), truth


def test_clusters_are_named_by_their_markers():
    markers = pd.read_csv(TABLES / "markers.csv").set_index("type")["genes"].str.split()
    wanted = ["T cell", "fibroblast", None]
    cells, truth = cells_of_kinds(markers, [[] if name is None else markers[name] for name in wanted])
    assert types_by_markers(cells).tolist() == [wanted[number] for number in truth]


def test_clusters_of_blood_are_named_by_their_markers_and_those_of_their_kind():
    table = pd.read_csv(blood_cells.TABLES / "markers.csv").set_index("type")
    markers = table["genes"].str.split()
    kinds = {
        "CD4 T cell": markers["T cell"],
        "CD8 T cell": markers["T cell"] + markers["CD8 T cell"],
        "B cell": markers["B cell"],
        "CD14+ monocyte": ["LYZ", "FCN1", "CST3", *markers["CD14+ monocyte"]],
        "FCGR3A+ monocyte": ["LST1", "AIF1", "CST3", *markers["FCGR3A+ monocyte"]],
        None: [],
    }
    cells, truth = cells_of_kinds(markers, list(kinds.values()))
    assert types_of_clusters(cells).tolist() == [list(kinds)[number] for number in truth]
    between = pd.Series({"CD8 T cell": 0.4, "CD14+ monocyte": 1.0, "FCGR3A+ monocyte": 1.1})
    assert kind_of("T cell", between) is None and kind_of("monocyte", between) is None
    assert set(table["of"].dropna()) <= set(table.index)


def test_a_study_without_labels_is_named_batch_by_batch(tmp_path, monkeypatch):
    """A batch of few cells is left out, and so is what the annotator does not learn."""
    cells = study(["A", "B"], ["t"] * 100)
    cells.obs["batch"] = ["one"] * 60 + ["two"] * 30 + ["three"] * 10
    cells.write_h5ad(tmp_path / "new.h5ad")
    monkeypatch.setitem(blood_cells.BATCHES, "new", "batch")
    monkeypatch.setattr(blood_cells, "FEWEST_CELLS", 30)
    names = np.array(["B cell", "erythroid", None] * 20, dtype=object)
    monkeypatch.setattr(blood_cells, "types_of_clusters", lambda part: names[: part.n_obs])
    found = read_by_markers(tmp_path, "new")
    assert found.obs["label"].tolist() == ["B cell"] * 30 and set(found.obs["dataset"]) == {"new"}
    assert [name.split(":")[0] for name in found.obs_names] == ["new"] * 30


def test_a_cohort_gets_common_names(tmp_path):
    cells = study(["A", "B"], ["t"] * 4)
    cells.obs["cell_type"] = ["CD14+ Mono", "DC", "Platelet", "what else"]
    cells.write_h5ad(tmp_path / "cohort.h5ad")
    found = read_cohort(tmp_path, "cohort").obs["label"].tolist()
    assert found == ["CD14+ monocyte", "dendritic cell", "platelet"]


def test_the_tables_of_tissue_agree():
    labels, terms = pd.read_csv(TABLES / "labels.csv"), pd.read_csv(TABLES / "terms.csv")
    assert set(labels["to"]) == set(terms["label"]) and terms["label"].is_unique
    assert set(labels["file"]) == set(LEARNT) | set(TESTED)
    assert not labels.duplicated(["file", "from"]).any()
    assert (labels.groupby("file")["column"].nunique() == 1).all()


def test_a_study_is_asked_for_the_types_that_the_others_have(adata):
    adata.obs["label"] = adata.obs["cell_type"].astype(str)
    reference, other = adata[:90].copy(), adata[90:].copy()
    reference = reference[(reference.obs["label"] != "monocyte").to_numpy()].copy()
    strange = other[(other.obs["label"] == "monocyte").to_numpy()].copy()
    [row] = scores(reference, {"other": other, "strange": strange}, costs=COSTS, cell_axes="")
    assert row["study"] == "other" and row["types"] == ["B cell", "T cell"] and row["genes"] == 1
    assert row["cells"] == 30 - strange.n_obs
    for model in ("scbert", *REGRESSIONS):
        assert row[model]["accuracy"] == row[model]["macro_f1"] == 1


@pytest.mark.parametrize("right_below", [0.5, 0.2])
def test_back_off_is_measured_at_equal_precision(right_below):
    """Two types of one parent that cannot be told apart, and one that can."""
    rng = np.random.default_rng(0)
    true = np.array(["CD4", "CD8", "B"])[rng.integers(0, 3, 600)]
    probabilities = np.zeros((600, 3), dtype=np.float32)
    names = ["B", "CD4", "CD8"]
    probabilities[true == "B"] = [0.98, 0.01, 0.01]
    unsure = np.flatnonzero(true != "B")
    share = rng.uniform(0.3, 0.7, len(unsure))
    probabilities[unsure] = np.column_stack([np.full(len(unsure), 0.02), 0.98 * share, 0.98 * (1 - share)])
    # some look like what they are not
    wrong = unsure[rng.random(len(unsure)) < right_below / 20]
    true[wrong] = "B"
    found = backoff.measured(probabilities, true, names, {"CD4": "T", "CD8": "T"})
    asked = probabilities.max(axis=1) < found["threshold"]
    # all types below T look alike: every one of the cells asked for is T by back-off, most of them rightly
    assert found["unassigned"] == found["wider"] == asked.sum() > 250
    assert found["right"] == (asked & (true != "B")).sum() >= 0.95 * found["wider"]
    assigned = (np.array(names)[probabilities.argmax(axis=1)] == true)[~asked]
    assert assigned.mean() >= 0.95
