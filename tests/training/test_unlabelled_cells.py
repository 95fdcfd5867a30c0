"""Cells without labels in fine-tuning: what they add, what is told of them, and when they are left."""

import json

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.special import softmax
from typer.testing import CliRunner

import scbert
from scbert.commands.cli import app
from scbert.training import unlabelled_cells
from scbert.training.logistic_head import cross_folds, solve_head
from scbert.training.unlabelled_cells import handed_on, learn_from_all, likelihood_gain, neighbour_means

N_TYPES, N_GENES = 4, 300


def draw(n_cells, seed, shift=0.0):
    """Counts of few molecules, in which each type has 25 genes of its own; a shift multiplies other genes."""
    rng = np.random.default_rng(seed)
    types = np.arange(n_cells) % N_TYPES
    rates = np.full((n_cells, N_GENES), 0.25)
    for kind in range(N_TYPES):
        rates[types == kind, 25 * kind : 25 * kind + 25] += 0.5
    rates[:, 150:] *= 1 + shift * np.random.default_rng(9).random(N_GENES - 150)
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32)), types


@pytest.fixture(scope="module")
def cells():
    labelled, targets = draw(4 * N_TYPES, 0)
    others, types = draw(400, 1)
    return labelled, targets, others, types


def accuracy(head, features, types):
    return ((features @ head.weights.T + head.bias).argmax(axis=1) == types).mean()


def test_other_cells_help_where_labels_are_few(cells):
    """On the other cells, and on cells that neither fit has seen."""
    labelled, targets, others, types = cells
    folds = cross_folds(targets)
    alone = solve_head(labelled, targets, N_TYPES, folds)
    taught, report = learn_from_all(labelled, targets, others, N_TYPES, folds)
    assert report["kept"] and report["neighbours"] == "all" and report["cells"] == 400
    for features, true in ((others, types), draw(400, 2)):
        assert accuracy(taught, features, true) > accuracy(alone, features, true) + 0.05


def test_confidence_stays_that_of_the_average(cells):
    """Not the certainty of a fit on its own guesses: on unseen cells, mean confidence is near the accuracy."""
    labelled, targets, others, _ = cells
    taught, _ = learn_from_all(labelled, targets, others, N_TYPES, cross_folds(targets))
    features, types = draw(600, 3)
    probabilities = softmax(features @ taught.weights.T + taught.bias, axis=1)
    assert abs(probabilities.max(axis=1).mean() - accuracy(taught, features, types)) < 0.15


def test_labels_of_a_fold_teach_nothing_about_it(cells):
    labelled, targets, others, _ = cells
    folds = cross_folds(targets)
    changed = targets.copy()
    changed[3] = (targets[3] + 1) % N_TYPES
    first, second = (
        unlabelled_cells.cross_fit(
            sp.vstack([labelled, others]).tocsr(),
            np.append(t, np.full(400, -1)),
            N_TYPES,
            np.append(folds, np.full(400, -1)),
            0.5,
            None,
        ).logits
        for t in (targets, changed)
    )
    same_fold = np.append(folds == folds[3], np.zeros(400, dtype=bool))
    np.testing.assert_array_equal(first[:, same_fold], second[:, same_fold])
    assert np.abs(first[:, 16:] - second[:, 16:]).max() > 1e-3


def test_cells_of_another_kind_are_their_own_neighbours(cells):
    labelled, targets, _, _ = cells
    others, types = draw(400, 4, shift=20.0)
    taught, report = learn_from_all(labelled, targets, others, N_TYPES, cross_folds(targets))
    assert report["told_apart"] > 0.95 and report["neighbours"] == "own"
    alone = solve_head(labelled, targets, N_TYPES, cross_folds(targets))
    assert accuracy(taught, others, types) > accuracy(alone, others, types) - 0.02


def test_what_makes_held_out_cells_worse_is_left(cells, monkeypatch):
    labelled, targets, others, _ = cells
    folds = cross_folds(targets)
    monkeypatch.setattr(unlabelled_cells, "likelihood_gain", lambda *_: (-0.5, 0.1))
    taught, report = learn_from_all(labelled, targets, others, N_TYPES, folds)
    assert not report["kept"]
    np.testing.assert_array_equal(taught.weights, solve_head(labelled, targets, N_TYPES, folds).weights)


def test_one_cell_a_type_is_enough(cells):
    labelled, targets, others, types = cells
    taught, report = learn_from_all(labelled[:4], targets[:4], others, N_TYPES, cross_folds(targets[:4]))
    assert report["gain"] is None and report["kept"]
    assert accuracy(taught, others, types) > 0.5


@pytest.mark.parametrize("n_types", [2, N_TYPES])
def test_members_that_contradict_each_other_teach_nothing_without_a_judge(cells, n_types):
    """Of cells that are noise, the members say as many things as they are; one labelled cell a type cannot judge."""
    labelled, targets, _, _ = cells
    noise = sp.csr_matrix(
        np.random.default_rng(5).poisson(2.0, size=(400, labelled.shape[1])), dtype=np.float32
    )
    few, targets = labelled[:n_types], targets[:n_types]
    taught, report = learn_from_all(few, targets, noise, n_types, cross_folds(targets))
    assert report["gain"] is None and not report["kept"]
    np.testing.assert_array_equal(
        taught.weights, solve_head(few, targets, n_types, cross_folds(targets)).weights
    )


def test_cells_that_express_no_gene_of_the_panel_are_refused(files, tmp_path):
    others = anndata.read_h5ad(files / "query.h5ad")
    (tmp_path / "panel.txt").write_text("\n".join(others.var_names[:150]))
    silent = others.X.tolil()
    silent[:, :150] = 0
    others.X = silent.tocsr()
    given = {"unlabelled": [others], "genes": str(tmp_path / "panel.txt"), "output": tmp_path / "model"}
    with pytest.raises(scbert.InputError, match="without labels expresses"):
        scbert.finetune(files / "reference.h5ad", "cell_type", **given)


def test_what_is_handed_on_is_averaged_with_the_labelled_cells_own(cells):
    labelled, targets, others, _ = cells
    folds = cross_folds(targets)
    alone = solve_head(labelled, targets, N_TYPES, folds)
    seen = {}

    def keep(*given):
        seen["head"] = handed_on(*given)
        return seen["head"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlabelled_cells, "handed_on", keep)
        taught, _ = learn_from_all(labelled, targets, others, N_TYPES, folds)
    for ours, theirs, both in zip((alone.weights, alone.bias), seen["head"], (taught.weights, taught.bias)):
        np.testing.assert_allclose(both, (ours + theirs) / 2, rtol=1e-6)


def test_a_large_query_is_drawn_from(cells, monkeypatch):
    monkeypatch.setattr(unlabelled_cells, "MAX_CELLS", 100)
    labelled, targets, others, _ = cells
    _, report = learn_from_all(labelled, targets, others, N_TYPES, cross_folds(targets))
    assert report["cells"] == 100


def test_means_over_neighbours_are_those_written_out(cells):
    labelled, _, others, _ = cells
    both = sp.vstack([labelled, others]).tocsr()
    coordinates = np.random.default_rng(0).normal(size=(both.shape[0], 3))
    found = neighbour_means(both, coordinates).toarray()
    distances = ((coordinates[:, None] - coordinates[None]) ** 2).sum(axis=2)
    nearest = np.argsort(distances, axis=1)[:, : unlabelled_cells.NEIGHBOURS + 1]
    np.testing.assert_allclose(found, both.toarray()[nearest].mean(axis=1), rtol=1e-5)


def test_a_gain_is_that_of_cells_with_others_of_their_type():
    before, after = np.zeros((3, 2)), np.array([[1.0, 0], [1, 0], [0, 1]])
    gain, error = likelihood_gain(before, after, np.array([0, 0, 1]))
    expected = np.log(2) - np.log1p(np.exp(-1))
    assert gain == pytest.approx(expected) and error == pytest.approx(0)
    assert likelihood_gain(before, after, np.array([0, 1, 2])) == (None, None)


def test_only_what_is_sure_is_handed_on(cells):
    labelled, targets, others, types = cells
    unsure = np.full((400, N_TYPES), 1 / N_TYPES)
    sure = 0.9 * np.eye(N_TYPES)[types] + 0.025
    nothing, everything = (handed_on(labelled, targets, others, p, N_TYPES)[0] for p in (unsure, sure))
    features, true = draw(300, 5)
    right = [((features @ weights.T).argmax(axis=1) == true).mean() for weights in (nothing, everything)]
    assert right[1] > right[0] + 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    names = [f"GENE{number}" for number in range(N_GENES)]
    for name, n_cells, seed in (("reference", 16, 0), ("query", 200, 1), ("more", 100, 2)):
        matrix, types = draw(n_cells, seed)
        cells = anndata.AnnData(matrix, obs={"cell_type": [f"type {kind}" for kind in types]})
        cells.var_names = names
        cells.obs_names = [f"{name}-{number}" for number in range(n_cells)]
        cells.write_h5ad(folder / f"{name}.h5ad")
    return folder


def test_the_command_learns_from_files_without_labels(files, caplog):
    """And says so, in words and in metrics.json; the same model comes out in Python."""
    paths = {name: str(files / f"{name}.h5ad") for name in ("reference", "query", "more")}
    arguments = ["finetune", paths["reference"], "--label-key", "cell_type", "--output", str(files / "model")]
    arguments += ["--unlabelled", paths["query"], "--unlabelled", paths["more"]]
    with caplog.at_level("INFO"):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Learnt from 300 cells without labels as well" in caplog.text
    report = json.loads((files / "model" / "metrics.json").read_text())["solved_head"]["unlabelled"]
    assert report["cells"] == 300 and report["kept"]
    query = anndata.read_h5ad(paths["query"])
    model = scbert.finetune(paths["reference"], "cell_type", unlabelled=[query, paths["more"]])
    first, second = (m.annotate(query).obs for m in (scbert.load_model(files / "model"), model))
    assert first["scbert_cell_type"].tolist() == second["scbert_cell_type"].tolist()
    np.testing.assert_allclose(first["scbert_confidence"], second["scbert_confidence"], atol=1e-6)


def test_genes_that_only_other_cells_express_are_in_the_panel(files):
    few = anndata.read_h5ad(files / "reference.h5ad")
    few.X[:, 0] = 0
    model = scbert.finetune(few, "cell_type", unlabelled=files / "query.h5ad")
    assert "GENE0" in model.tokenizer.gene_panel


def test_cells_with_few_genes_of_the_reference_are_refused_by_name(files, tmp_path):
    anndata.read_h5ad(files / "more.h5ad")[:, :20].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(scbert.InputError, match="few.h5ad do not suit the panel") as error:
        scbert.finetune(
            files / "reference.h5ad", "cell_type", unlabelled=[files / "query.h5ad", tmp_path / "few.h5ad"]
        )
    # fine-tuning has no such setting
    assert "force" not in str(error.value)


def test_recipes_in_steps_have_no_use_for_them(files):
    with pytest.raises(scbert.InputError, match="solve for the head"):
        scbert.finetune(
            files / "reference.h5ad", "cell_type", recipe="scbert", unlabelled=files / "query.h5ad"
        )
