"""Wider types, ontology terms and prediction sets: the pure functions, and all the way from a reference."""

import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
from transformers import pipeline

import scbert
from scbert import ScBertConfig
from scbert.commands.cli import main
from scbert.data import cell_ontology
from scbert.data.cell_ontology import CellOntology
from scbert.data.label_tree import ancestors_of
from scbert.inference import annotate, annotate_file
from scbert.inference.assignment import assign, back_off, ontology_terms, prediction_sets, shift_notes
from scbert.modeling_scbert.heads_scbert import ScBertNovelty
from scbert.modeling_scbert.pipeline_scbert import CellTypeAnnotationPipeline
from scbert.tokenization import InputError
from scbert.training import finetune_data

PARENTS = {"a": "ab", "b": "ab", "c": "cd", "d": "cd", "ab": "all", "cd": "all", "e": "c"}
NAMES = ["a", "b", "c", "d", "e", "alone"]


def slow_back_off(cell, threshold):
    """Type by type, as the docstring says it."""
    if cell.max() >= threshold and cell.max() > 0:
        return NAMES[cell.argmax()]
    best = (-1, 0.0, "unassigned")
    for node in dict.fromkeys([*NAMES, *PARENTS.values()]):
        held = [name == node or node in ancestors_of(name, PARENTS) for name in NAMES]
        total = float(cell[held].sum())
        if total >= threshold and total > 0:
            best = max(best, (len(ancestors_of(node, PARENTS)), total, node))
    return best[2]


@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.7, 0.95])
def test_back_off_is_what_its_words_say(threshold):
    cells = np.random.default_rng(0).dirichlet([0.3] * 7, 500)[:, :6].astype(np.float32)
    cells[0] = 0
    found = back_off(cells, NAMES, threshold, PARENTS)
    assert list(found) == [slow_back_off(cell, threshold) for cell in cells]
    # an assigned cell keeps its label, and no cell is worse off
    labels = assign(cells, NAMES, threshold)[0]
    assigned = np.asarray(labels) != "unassigned"
    assert (np.asarray(found)[assigned] == np.asarray(labels)[assigned]).all()
    assert found[0] == "unassigned" and len(set(found) - set(NAMES)) > 1


def test_terms_of_labels_that_share_one():
    labels = pd.Categorical(["x", "y", "unassigned", "z"])
    found = ontology_terms(labels, {"x": "CL:1", "y": "CL:1"})
    assert list(found) == ["CL:1", "CL:1", "unknown", "unknown"]


def test_sets_keep_the_order_of_labels():
    probabilities = np.array(
        [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.35, 0.35], [0, 0, 0]], dtype=np.float32
    )
    sets, sizes = prediction_sets(probabilities, ["z", "b", "a"], [0.55, 0.75, 0.75])
    assert sets.tolist() == ["z|b", "a", "b|a", ""]
    assert sizes.tolist() == [1, 1, 2, 0]


def test_labels_that_have_the_joining_sign():
    """Two sets may then read alike; they are counted by what is in them."""
    sets, sizes = prediction_sets(np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), ["b|a", "b", "a"], [0.5] * 3)
    assert sets.tolist() == ["b|a", "b|a"]
    assert sizes.tolist() == [0, 1, 1, 0]


@pytest.fixture
def small_ontology(monkeypatch):
    """The part of the Cell Ontology that the synthetic cells need."""
    above = {"CL:0000738": {"CL:0000000"}, "CL:0000542": {"CL:0000738", "CL:0000000"}, "CL:0000000": set()}
    above |= {
        "CL:0000084": above["CL:0000542"] | {"CL:0000542"},
        "CL:0000236": above["CL:0000542"] | {"CL:0000542"},
    }
    above["CL:0000576"] = {"CL:0000738", "CL:0000000"}
    names = {
        "CL:0000000": "cell",
        "CL:0000738": "leukocyte",
        "CL:0000542": "lymphocyte",
        "CL:0000084": "T cell",
    }
    names |= {"CL:0000236": "B cell", "CL:0000576": "monocyte"}
    small = CellOntology(names, {}, above, {"CL:0000738", "CL:0000542"})
    for module in (cell_ontology, finetune_data):
        monkeypatch.setattr(module, "read_cell_ontology", lambda: small)
    return small


@pytest.fixture
def taught(small_ontology, new_cells, tmp_path):
    """A model that knows terms of its types, taught with a table that `map-labels` wrote."""
    reference = new_cells(300)
    cell_ontology.map_labels(reference, "cell_type", tmp_path / "labels.csv")
    return scbert.finetune(
        reference,
        "cell_type",
        tmp_path / "taught",
        ontology=tmp_path / "labels.csv",
        use_cpu=True,
        disable_tqdm=True,
    )


def test_from_labels_to_an_annotated_file(taught, new_cells, tmp_path):
    config = ScBertConfig.from_pretrained(taught.folder)
    assert config.label_parents == {
        "B cell": "lymphocyte",
        "T cell": "lymphocyte",
        "monocyte": "leukocyte",
    } | {"lymphocyte": "leukocyte"}
    assert config.label_ontology_ids["lymphocyte"] == "CL:0000542"
    assert set(config.conformal_quantiles) == {"0.8", "0.9", "0.95", "0.99"}

    query = new_cells(90, seed=1)
    query.X[0] = 0
    query.write_h5ad(tmp_path / "query.h5ad")
    output = tmp_path / "out.h5ad"
    options = ["--coverage", "0.9", "--report", str(tmp_path / "report.html"), "--threshold", "0.5"]
    words = ["annotate", str(tmp_path / "query.h5ad"), "--model", str(taught.folder), "--output", str(output)]
    assert main([*words, *options]) == 0
    found = anndata.read_h5ad(output)
    # what CELLxGENE's schema asks of cell_type_ontology_term_id: categories, a term of CL or "unknown", nothing missing
    for name in ("scbert_cell_type_ontology_term_id", "scbert_cell_type_backoff_ontology_term_id"):
        terms = found.obs[name]
        assert isinstance(terms.dtype, pd.CategoricalDtype) and not terms.isna().any()
        assert all(term == "unknown" or re.fullmatch(r"CL:\d{7}", term) for term in terms.cat.categories)
    right = found.obs["scbert_cell_type"].astype(str) == query.obs["cell_type"].astype(str)
    assert right.mean() > 0.9
    of_type = dict(zip(found.obs["scbert_cell_type"], found.obs["scbert_cell_type_ontology_term_id"]))
    assert of_type["T cell"] == "CL:0000084" and of_type["unassigned"] == "unknown"
    sets = found.obs["scbert_prediction_set"].astype(str)
    assert sets.iloc[0] == "" and set("|".join(sets).split("|")) <= {"", *taught.labels}
    assert found.uns["scbert"]["coverage"] == 0.9 and found.uns["scbert"]["prediction_set_sizes"].sum() == 90
    assert "Prediction sets at coverage 0.9" in (tmp_path / "report.html").read_text()
    in_memory = taught.annotate(query, 0.5, coverage=0.9, progress=False)
    pd.testing.assert_frame_equal(in_memory.obs, found.obs, check_categorical=False)


def test_labels_csv_has_the_columns_too(taught, new_cells, tmp_path):
    new_cells(30, seed=1).write_h5ad(tmp_path / "query.h5ad")
    summary = annotate_file(
        tmp_path / "query.h5ad", taught, tmp_path / "out.csv", coverage=0.8, progress=False
    )
    table = pd.read_csv(tmp_path / "out.csv", index_col=0)
    assert {"scbert_cell_type_backoff", "scbert_prediction_set"} <= set(table)
    assert sum(summary["prediction_sets"]["cells_per_size"].values()) == 30


def test_sets_cover_cells_that_were_not_learnt_from():
    """Of the same kind as the reference's: the guarantee end to end, on types that are hard to tell apart."""
    rng = np.random.default_rng(0)
    kinds = np.array(["x", "y", "z"])

    def hard(n_cells):
        types = rng.integers(3, size=n_cells)
        rates = np.full((3, 40), 1.0)
        rates[np.arange(3), np.arange(3)] = 2.5
        cells = anndata.AnnData(rng.poisson(rates[types]).astype(np.float32), obs={"kind": kinds[types]})
        cells.var_names = [f"G{i}" for i in range(40)]
        return cells

    reference, query = hard(500), hard(2000)
    model = scbert.finetune(reference, "kind", use_cpu=True, disable_tqdm=True)
    for coverage in (0.8, 0.9):
        found = model.annotate(query, coverage=coverage, progress=False).obs
        held = [
            kind in text.split("|")
            for kind, text in zip(found["kind"], found["scbert_prediction_set"].astype(str))
        ]
        # quantiles of some 170 cells a type are uncertain by 0.02 or 0.03 each, and the fit of all cells knows more
        # than those of four fifths that they are of: a little above what was asked for, in the mean of many references
        assert -0.03 < np.mean(held) - coverage < 0.07


def test_a_column_of_wider_types(new_cells, tmp_path):
    reference = new_cells(150)
    reference.obs["lineage"] = np.where(reference.obs["cell_type"] == "monocyte", "myeloid", "lymphoid")
    model = scbert.finetune(reference, "cell_type", coarse_key="lineage", use_cpu=True, disable_tqdm=True)
    annotated = model.annotate(new_cells(60, seed=2), progress=False)
    labels, wider = (
        annotated.obs[name].astype(str) for name in ("scbert_cell_type", "scbert_cell_type_backoff")
    )
    assert (wider[labels != "unassigned"] == labels[labels != "unassigned"]).all()
    assert "scbert_cell_type_ontology_term_id" not in annotated.obs
    assert model.model.config.label_parents["B cell"] == "lymphoid"
    # a base's tree is of the base's types
    again = scbert.finetune(
        reference, "lineage", base=model, recipe="default", use_cpu=True, disable_tqdm=True
    )
    assert again.model.config.label_parents is None


def test_models_without_any_of_it(adata, model_dir):
    found = annotate(adata, model_dir, progress=False).obs
    assert list(found.columns[-2:]) == ["scbert_cell_type", "scbert_confidence"]
    with pytest.raises(InputError, match="cannot make prediction sets"):
        annotate(adata, model_dir, coverage=0.9, progress=False)


def test_a_coverage_that_the_model_has_not(adata, make_model):
    folder = make_model(conformal_quantiles={"0.9": [0.5] * 3, "0.95": [0.7] * 3})
    with pytest.raises(InputError, match=r"The coverage is 0.85; the model .* can do 0.9, 0.95"):
        annotate(adata, folder, coverage=0.85, progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coarse-key", "lineage"], "no column 'lineage' of coarser types in obs; it has: cell_type"),
        (
            ["--label-tree", "tree.csv", "--coarse-key", "donor"],
            "label_tree) or a column (coarse_key), not both",
        ),
        (["--label-tree", "tree.csv"], "Nothing in tree.csv stands above"),
        (["--ontology", "absent.csv"], "absent.csv"),
    ],
)
def test_what_finetune_refuses(options, words, query, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree.csv").write_text("label,parent\nx,y\n")
    fixed = [str(query), "--label-key", "cell_type", "--output", str(tmp_path / "model")]
    assert main(["finetune", *fixed, *options]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "model").exists()


def test_the_fields_travel_as_json(taught):
    """Nothing in the config that its JSON would change."""
    config = json.loads((taught.folder / "config.json").read_text())
    for name in ("label_ontology_ids", "label_parents", "conformal_quantiles"):
        assert config[name] == getattr(taught.model.config, name)


def test_cells_that_differ_are_said_to_have_no_promise():
    """More cells that look like no known type than held-out cells have; empty ones do not count."""
    known, novel, empty = np.full((50, 2), 0.49), np.full((6, 2), 0.4), np.zeros((500, 2))
    assert shift_notes(np.concatenate([known, novel[:5], empty])) == [] and shift_notes(empty) == []
    (note,) = shift_notes(np.concatenate([known, novel, empty]))
    assert "11% look like none of its types" in note


def test_no_cell_is_called_new_where_most_genes_that_tell_are_absent(taught, new_cells, caplog):
    """Cells unlike all that were learnt from; without half of the genes their distances say nothing."""
    query = new_cells(30, seed=0)
    query.X = query.X[:, np.random.default_rng(0).permutation(query.n_vars)]
    few = query[:, ::2].copy()
    sums = [
        taught.annotate(cells, progress=False, force=True).obsm["scbert_probabilities"].sum(axis=1)
        for cells in (query, few)
    ]
    threshold = taught.model.config.unassigned_threshold
    assert np.median(sums[0]) < threshold and (sums[1] > 0.9999).all()
    assert caplog.text.count("no cell is unassigned for being of a new type") == 1
    assert taught.model.classifier.novelty.odds[0] < ScBertNovelty.NEVER
    annotator = CellTypeAnnotationPipeline(model=taught.model, tokenizer=taught.tokenizer)
    rows = [{"X": row, "gene_names": few.var_names} for row in few.X]
    for found in (annotator(few, top_k=3), annotator(rows, top_k=3), annotator(rows, top_k=3, batch_size=7)):
        assert all(sum(one["score"] for one in cell) > 0.9999 for cell in found)


def test_the_embedding_pipeline_gives_the_cell_vectors_of_a_classifier(taught, new_cells, tmp_path):
    """The task has the bare encoder loaded, whose states are not what `embed` writes."""
    query = new_cells(5, seed=3)
    taught.save(tmp_path / "model")
    expected = taught.embed(query, progress=False).obsm["X_scbert"]
    found = np.stack(pipeline("cell-embedding", model=str(tmp_path / "model"))(query))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_lower_threshold_says_that_new_types_may_get_a_name(taught, new_cells, caplog):
    query = new_cells(30, seed=0)
    query.X = query.X[:, np.random.default_rng(0).permutation(query.n_vars)]
    taught.annotate(query, progress=False, threshold=taught.model.config.unassigned_threshold / 2)
    assert "look like none of the model's types" in caplog.text
