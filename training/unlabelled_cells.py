"""
What cells without labels teach: a head for them as well, where a few labelled cells would leave too much open.

Several ways to use the cells that are asked for are known, and none is safe alone. Here they are members of an average
of regressions, as in `logistic_head`, each with the share that it is worth on labelled cells it did not learn from:

- expression averaged over a cell's neighbours, labelled or not, and what tells the types apart in it;
- few principal axes of all cells;
- the genes as they are, and pretrained axes, which need no other cells.

The averaged probabilities are then handed on: a regression on the genes learns the labelled cells and those of the
others that the average is sure of (self-training, with the average as the teacher), and its weights are averaged with
those of the labelled cells alone, which dampens what a wrong teacher does. So the model stays what it is without them,
one weight for a gene and type, and answers for a cell no matter which others it comes with.

Where the two kinds of cells can be told apart (another protocol, cells and nuclei), neighbours are looked for among
cells of the same kind only. Where held-out labelled cells were worse off with all this, by more than a standard error,
it is left; so it is where no cell can be held out, one of a type, and the members contradict each other. A member that
contradicts all others counts little then.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from joblib import delayed
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestNeighbors

from .averaging import PENALTIES, average_logits
from .logistic_head import (
    PRETRAINED,
    Member,
    PretrainedAxes,
    SolvedHead,
    as_head,
    average,
    cross_fit,
    fit_members,
    name_of,
    ridge_path,
    scaled_axes,
    side_by_side,
)
from .principal_axes import Axes, axes_of_cells, most_variable

# of the averaged members: powers of the gene scales of smoothed cells, numbers of axes, name of the one on the genes
SMOOTHED_POWERS, AXES, GENES = (0.5, 1.0), (20, 10), name_of(0.5)
# axes that neighbours are looked for in, neighbours of a cell, and genes that are averaged over them
NEIGHBOUR_AXES, NEIGHBOURS, SMOOTHED_GENES = 50, 15, 3000
# area under the curve from which two kinds of cells count as different, and cells of each that are looked at
TOLD_APART, COMPARED_CELLS = 0.95, 2000
# cells that are handed on, and the penalty and power of the regression that learns them
SURE, HANDED_ON_PENALTY, HANDED_ON_POWER = 0.5, 30.0, 0.5
# share of the labelled cells' own head in the end, where one of a type can be held out and where none can
OWN_SHARE, OWN_SHARE_UNJUDGED = 0.5, 0.25
# where none can: the share of cells, in the mean over pairs of members, that both must give one type; and how much more
# a member counts that agrees with the others (log share; experts without labels, Parisi et al. 2014)
AGREED, CONSENSUS = 0.65, 10.0
# the former with two types: of noise, members agree on as many as 0.70
AGREED_ON_TWO = 0.72
# a larger query is drawn from: more cells of it teach little more
MAX_CELLS = 10_000


def n_fits(folds: np.ndarray) -> int:
    """How many fits `learn_from_all` makes beyond those of `logistic_head.solve_head`."""
    return (len(SMOOTHED_POWERS) + len(AXES)) * (len(np.unique(folds)) + 1) * len(PENALTIES)


def learn_from_all(
    features: sp.csr_matrix,
    targets: np.ndarray,
    unlabelled: sp.csr_matrix,
    n_classes: int,
    folds: np.ndarray,
    axes: Axes | None = None,
    on_fit: Callable[[], Any] = lambda: None,
    pretrained: PretrainedAxes | None = None,
    effects: np.ndarray | None = None,
) -> tuple[SolvedHead, dict[str, Any]]:
    """
    As `logistic_head.solve_head`, with features of cells that have no label, [others, genes].

    The head's logits are of the average and of the labelled cells' own head, by fits that knew the label of the cell in
    no way; its shares are the members' of the average. The report has ``told_apart``, the area under the curve of
    telling the two kinds of cells apart; ``neighbours``, "all" or "own"; ``gain`` of log-likelihood per held-out cell,
    with its standard ``error`` (None where there is no cell to tell by); ``agreement`` of the members on the other
    cells; and ``own_share`` of the labelled cells' own head in the one that is returned.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> types = np.arange(300) % 3
    >>> cells = sp.csr_matrix(rng.poisson(1 + 2 * np.eye(3)[types] @ np.eye(3, 20)).astype(np.float32))
    >>> head, report = learn_from_all(cells[:9], types[:9], cells[9:], 3, np.arange(9) // 3)
    >>> found = (cells[9:] @ head.weights.T + head.bias).argmax(axis=1)
    >>> bool((found == types[9:]).mean() > 0.6), report["neighbours"]
    (True, 'all')
    """
    if unlabelled.shape[0] > MAX_CELLS:
        drawn = np.random.default_rng(0).permutation(unlabelled.shape[0])[:MAX_CELLS]
        unlabelled = unlabelled[np.sort(drawn)]
    prior = {"pretrained": pretrained, "effects": effects}
    alone = fit_members(features, targets, n_classes, folds, axes, on_fit=on_fit, **prior)
    without = average(alone, targets, folds)
    members, told_apart = fit_teachers(features, targets, unlabelled, n_classes, folds, on_fit)
    also = [member for member in alone if member.name in (GENES, PRETRAINED)]
    # of many cells these fits wait
    side_by_side(delayed(list)(member.path) for member in also)
    members += [_of_all(member, unlabelled) for member in also]
    # plain ridge regression is not among these, whose share the pretrained axes have beside it
    n_labelled, priors = len(targets), [replace(member.prior, share=1.0) for member in members]
    known = [member.logits[:, :n_labelled] for member in members]
    asked = [member.logits[:, n_labelled:] for member in members]
    logits, mixture = average_logits(known, targets, folds, priors)
    own_share = OWN_SHARE if (np.bincount(targets) > 1).any() else OWN_SHARE_UNJUDGED
    logits = (1 - own_share) * log_softmax(logits, axis=1) + own_share * log_softmax(without.logits, axis=1)
    gain, error = likelihood_gain(without.logits, logits, targets)
    agreement = agreement_of([member[place].argmax(axis=1) for member, place in zip(asked, mixture.places)])
    if gain is None:
        # the others' word is all there is to go by
        mixture.shares = softmax(CONSENSUS * agreement)
    needed = AGREED_ON_TWO if n_classes == 2 else AGREED
    report = {
        "cells": unlabelled.shape[0],
        "told_apart": told_apart,
        "neighbours": "own" if told_apart > TOLD_APART else "all",
        "gain": gain,
        "error": error,
        "agreement": float(agreement.mean()),
        "own_share": own_share,
        "kept": bool(agreement.mean() > needed if gain is None else gain > -error),
    }
    if not report["kept"]:
        return without, report
    probabilities = softmax(mixture.logits(asked), axis=1)
    weights, bias = handed_on(features, targets, unlabelled, probabilities, n_classes, effects)
    weights = (1 - own_share) * weights + own_share * without.weights
    bias = (1 - own_share) * bias + own_share * without.bias
    return as_head(weights, bias, logits, members, mixture), report


def fit_teachers(
    features: sp.csr_matrix,
    targets: np.ndarray,
    unlabelled: sp.csr_matrix,
    n_classes: int,
    folds: np.ndarray,
    on_fit: Callable[[], Any] = lambda: None,
) -> tuple[list[Member], float]:
    """
    The regressions that need the other cells, and how well these can be told from the labelled ones (`two_sample_auc`).

    Their logits are of all cells, the labelled ones first.
    """
    cells, n_labelled = sp.vstack([features, unlabelled]).tocsr(), len(targets)
    joint = axes_of_cells(cells, rank=NEIGHBOUR_AXES)
    told_apart = two_sample_auc(joint.coordinates[:, : AXES[0]], n_labelled)
    most = max(0, min(NEIGHBOURS, n_labelled // (2 * n_classes)))
    n_first = n_labelled if told_apart > TOLD_APART else None
    smooth = neighbour_means(cells, joint.coordinates, n_first, most)
    all_targets, all_folds = (np.append(a, np.full(unlabelled.shape[0], -1)) for a in (targets, folds))
    members = []
    for power in SMOOTHED_POWERS:
        member = cross_fit(smooth, all_targets, n_classes, all_folds, power, joint, on_fit)
        members.append(replace(member, name=f"neighbours, power {power:g}"))
    for rank in AXES:
        member = cross_fit(cells, all_targets, n_classes, all_folds, 0.0, joint.first(rank), on_fit)
        members.append(replace(member, name=f"{rank} axes"))
    return members, told_apart


def _of_all(member: Member, unlabelled: sp.csr_matrix) -> Member:
    """A member whose logits are of the labelled cells, and behind them of others, [penalties, all cells, classes]."""
    heads = [member.head(place) for place in range(len(PENALTIES))]
    others = np.stack([unlabelled @ weights.T + bias for weights, bias in heads])
    return replace(member, logits=np.concatenate([member.logits, others], axis=1))


def two_sample_auc(coordinates: np.ndarray, n_first: int) -> float:
    """
    How well a linear classifier tells the first cells from the others, cross-validated: 0.5 not at all, 1 always.

    By coordinates of all cells along few axes, [cells, axes].

    Examples
    --------
    >>> cells = np.random.default_rng(0).normal(size=(400, 3))
    >>> two_sample_auc(cells, 200) < 0.65, two_sample_auc(cells + 9 * (np.arange(400)[:, None] < 200), 200) > 0.99
    (True, True)
    """
    rng = np.random.default_rng(0)
    kinds = [np.arange(n_first), np.arange(n_first, len(coordinates))]
    cells = np.concatenate([rng.permutation(kind)[:COMPARED_CELLS] for kind in kinds])
    first = cells < n_first
    n_folds = min(4, first.sum(), (~first).sum())
    if n_folds < 2:
        return 0.5
    model = LogisticRegression(class_weight="balanced", max_iter=300)
    scale = coordinates.std(axis=0).max() or 1.0
    scores = cross_val_predict(
        model, coordinates[cells] / scale, first, cv=n_folds, method="decision_function"
    )
    return float(roc_auc_score(first, scores))


def neighbour_means(
    cells: sp.csr_matrix, coordinates: np.ndarray, n_first: int | None = None, n_neighbours: int = NEIGHBOURS
) -> sp.csr_matrix:
    """
    Each cell's mean with its neighbours, of the most variable genes; the others are 0.

    Neighbours are looked for in the coordinates [cells, axes] of the cells [cells, genes]. Given `n_first`, so many
    cells and the others have neighbours among themselves only, of the first, who may be few, `n_neighbours`; else
    `NEIGHBOURS`.

    Examples
    --------
    >>> cells = sp.csr_matrix(np.array([[0.0], [2.0], [9.0], [11.0]]))
    >>> means = neighbour_means(cells, cells.toarray(), n_first=2, n_neighbours=1)
    >>> means.toarray().ravel().tolist()
    [1.0, 1.0, 10.0, 10.0]
    """
    kept = most_variable(cells, SMOOTHED_GENES)
    if n_first is None:
        graph = _neighbour_graph(coordinates, NEIGHBOURS)
    else:
        parts = (coordinates[:n_first], n_neighbours), (coordinates[n_first:], NEIGHBOURS)
        graph = sp.block_diag([_neighbour_graph(*part) for part in parts])
    graph = sp.diags(1 / np.asarray(graph.sum(axis=1)).ravel()) @ graph
    smooth = graph.tocsr() @ cells[:, kept]
    return sp.csr_matrix(
        (smooth.data.astype(np.float32), kept[smooth.indices], smooth.indptr), shape=cells.shape
    )


def _neighbour_graph(coordinates, n_neighbours) -> sp.csr_matrix:
    """Ones for a cell's neighbours and itself."""
    n_neighbours = min(n_neighbours, len(coordinates) - 1)
    itself = sp.eye(len(coordinates), format="csr")
    if n_neighbours < 1:
        return itself
    return NearestNeighbors(n_neighbors=n_neighbours).fit(coordinates).kneighbors_graph() + itself


def likelihood_gain(
    before: np.ndarray, after: np.ndarray, targets: np.ndarray
) -> tuple[float | None, float | None]:
    """Mean gain in log-likelihood of the cells whose type has others, and its standard error; None of one or none."""
    judged = np.flatnonzero(np.bincount(targets)[targets] > 1)
    if len(judged) < 2:
        return None, None
    gains = [
        log_softmax(logits[judged], axis=1)[np.arange(len(judged)), targets[judged]]
        for logits in (before, after)
    ]
    difference = gains[1] - gains[0]
    return float(difference.mean()), float(difference.std(ddof=1) / len(judged) ** 0.5)


def agreement_of(types: Sequence[np.ndarray]) -> np.ndarray:
    """
    Share of the cells that a member gives the type that another does, in the mean over the others, [members].

    By what each member says, [cells].

    Examples
    --------
    >>> agreement_of([np.array([0, 1]), np.array([0, 1]), np.array([0, 2])])
    array([0.75, 0.75, 0.5 ])
    """
    alike = np.array([[np.mean(one == other) for other in types] for one in types])
    return (alike.sum(axis=1) - 1) / (len(types) - 1)


def handed_on(
    features: sp.csr_matrix,
    targets: np.ndarray,
    unlabelled: sp.csr_matrix,
    probabilities: np.ndarray,
    n_classes: int,
    effects: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """
    A head on the genes that learns the labelled cells, and of the others those that the probabilities are sure of.

    Its temperature is the one that comes closest to these, [others, classes]. Weights are float32 [classes, genes], the
    bias [classes]; the effects are those of `learn_from_all`.
    """
    sure = probabilities.max(axis=1) > SURE
    cells = sp.vstack([features, unlabelled[sure]]).tocsr()
    labels = np.append(targets, probabilities[sure].argmax(axis=1))
    axes = scaled_axes(cells, labels, np.ones(len(labels), dtype=bool), HANDED_ON_POWER, effects)
    (fit,) = ridge_path(axes.coordinates, labels, n_classes, (HANDED_ON_PENALTY,))
    weights, bias = axes.gene_weights(*fit)
    logits = unlabelled @ weights.T + bias

    def loss(log_temperature):
        return -(probabilities * log_softmax(logits / np.exp(log_temperature), axis=1)).sum()

    temperature = np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x)
    return (weights / temperature).astype(np.float32), (bias / temperature).astype(np.float32)
