"""Integration scores: a worked example of four cells, graphs drawn by hand, and two clear blobs."""

import math

import numpy as np
import pytest
import scipy.sparse

from integration_metrics import (
    best_leiden_clusters,
    graph_connectivity,
    integration_metrics,
    leiden_clusters,
    silhouette_batch,
    silhouette_label,
)


def edges(n_cells, pairs):
    rows, columns = np.array(pairs).T
    half = scipy.sparse.csr_matrix((np.ones(len(pairs)), (rows, columns)), shape=(n_cells, n_cells))
    return half + half.T


def test_asw_label_by_hand():
    # cells 0 and 1 are B, 10 and 11 are T; s = (b - a) / max(a, b), a = 1 everywhere.
    widths = [(10.5 - 1) / 10.5, (9.5 - 1) / 9.5, (9.5 - 1) / 9.5, (10.5 - 1) / 10.5]
    expected = (np.mean(widths) + 1) / 2
    assert silhouette_label(np.array([[0.0], [1.0], [10.0], [11.0]]), list("BBTT")) == pytest.approx(expected)


def test_asw_batch_by_hand():
    # type B at 0, 1 (batch x) and 0, 1 (batch y): a = 1, b = mean(0, 1) = 0.5, s = (0.5 - 1) / 1 = -0.5.
    # type T at 0, 1 (batch x) and 10, 11 (batch y): the widths of the label example above.
    apart = np.mean([9.5 / 10.5, 8.5 / 9.5, 8.5 / 9.5, 9.5 / 10.5])
    embedding = np.array([[0.0], [1.0], [0.0], [1.0], [0.0], [1.0], [10.0], [11.0]])
    labels, batches = list("BBBBTTTT"), list("xxyyxxyy")
    expected = (0.5 + (1 - apart)) / 2
    assert silhouette_batch(embedding, labels, batches) == pytest.approx(expected)


def test_asw_batch_leaves_out_types_of_one_batch():
    embedding = np.array([[0.0], [1.0], [0.0], [1.0], [7.0], [8.0]])
    assert silhouette_batch(embedding, list("BBBBTT"), list("xxyyxx")) == pytest.approx(0.5)
    assert math.isnan(silhouette_batch(embedding, list("BBBBTT"), ["x"] * 6))


def test_graph_connectivity_by_hand():
    # B: a chain of three and one cell that hangs only on a T cell -> 3/4.  T: one pair -> 1.
    graph = edges(6, [(0, 1), (1, 2), (3, 4), (4, 5)])
    assert graph_connectivity(graph, list("BBBBTT")) == pytest.approx((3 / 4 + 1) / 2)


def test_leiden_finds_two_cliques_and_the_scan_prefers_the_coarsest_of_equals():
    clique = [(i, j) for i in range(5) for j in range(i)]
    graph = edges(10, clique + [(i + 5, j + 5) for i, j in clique] + [(0, 5)])
    assert leiden_clusters(graph, 1.0).tolist() == [0] * 5 + [1] * 5
    clusters, resolution = best_leiden_clusters(graph, list("BBBBBTTTTT"), resolutions=[0.01, 0.5, 1.0])
    assert (clusters.tolist(), resolution) == ([0] * 5 + [1] * 5, 0.5)


def test_two_blobs_with_mixed_batches_score_high():
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(120, 3)) + np.repeat([[0.0, 0, 0], [20.0, 0, 0]], 60, axis=0)
    labels, batches = np.repeat(["B", "T"], 60), np.tile(["x", "y"], 60)
    scores = integration_metrics(embedding, labels, batches, resolutions=[0.1, 1.0])
    assert (scores["nmi"], scores["ari"], scores["graph_connectivity"]) == (1.0, 1.0, 1.0)
    assert scores["avg_bio"] == pytest.approx((2 + scores["asw_label"]) / 3)
    assert scores["avg_batch"] == pytest.approx((scores["asw_batch"] + 1) / 2)
    assert scores["asw_label"] > 0.9 and scores["asw_batch"] > 0.85
    assert scores == integration_metrics(embedding, labels, batches, resolutions=[0.1, 1.0])
    assert "avg_batch" not in integration_metrics(embedding, labels, resolutions=[0.1])


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="at least 2 cell types"):
        integration_metrics(np.zeros((4, 2)), list("BBBB"))
    with pytest.raises(ValueError, match="not finite"):
        silhouette_label(np.array([[0.0], [np.nan]]), list("BT"))
    with pytest.raises(ValueError, match="one label per cell"):
        silhouette_label(np.zeros((3, 1)), list("BT"))
