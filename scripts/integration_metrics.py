"""
How well an embedding keeps cell types together and batches mixed, by scIB's definitions.

Luecken et al., Benchmarking atlas-level data integration in single-cell genomics, Nat. Methods 2022; AvgBIO
and AvgBATCH as in scGPT and scMBERT. Every score lies between 0 and 1, and 1 is best.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scbert.extras import require

RESOLUTIONS = tuple(round(0.1 * step, 1) for step in range(1, 21))


def integration_metrics(
    embedding: np.ndarray,
    labels: Sequence,
    batches: Sequence | None = None,
    n_neighbors: int = 15,
    resolutions: Sequence[float] = RESOLUTIONS,
    seed: int = 0,
) -> dict[str, float]:
    """
    NMI, ARI, ASW_label, ASW_batch, graph connectivity, and their means AvgBIO and AvgBATCH.

    Parameters
    ----------
    embedding
        One vector per cell, [cells, hidden]; Euclidean distances are taken as they are.
    labels
        True cell types, [cells].
    batches
        Dataset, donor or protocol of each cell, [cells]; without it the batch scores are left out.
    n_neighbors
        Neighbours of the graph that is clustered and tested for connectivity (scanpy's default, as in scIB).
    resolutions
        Leiden resolutions tried; the clustering with the highest NMI gives both NMI and ARI.
    seed
        Of the neighbour search and of Leiden.

    Returns
    -------
    dict
        ``nmi``, ``ari``, ``asw_label``, ``avg_bio`` = mean of the three, ``resolution``, ``n_clusters``,
        ``graph_connectivity``; with `batches` also ``asw_batch`` and ``avg_batch`` = mean of ASW_batch and
        graph connectivity. ASW_batch is NaN when no type spans two batches, and so is then avg_batch.

    Raises
    ------
    ValueError
        When lengths differ, a value is not finite, or there are fewer than two types.

    Examples
    --------
    >>> scores = integration_metrics(adata.obsm["X_scbert"], adata.obs["cell_type"], adata.obs["donor"])
    >>> scores["avg_bio"], scores["avg_batch"]  # doctest: +SKIP
    (0.62, 0.87)
    """
    embedding, labels = _checked(embedding, labels)
    graph = neighbour_graph(embedding, n_neighbors, seed)
    clusters, resolution = best_leiden_clusters(graph, labels, resolutions, seed)
    scores = require("sklearn.metrics")
    result: dict[str, float] = {
        "nmi": float(scores.normalized_mutual_info_score(labels, clusters)),
        "ari": float(scores.adjusted_rand_score(labels, clusters)),
        "asw_label": silhouette_label(embedding, labels),
        "graph_connectivity": graph_connectivity(graph, labels),
        "resolution": resolution,
        "n_clusters": int(clusters.max()) + 1,
    }
    result["avg_bio"] = (result["nmi"] + result["ari"] + result["asw_label"]) / 3
    if batches is not None:
        result["asw_batch"] = silhouette_batch(embedding, labels, batches)
        result["avg_batch"] = (result["asw_batch"] + result["graph_connectivity"]) / 2
    return result


def neighbour_graph(embedding: np.ndarray, n_neighbors: int = 15, seed: int = 0) -> Any:
    """
    Symmetric weighted k-nearest-neighbour graph of an embedding, a scipy CSR matrix [cells, cells].

    By scanpy (UMAP's fuzzy connectivities), as scIB does.

    Examples
    --------
    >>> neighbour_graph(np.random.default_rng(0).normal(size=(30, 2)), n_neighbors=5).shape
    (30, 30)
    """
    scanpy, anndata = require("scanpy"), require("anndata")
    cells = anndata.AnnData(obsm={"X": np.asarray(embedding, dtype=np.float32)})
    used = max(2, min(n_neighbors, cells.n_obs - 1))
    scanpy.pp.neighbors(cells, n_neighbors=used, use_rep="X", random_state=seed)
    return cells.obsp["connectivities"].tocsr()


def leiden_clusters(graph: Any, resolution: float = 1.0, seed: int = 0) -> np.ndarray:
    """
    Leiden communities of a weighted graph [cells, cells], as numbers [cells], the largest community 0.

    By igraph through scanpy, two iterations, modularity with a resolution.

    Examples
    --------
    >>> import scipy.sparse
    >>> two_pairs = scipy.sparse.csr_matrix(np.kron(np.eye(2), 1 - np.eye(2)))
    >>> leiden_clusters(two_pairs).tolist()
    [0, 0, 1, 1]
    """
    scanpy, anndata = require("scanpy"), require("anndata")
    cells = anndata.AnnData(shape=(graph.shape[0], 0))
    scanpy.tl.leiden(
        cells,
        resolution=resolution,
        adjacency=graph,
        random_state=seed,
        flavor="igraph",
        directed=False,
        n_iterations=2,
    )
    return cells.obs["leiden"].astype(int).to_numpy()


def best_leiden_clusters(
    graph: Any, labels: Sequence, resolutions: Sequence[float] = RESOLUTIONS, seed: int = 0
) -> tuple[np.ndarray, float]:
    """
    The Leiden clustering nearest to the labels (highest NMI) over a scan of resolutions, and its resolution.

    Of equal ones the lowest resolution wins. The choice sees the labels, by scIB's definition: NMI and ARI
    are those of the best clustering that the graph allows.

    Examples
    --------
    >>> import scipy.sparse
    >>> two_pairs = scipy.sparse.csr_matrix(np.kron(np.eye(2), 1 - np.eye(2)))
    >>> best_leiden_clusters(two_pairs, ["B", "B", "T", "T"], resolutions=[0.5, 1.0])[1]
    0.5
    """
    score = require("sklearn.metrics").normalized_mutual_info_score
    best_clusters, best_resolution, best = np.zeros(graph.shape[0], dtype=int), float(resolutions[0]), -1.0
    for resolution in resolutions:
        clusters = leiden_clusters(graph, resolution, seed)
        value = score(labels, clusters)
        # a gain within rounding is none: keep the coarser clustering.
        if value > best + 1e-12:
            best_clusters, best_resolution, best = clusters, float(resolution), value
    return best_clusters, best_resolution


def silhouette_label(embedding: np.ndarray, labels: Sequence) -> float:
    """
    ASW_label: mean silhouette width s of cell types, scaled from [-1, 1] to [0, 1] as (s + 1) / 2.

    Examples
    --------
    >>> round(silhouette_label(np.array([[0.0], [1.0], [10.0], [11.0]]), ["B", "B", "T", "T"]), 4)
    0.9499
    """
    embedding, labels = _checked(embedding, labels)
    return float((require("sklearn.metrics").silhouette_score(embedding, labels) + 1) / 2)


def silhouette_batch(embedding: np.ndarray, labels: Sequence, batches: Sequence) -> float:
    """
    ASW_batch: within each type, the mean over its cells of 1 - |s|, s the silhouette width of the batches.

    Then the plain mean over types. Types found in one batch only, or with every cell a batch of its own, have
    no silhouette and are left out; NaN when none remains.

    Examples
    --------
    >>> mixed = np.array([[0.0], [1.0], [0.0], [1.0]])
    >>> round(silhouette_batch(mixed, ["B"] * 4, ["x", "x", "y", "y"]), 2)
    0.5
    """
    embedding, labels = _checked(embedding, labels, least=1)
    batches = np.asarray(batches).astype(str)
    if batches.shape != labels.shape:
        raise ValueError(f"one batch per cell is needed; got {batches.shape} for {labels.shape[0]} cells")
    silhouettes = require("sklearn.metrics").silhouette_samples
    means = []
    for label in np.unique(labels):
        here = labels == label
        if 1 < len(np.unique(batches[here])) < here.sum():
            means.append(np.mean(1 - np.abs(silhouettes(embedding[here], batches[here]))))
    return float(np.mean(means)) if means else float("nan")


def graph_connectivity(graph: Any, labels: Sequence) -> float:
    """
    Mean over types of the share of a type's cells in the largest connected piece of its own subgraph.

    Examples
    --------
    >>> import scipy.sparse
    >>> chain = scipy.sparse.csr_matrix(np.diag([1, 0, 1], k=1) + np.diag([1, 0, 1], k=-1))
    >>> graph_connectivity(chain, ["B", "B", "B", "B"])  # two pairs of one type
    0.5
    """
    csgraph = require("scipy.sparse.csgraph")
    labels = np.asarray(labels).astype(str)
    graph = graph.tocsr()
    shares = []
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        _, pieces = csgraph.connected_components(graph[here][:, here], connection="strong")
        shares.append(np.bincount(pieces).max() / len(here))
    return float(np.mean(shares))


def _checked(embedding: np.ndarray, labels: Sequence, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    embedding, labels = np.asarray(embedding), np.asarray(labels).astype(str)
    if embedding.ndim != 2 or labels.shape != embedding.shape[:1]:
        raise ValueError(
            f"an embedding [cells, hidden] and one label per cell are needed; "
            f"got {embedding.shape} and {labels.shape}"
        )
    if not np.isfinite(embedding).all():
        raise ValueError("the embedding holds values that are not finite")
    if len(np.unique(labels)) < least:
        raise ValueError(f"at least {least} cell types are needed; got {np.unique(labels).tolist()}")
    return embedding, labels
