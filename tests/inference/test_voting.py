import builtins
import logging

import numpy as np
import pandas as pd
import pytest

from scbert.inference import annotate
from scbert.inference.report import cell_coordinates
from scbert.inference.voting import leiden_groups, majority_vote
from scbert.tokenization import InputError

NAMES = ["B", "T"]


def vote(labels, groups, probabilities=None):
    if probabilities is None:
        probabilities = [[0.9, 0.1] if label == "B" else [0.1, 0.9] for label in labels]
    return majority_vote(np.array(labels, dtype=object), groups, np.array(probabilities), NAMES)


def test_the_commonest_label_of_each_group_wins():
    result = vote(["B", "B", "T", "T"], ["x", "x", "x", "y"])
    assert list(result.labels) == ["B", "B", "B", "T"]
    np.testing.assert_allclose(result.shares, [2 / 3, 2 / 3, 2 / 3, 1])
    assert not result.ties


def test_unassigned_is_a_vote():
    result = vote(["unassigned", "unassigned", "T"], [0, 0, 0])
    assert list(result.labels) == ["unassigned"] * 3


def test_ties_go_to_the_larger_summed_probability_and_are_told():
    result = vote(["B", "T"], ["x", "x"], [[0.6, 0.4], [0.1, 0.9]])
    assert list(result.labels) == ["T", "T"]
    assert result.ties == {"x": ["T", "B"]}
    # all equal: the order of the labels decides, whatever the order of the cells
    for labels in (["B", "T"], ["T", "B"]):
        assert list(vote(labels, ["x", "x"], [[0.5, 0.5]] * 2).labels) == ["B", "B"]
    # a named type goes before "unassigned"
    assert list(vote(["unassigned", "T"], [1, 1], [[0.4, 0.4], [0.1, 0.9]]).labels) == ["T", "T"]


def test_cells_without_a_group_keep_their_own_label():
    result = vote(["B", "T", "B"], pd.Categorical(["x", None, "x"]))
    assert list(result.labels) == ["B", "T", "B"]
    assert np.isnan(result.shares[1]) and result.shares[0] == 1


def test_vote_by_a_column(adata, model_dir, caplog):
    adata.obs["cluster"] = pd.Categorical(np.where(np.arange(120) < 2, None, adata.obs["cell_type"]))
    annotated = annotate(adata, model_dir, majority_vote="cluster", progress=False)
    grouped = annotated.obs[2:].groupby("cluster", observed=True)
    assert (grouped["scbert_majority_vote"].nunique() == 1).all()
    for _, cells in grouped:
        counts = cells["scbert_cell_type"].value_counts()
        assert counts[cells["scbert_majority_vote"].iloc[0]] == counts.max()
        np.testing.assert_allclose(cells["scbert_majority_share"], counts.max() / len(cells))
    assert annotated.uns["scbert"]["majority_vote"]["key"] == "cluster"
    assert "2 cell(s) belong to no group" in caplog.text


def test_vote_by_leiden_groups(adata, model_dir, caplog, tmp_path):
    with caplog.at_level(logging.INFO, "scbert"):
        annotated = annotate(adata, model_dir, majority_vote="leiden", progress=False)
    assert "Leiden:" in caplog.text
    grouped = annotated.obs.groupby("scbert_leiden", observed=True)
    assert grouped.ngroups > 1
    assert (grouped["scbert_majority_vote"].nunique() == 1).all()
    # places that some cells lack say nothing, nor are they drawn
    adata.obsm["X_umap"] = np.full((adata.n_obs, 2), np.nan)
    assert np.isfinite(cell_coordinates(adata)[0]).all()
    adata.obsm["X_pca"] = np.full((adata.n_obs, 5), np.nan)
    again = annotate(adata, model_dir, majority_vote="leiden", progress=False)
    assert again.obs["scbert_majority_vote"].equals(annotated.obs["scbert_majority_vote"])
    annotated.write_h5ad(tmp_path / "out.h5ad")


def test_leiden_uses_an_existing_pca(adata, model_dir):
    # four clouds far apart, whatever the expression says
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(120, 5)) * 0.01
    adata.obsm["X_pca"][:, 0] += np.repeat([0, 10, 20, 30], 30)
    annotated = annotate(adata, model_dir, majority_vote="leiden", progress=False)
    clouds = pd.crosstab(annotated.obs["scbert_leiden"], np.repeat([0, 1, 2, 3], 30))
    assert ((clouds > 0).sum(axis=1) == 1).all()


def test_a_vote_over_mixed_clusters_is_left_out(adata, model_dir, caplog):
    own = annotate(adata, model_dir, threshold=0, progress=False).obs["scbert_cell_type"].astype(str)
    first, second = own.value_counts().index[:2]
    rows = [np.flatnonzero(own == name)[: (own == second).sum()] for name in (first, second)]
    # in turns along a line: whatever is a cluster there holds half of either type
    cells = adata[np.stack(rows, axis=1).ravel()].copy()
    cells.obsm["X_pca"] = np.arange(cells.n_obs, dtype=np.float32)[:, None]
    mixed = annotate(cells, model_dir, threshold=0, majority_vote="leiden", progress=False)
    assert "The majority vote was left out" in caplog.text
    assert "scbert_majority_vote" not in mixed.obs and "majority_vote" not in mixed.uns["scbert"]


def test_few_cells_are_one_group():
    assert list(leiden_groups(np.ones((2, 3)))) == ["0", "0"]


def test_absent_column_and_absent_scanpy_are_told_before_the_model_runs(adata, model_dir, monkeypatch):
    with pytest.raises(InputError, match="no column 'nothing'"):
        annotate(adata, model_dir, majority_vote="nothing")
    real = builtins.__import__

    def without_igraph(name, *args, **kwargs):
        if name == "igraph":
            raise ModuleNotFoundError("No module named 'igraph'", name="igraph")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_igraph)
    with pytest.raises(ModuleNotFoundError, match="igraph"):
        annotate(adata, model_dir, majority_vote="leiden")
