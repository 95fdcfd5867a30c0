"""The baselines: one interface, determinism, and honest notes."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.data.read import log_normalize
from scbert.evaluation.baselines import BASELINES, C_GRID, LogisticRegressionBaseline, available_baselines
from scbert.evaluation.per_gene_mode import PerGeneModeBaseline, count_bins
from scbert.tokenization import InputError

GENES = [f"GENE{i}" for i in range(40)]


def cells(seed=0, n_cells=90, genes=GENES):
    """Three types; type k has ten times the counts in its own five genes."""
    rng = np.random.default_rng(seed)
    types = np.arange(n_cells) % 3
    rates = np.full((n_cells, len(GENES)), 1.0)
    for k in range(3):
        rates[types == k, 5 * k : 5 * k + 5] = 10.0
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    obs = pd.DataFrame(
        {"cell_type": np.array(["B", "NK", "T"])[types]}, index=[f"c{i}" for i in range(n_cells)]
    )
    whole = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))
    return whole[:, list(genes)].copy()


@pytest.fixture(scope="module")
def reference():
    return cells(0)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_classifier_keeps_the_interface(name, reference):
    if name not in available_baselines():
        pytest.skip(f"{name} is not installed")
    before = reference.X.copy()
    # other genes, another order, one of the reference's missing: still the same columns of classes.
    query = cells(1, genes=GENES[:0:-1])
    model = BASELINES[name](seed=0).fit(reference, "cell_type")
    probabilities = model.predict_proba(query)
    assert model.classes_.tolist() == ["B", "NK", "T"]
    assert probabilities.shape == (90, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (before != reference.X).nnz == 0
    again = BASELINES[name](seed=0).fit(reference, "cell_type").predict_proba(query)
    np.testing.assert_array_equal(probabilities, again)
    accuracy = (model.predict(query) == query.obs["cell_type"].to_numpy()).mean()
    assert accuracy == pytest.approx(1 / 3) if name == "majority" else accuracy > 0.9


def test_counts_and_their_logs_give_the_same_classifier(reference):
    logged = reference.copy()
    logged.X = log_normalize(reference)[0]
    options = {"grid": (1.0,)}
    counts_model = LogisticRegressionBaseline(**options).fit(reference, "cell_type")
    logged_model = LogisticRegressionBaseline(**options).fit(logged, "cell_type")
    np.testing.assert_allclose(
        counts_model.predict_proba(reference), logged_model.predict_proba(logged), atol=1e-3
    )


def test_inner_search_chooses_from_the_grid_and_ties_go_to_the_strongest_penalty(reference):
    model = LogisticRegressionBaseline(grid=(1e-6, 1.0, 10.0)).fit(reference, "cell_type")
    assert set(model.scores) == {1e-6, 1.0, 10.0}
    # with a penalty that empties the model every cell gets one type.
    assert model.scores[1e-6] < 0.3 and model.C == 1.0
    assert (LogisticRegressionBaseline(grid=(0.5,)).fit(reference, "cell_type")).C == 0.5


def test_a_type_of_one_cell_does_not_stop_the_search(reference):
    rare = reference.copy()
    labels = rare.obs["cell_type"].astype(str)
    labels.iloc[0] = "rare"
    rare.obs["cell_type"] = labels
    model = LogisticRegressionBaseline(grid=(0.1, 1.0)).fit(rare, "cell_type")
    assert set(model.scores) == {0.1, 1.0} and model.predict_proba(rare).shape == (90, 4)
    # the other types have two, and then one
    of_type = rare.obs.groupby("cell_type").cumcount().to_numpy()
    found = [LogisticRegressionBaseline().fit(rare[of_type < n], "cell_type") for n in (2, 1)]
    assert set(found[0].scores) == set(C_GRID) and found[1].C == 1.0


def test_unlabelled_cells_are_left_out(reference):
    partly = reference.copy()
    labels = partly.obs["cell_type"].astype(object)
    labels.iloc[:4] = ["Unassigned", None, np.nan, " B "]
    partly.obs["cell_type"] = labels
    assert BASELINES["majority"]().fit(partly, "cell_type").classes_.tolist() == ["B", "NK", "T"]


def test_a_fit_that_does_not_converge_is_said(monkeypatch, reference):
    from scbert.evaluation import baselines

    fitted = baselines._fit_logistic
    monkeypatch.setattr(baselines, "_fit_logistic", lambda *given: (fitted(*given)[0], False))
    model = LogisticRegressionBaseline(grid=(1.0,)).fit(reference, "cell_type")
    assert model.notes == ["logistic regression stopped before it converged"]


def test_inputs_that_cannot_be_used_are_refused(reference):
    with pytest.raises(InputError, match="no column 'type' in obs of the cells; it has: cell_type"):
        BASELINES["majority"]().fit(reference, "type")
    one = reference[reference.obs["cell_type"] == "B"].copy()
    with pytest.raises(InputError, match="At least two"):
        BASELINES["majority"]().fit(one, "cell_type")
    strange = reference.copy()
    strange.var_names = [f"ENSG{i:011d}" for i in range(len(GENES))]
    for name in ("knn", "celltypist"):
        if name in available_baselines():
            with pytest.raises(InputError, match="None of the 40 genes"):
                BASELINES[name]().fit(reference, "cell_type").predict(strange)


def test_celltypist_agrees_with_its_own_answer_and_leaves_the_root_logger_alone(reference):
    celltypist = pytest.importorskip("celltypist")
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    model = BASELINES["celltypist"]().fit(reference, "cell_type")
    query = cells(2)
    mine = model.predict(query)
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)
    query.X = log_normalize(query)[0]
    theirs = celltypist.annotate(query, model=model.model).predicted_labels["predicted_labels"]
    assert mine.tolist() == theirs.tolist()


def test_per_gene_mode_by_hand():
    train = sp.csr_matrix(np.array([[2, 1, 0, 2], [2, 3, 0, 4], [1, 3, 0, 0]]))
    counts = count_bins(train, 5)
    assert counts[:2].tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 2, 0]]
    baseline = PerGeneModeBaseline(counts)
    # gene 2 is never expressed: the commonest bin of all (2); gene 3 ties: the one that all genes have more often
    assert baseline.mode.tolist() == [2, 3, 2, 2]
    assert np.exp(baseline.log_shares).sum(axis=1) == pytest.approx([1, 1, 1, 1], abs=1e-4)
    # two cells in bin 2, one in bin 1, and a pseudo-count of all genes' shares
    assert np.exp(baseline.log_shares[0, 2]) == pytest.approx((2 + 3 / 8) / 4)
