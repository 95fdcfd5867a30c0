"""
Cells of a type that the reference doesn't hold: scores of novelty, and what a rejection rule achieves.

Every score here grows with novelty, so that one rule serves them all: a cell is novel when its score
exceeds a threshold.
"""

from collections.abc import Sequence

import numpy as np

from ..data.labels import UNASSIGNED
from ..extras import require


def max_probability_score(probabilities: np.ndarray) -> np.ndarray:
    """One minus the largest probability of each cell, [cells]; 0.5 is scBERT's rule."""
    return 1.0 - np.asarray(probabilities).max(axis=1)


def entropy_score(probabilities: np.ndarray) -> np.ndarray:
    """
    Entropy of each cell's probabilities divided by that of a uniform guess, [cells].

    What they lack of 1 is the probability of no type, one more outcome: with it the entropy may exceed 1.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    no_type = np.clip(1 - values.sum(axis=1), 0, None)
    entropy = require("scipy.stats").entropy(np.column_stack([values, no_type]), axis=1)
    return entropy / np.log(max(values.shape[1], 2))


def energy_score(logits: np.ndarray) -> np.ndarray:
    """
    Free energy -log sum exp(logit) of each cell, [cells].

    Unlike probabilities it tells "no class fits" (all logits small) from "two classes fit" (two large ones).
    Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020.
    """
    return -require("scipy.special").logsumexp(np.asarray(logits, dtype=np.float64), axis=1)


def mahalanobis_score(train: np.ndarray, labels: Sequence, embeddings: np.ndarray) -> np.ndarray:
    """
    Squared Mahalanobis distance of embeddings to the nearest class mean of `train` (each [cells, hidden]), [cells].

    There is one covariance for all classes, of `labels` [training cells]. It is shrunk (Ledoit-Wolf), since there may
    be fewer cells than dimensions.
    Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples, NeurIPS 2018.
    """
    train, embeddings = np.asarray(train, dtype=np.float64), np.asarray(embeddings, dtype=np.float64)
    _, index = np.unique(np.asarray(labels).astype(str), return_inverse=True)
    means = np.stack([train[index == k].mean(axis=0) for k in range(index.max() + 1)])
    # a pseudo-inverse: a dimension that never varies within a class would make the inverse infinite.
    shrunk = require("sklearn.covariance").LedoitWolf(assume_centered=True).fit(train - means[index])
    nearest = np.full(len(embeddings), np.inf)
    for mean in means:
        away = embeddings - mean
        nearest = np.minimum(nearest, np.einsum("nh,hk,nk->n", away, shrunk.precision_, away, optimize=True))
    return nearest


def neighbour_score(train: np.ndarray, embeddings: np.ndarray, n_neighbors: int = 10) -> np.ndarray:
    """
    Distance of embeddings to the k-th nearest of `train` (each [cells, hidden]), all scaled to length 1, [cells].

    k is lowered to the number of training cells where there are fewer.
    Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022.
    """
    neighbours = require("sklearn.neighbors").NearestNeighbors(n_neighbors=min(n_neighbors, len(train)))
    distances, _ = neighbours.fit(_unit(train)).kneighbors(_unit(embeddings))
    return distances[:, -1]


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings, dtype=np.float64)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def reject(predictions: Sequence, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Predictions with "unassigned" in the place of every cell whose novelty score exceeds the threshold."""
    return np.where(np.asarray(scores) > threshold, UNASSIGNED, np.asarray(predictions).astype(str))


def novelty_auroc(scores: np.ndarray, is_novel: Sequence) -> float:
    """
    Probability that a novel cell scores above a known one (ties count half); 0.5 is chance.

    NaN when all cells are of one kind. By scikit-learn.
    """
    is_novel = np.asarray(is_novel, dtype=bool)
    if is_novel.all() or not is_novel.any():
        return float("nan")
    return float(require("sklearn.metrics").roc_auc_score(is_novel, np.asarray(scores)))


def novel_type_metrics(y_true: Sequence, y_pred: Sequence, known_labels: Sequence) -> dict[str, float]:
    """
    What a classifier with a rejection rule makes of query cells, some of types it never saw.

    A cell is *truly novel* when its true label is none of `known_labels`, which the classifier was trained on, and
    *predicted novel* when its predicted one is "unassigned". A share of no cells is NaN.

    - ``known_accuracy``: of the truly known cells, the share predicted as exactly their type; a known
      cell left unassigned is wrong;
    - ``novel_accuracy``: of the *union* of truly novel and predicted novel cells, the share that is both
      (the definition of Yang et al. 2022: it falls when novel cells are missed and when known ones are
      thrown out);
    - ``novel_recall``: of the truly novel cells, the share predicted novel;
    - ``novel_precision``: of the predicted novel cells, the share truly novel;
    - ``assigned_accuracy``: of the cells that got a type, known and novel alike, the share that is right;
    - ``n_known``, ``n_novel``, ``n_predicted_novel``: how many cells each rests on.
    """
    true, predicted = np.asarray(y_true).astype(str), np.asarray(y_pred).astype(str)
    if true.shape != predicted.shape or true.ndim != 1:
        raise ValueError(
            f"y_true and y_pred must be one label per cell; got {true.shape} and {predicted.shape}"
        )
    novel = ~np.isin(true, np.asarray(list(known_labels)).astype(str))
    called = predicted == UNASSIGNED
    right = true == predicted
    return {
        "known_accuracy": _share(right, ~novel),
        "novel_accuracy": _share(novel & called, novel | called),
        "novel_recall": _share(called, novel),
        "novel_precision": _share(novel, called),
        "assigned_accuracy": _share(right, ~called),
        "n_known": int((~novel).sum()),
        "n_novel": int(novel.sum()),
        "n_predicted_novel": int(called.sum()),
    }


def _share(event: np.ndarray, among: np.ndarray) -> float:
    return float(event[among].mean()) if among.any() else float("nan")
