"""
A head that is solved for: penalised logistic regression on what the encoder says of every gene, cross-fitted.

The features of a cell are one number per gene (its expression bin, read along the arc that the embeddings of the bins
lie on). Several ridge-penalised multinomial regressions see them, which differ in one thing: how much the penalty
spares the genes that tell the classes apart. With r the ratio of a gene's variance between classes to that within
them, a gene is scaled by r^(power / 2) before the fit; power 0 is plain ridge regression, power 1 comes close to a
choice of genes. Another goes along pretrained axes, if there are any. What each is worth is measured on cells that it
did not learn from, and their logits are averaged accordingly (stacking, Wolpert 1992); where the axes hold much of what
differs between the cells, plain ridge regression has to earn its share. All are linear in the same features, so the
average is one head.

Every labelled cell is learnt from in the end: the folds only choose penalties, shares and temperature, and give the
logits that scores are taken from.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import scipy.sparse as sp
from joblib import Parallel, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from .averaging import (
    ALIKE,
    LOG_TEMPERATURE_ALIKE,
    LOG_TEMPERATURE_FOREIGN,
    LOWEST_LOGIT,
    MOST_CELLS,
    PENALTIES,
    RARENESS,
    SHARE_BESIDE_ALIKE,
    Mixture,
    Prior,
    average_logits,
    expected_temperature,
    some_cells,
)
from .principal_axes import MANY_CELLS, Axes, axes_of_cells

POWERS = (0.0, 0.5, 1.0)
PRETRAINED = "pretrained axes"
# genes that a scaled fit sees, and axes of them: beyond these, scales are so small that they only cost time
# (half as many where there are many cells)
SCALED_GENES = 4000
SCALED_RANK = 256
# the intercept is penalised as the weight of a feature of this size (in root mean squared norms, times the root of the
# cells a class): of few cells, free intercepts learn which cells happen to be small
INTERCEPT_SIZE = 0.1
# the limit on threads is the process's: one who sets it while another has would never see it undone
ONE_AT_A_TIME = threading.Lock()


@dataclass
class SolvedHead:
    """
    What `solve_head` found.

    The output layer's weights are float32 [classes, features], the bias [classes]; the temperature that the averaged
    logits were divided by is in them. The logits are of every cell, float64 [cells, classes], by fits, shares and a
    temperature that it had no part in. Shares and penalties are those of each member of the average, by its name.
    """

    weights: np.ndarray
    bias: np.ndarray
    logits: np.ndarray
    shares: dict[str, float] = field(default_factory=dict)
    penalties: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0


@dataclass
class PretrainedAxes:
    """
    Coordinates of all cells along axes that were found elsewhere, and the share of what differs between the cells that
    these hold, None where it cannot be measured.
    """

    axes: Axes
    signal: float | None


def solve_head(
    features: sp.csr_matrix, targets: np.ndarray, n_classes: int, folds: np.ndarray, **options: Any
) -> SolvedHead:
    """
    Solve for the weights of a linear head, and cross-fit the logits of the cells it is solved on.

    Features are one number per gene, 0 where it is not expressed, [cells, genes]; targets the classes from 0, of which
    one cell each is enough; folds as of `cross_folds`; options, those of `fit_members`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> targets = np.arange(60) % 3
    >>> features = sp.csr_matrix(rng.poisson(1 + 3 * np.eye(3)[targets] @ np.eye(3, 20)).astype(np.float32))
    >>> head = solve_head(features, targets, 3, cross_folds(targets))
    >>> head.weights.shape, bool((head.logits.argmax(axis=1) == targets).mean() > 0.8)
    ((3, 20), True)
    """
    return average(fit_members(features, targets, n_classes, folds, **options), targets, folds)


def fit_members(
    features: sp.csr_matrix,
    targets: np.ndarray,
    n_classes: int,
    folds: np.ndarray,
    axes: Axes | None = None,
    powers: Sequence[float] = POWERS,
    on_fit: Callable[[], Any] = lambda: None,
    pretrained: PretrainedAxes | None = None,
    effects: np.ndarray | None = None,
) -> list["Member"]:
    """
    The regressions that `solve_head` averages.

    Axes are given if `axes_of_cells` of the features are known already. For each of the powers one regression is in the
    average, ``(0.0,)`` is ridge regression alone; one more goes along pretrained axes. The regressions are kept from
    leaning on the directions `effects`, in units of the features, [n, genes] (see `principal_axes.Damping`), along
    which axes that are given are damped already. `on_fit` is called after each of the `n_fits`, for a progress bar.
    """
    axes = axes_of_cells(features, effects=effects) if axes is None else axes
    members = [
        cross_fit(features, targets, n_classes, folds, power, axes, on_fit, effects) for power in powers
    ]
    if pretrained is None:
        return members
    prior = Prior(LOG_TEMPERATURE_FOREIGN)
    # where the cells are of a kind that the axes know
    if pretrained.signal is not None and pretrained.signal >= ALIKE:
        prior = Prior(LOG_TEMPERATURE_ALIKE, 2 - SHARE_BESIDE_ALIKE)
        for member in members:
            if member.name == name_of(0):
                member.prior.share = SHARE_BESIDE_ALIKE
    along = cross_fit(features, targets, n_classes, folds, 0.0, pretrained.axes, on_fit)
    return [*members, replace(along, name=PRETRAINED, prior=prior)]


def name_of(power: float) -> str:
    """Name of the regression on genes scaled by this power."""
    return f"genes, power {power:g}"


def average(members: Sequence["Member"], targets: np.ndarray, folds: np.ndarray) -> SolvedHead:
    """One head of several regressions, each with the share that it is worth out of fold."""
    priors = [member.prior for member in members]
    logits, mixture = average_logits([member.logits for member in members], targets, folds, priors)
    # of many cells, the fits that waited for their penalty
    side_by_side(delayed(member.path.__getitem__)(place) for member, place in zip(members, mixture.places))
    return as_head(*mixture.head(members), logits, members, mixture)


def as_head(
    weights: np.ndarray, bias: np.ndarray, logits: np.ndarray, members: Sequence["Member"], mixture: Mixture
) -> SolvedHead:
    """A head with the names of those whose mixture it is."""
    names = [member.name for member in members]
    shares = dict(zip(names, mixture.shares.tolist()))
    penalties = {name: PENALTIES[place] for name, place in zip(names, mixture.places)}
    weights, bias = weights.astype(np.float32), bias.astype(np.float32)
    return SolvedHead(weights, bias, logits, shares, penalties, mixture.temperature)


def cross_folds(targets: np.ndarray, n_folds: int = 5, seed: int = 0) -> np.ndarray:
    """
    A fold for every cell, [cells]: each class is spread over them as evenly as it goes.

    Examples
    --------
    >>> np.bincount(cross_folds(np.zeros(11, dtype=int))).tolist()
    [3, 2, 2, 2, 2]
    """
    rng, folds = np.random.default_rng(seed), np.zeros(len(targets), dtype=np.int64)
    for number, name in enumerate(np.unique(targets)):
        cells = rng.permutation(np.flatnonzero(targets == name))
        # the classes' remainders go to different folds
        folds[cells] = (np.arange(len(cells)) + number) % n_folds
    return folds


def n_fits(folds: np.ndarray, pretrained: PretrainedAxes | None = None) -> int:
    """How many fits `solve_head` makes at most with these folds, each penalty counted."""
    return (len(POWERS) + (pretrained is not None)) * (len(np.unique(folds)) + 1) * len(PENALTIES)


class RegularizationPath:
    """Coefficients and biases with one penalty after another, each found, and told of, when it is asked for."""

    def __init__(self, solutions: Iterator[tuple[np.ndarray, np.ndarray]], on_fit: Callable[[], Any]):
        self._found, self._others, self._on_fit = [], solutions, on_fit

    def __getitem__(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        for found in islice(self._others, max(0, place + 1 - len(self._found))):
            self._found.append(found)
            self._on_fit()
        return self._found[place]


def side_by_side(fits: Iterable[Any]) -> list[Any]:
    """Results of fits (`joblib.delayed`), each on a core of its own."""
    with ONE_AT_A_TIME, threadpool_limits(1), warnings.catch_warnings():
        # the weakest penalties may stop short of the end; held-out cells judge what they found
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Parallel(n_jobs=os.cpu_count(), prefer="threads")(fits)


@dataclass
class Member:
    """
    One regression of the average.

    Logits [penalties, cells, classes] of cells not learnt from; axes and path of a fit on all that have labels; its
    name, and what is thought of it before any cell speaks.
    """

    logits: np.ndarray
    axes: Axes
    path: RegularizationPath
    name: str
    prior: Prior

    def head(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights [classes, genes] and bias [classes] with one of the penalties."""
        return self.axes.gene_weights(*self.path[place])


def cross_fit(
    features: sp.csr_matrix,
    targets: np.ndarray,
    n_classes: int,
    folds: np.ndarray,
    power: float,
    axes: Axes,
    on_fit: Callable[[], Any] = lambda: None,
    effects: np.ndarray | None = None,
) -> Member:
    """
    A regression for every penalty, on all folds but one in turn and on all.

    Of all folds but one, `MOST_CELLS` are learnt from at most; where there are more, the regression on all waits for
    its penalty. Cells of fold -1 have no label: nothing is learnt from them, and their logits are those of the fit on
    all others.
    """

    def fit(learnt):
        # axes of plain ridge regression know no labels: one set serves all folds
        space = axes if power == 0 else scaled_axes(features, targets, learnt, power, effects)
        path = RegularizationPath(ridge_path(space.coordinates[learnt], targets[learnt], n_classes), on_fit)
        if learnt.sum() <= MOST_CELLS or not labelled.all():
            list(path)
        return space, path

    labelled = folds >= 0
    held = [folds == fold for fold in np.unique(folds[labelled])]
    learnt = [some_cells(targets, labelled & ~mask) for mask in held]
    fitted = side_by_side(delayed(fit)(cells) for cells in [*learnt, labelled])
    logits = np.full((len(PENALTIES), len(folds), n_classes), LOWEST_LOGIT)
    for mask, (space, path) in zip([*held, ~labelled], fitted):
        if mask.any():
            for place, (coefficients, bias) in enumerate(path):
                logits[place, mask] = space.coordinates[mask] @ coefficients.T + bias
    return Member(logits, *fitted[-1], name_of(power), Prior(expected_temperature(power)))


def scaled_axes(
    features: sp.csr_matrix,
    targets: np.ndarray,
    learnt: np.ndarray,
    power: float,
    effects: np.ndarray | None = None,
) -> Axes:
    """Axes of (some of) the cells `learnt` from, bool [cells], on genes scaled by what these cells say of them."""
    n_genes = SCALED_GENES if learnt.sum() <= MANY_CELLS else SCALED_GENES // 2
    scales = gene_scales(features[learnt], targets[learnt], power, n_genes)
    kept = np.flatnonzero(scales)
    narrow = features[:, kept].multiply(scales[kept]).tocsr()
    rank = SCALED_RANK if learnt.sum() > SCALED_RANK else None
    damped = None if effects is None else effects[:, kept] * scales[kept]
    return axes_of_cells(narrow, some_cells(targets, learnt), rank, damped).widened(kept, scales)


def gene_scales(
    features: sp.csr_matrix, targets: np.ndarray, power: float, n_genes: int = SCALED_GENES
) -> np.ndarray:
    """
    What each gene is multiplied by before a fit, float32 [genes], at most 1; zero below the `n_genes` largest.

    r is the ratio of mean squares between and within classes, the latter moderated by its median over the genes, so
    that few cells do not make a gene sure by chance (as limma moderates variances, Smyth 2004). Of one cell a class
    there is no variance within, and r is the variance between.

    Examples
    --------
    >>> features = sp.csr_matrix(np.array([[0, 1.0], [0, 2.0], [5, 1.0], [5, 2.0]]))
    >>> scales = gene_scales(features, np.array([0, 0, 1, 1]), 1.0)
    >>> bool(scales[0] > scales[1])
    True
    """
    classes, index, counts = np.unique(targets, return_inverse=True, return_counts=True)
    membership = sp.csr_matrix((np.ones(len(targets)), (index, np.arange(len(targets)))))
    means = (membership @ features).toarray() / counts[:, None]
    overall = counts @ means / counts.sum()
    between = counts @ (means - overall) ** 2 / max(1, len(classes) - 1)
    if len(targets) > len(classes):
        squares = np.asarray(features.multiply(features).sum(axis=0)).ravel()
        within = np.maximum(squares - counts @ means**2, 0) / (len(targets) - len(classes))
        between /= within + np.median(within[within > 0]) if (within > 0).any() else 1.0
    scales = between ** (power / 2)
    scales[np.argsort(-scales, kind="stable")[n_genes:]] = 0
    largest = scales.max(initial=0)
    return (scales / largest if largest else np.ones_like(scales)).astype(np.float32)


def ridge_path(
    coordinates: np.ndarray, targets: np.ndarray, n_classes: int, penalties: Sequence[float] = PENALTIES
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Multinomial logistic regression with one penalty after another, each begun where the last one ended.

    Cells weigh the more the rarer their class is (`averaging.RARENESS`); the mean cell weighs 1. Penalties are in
    hundredths of the mean squared norm of the coordinates [cells, rank]. For each there are coefficients
    [classes, rank] and bias [classes]; a class without a cell has `LOWEST_LOGIT` as bias.
    """
    seen = np.unique(targets)
    if len(seen) == 1:
        sure = np.full(n_classes, LOWEST_LOGIT)
        sure[seen] = 0
        yield from [(np.zeros((n_classes, coordinates.shape[1])), sure)] * len(penalties)
        return
    unit = float((coordinates.astype(np.float64) ** 2).sum(axis=1).mean()) / 100 or 1.0
    size = INTERCEPT_SIZE * (100 * unit * len(targets) / len(seen)) ** 0.5
    features = np.column_stack([coordinates, np.full(len(targets), size, dtype=coordinates.dtype)])
    weights = np.bincount(targets)[targets] ** -RARENESS
    weights *= len(targets) / weights.sum()
    model = LogisticRegression(fit_intercept=False, max_iter=300, tol=1e-3, warm_start=True)
    for penalty in penalties:
        model.set_params(C=1 / (penalty * unit)).fit(features, targets, sample_weight=weights)
        rows, bias = model.coef_[:, :-1].astype(np.float64), model.coef_[:, -1].astype(np.float64) * size
        if len(rows) == 1:
            # two classes: the logit of the second against the first
            rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
        coefficients, all_bias = np.zeros((n_classes, rows.shape[1])), np.full(n_classes, LOWEST_LOGIT)
        coefficients[seen], all_bias[seen] = rows, bias
        yield coefficients, all_bias
