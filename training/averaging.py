"""
What each of several regressions is worth, by cells that it did not learn from, and the average of their logits.

Penalties and shares are chosen by likelihood, in which cells of rare classes weigh more; of penalties that are as good
for these cells, the strongest, which does better on cells of other studies. Then one temperature, by all cells alike,
makes the average as sure as it may be (stacking, Wolpert 1992).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

# penalties, in hundredths of the cells' mean squared norm; the one for cells too few to choose by
PENALTIES = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
DEFAULT_PENALTY = 3.0
# what a stronger penalty than the likeliest may cost of balanced accuracy, and the cells it takes for each unit of it
TOLERANCE, CELLS_A_UNIT = 0.005, 20
# priors, from few labelled cells of other sets: of the log temperature, whose mean falls as the log penalty grows and
# rises with the power, and of the log penalty
LOG_TEMPERATURE_MEAN, LOG_TEMPERATURE_BY_POWER, LOG_TEMPERATURE_BY_PENALTY = -1.3, 0.45, -0.2
LOG_TEMPERATURE_SD, LOG_PENALTY_SD = 0.6, 3.0
# the former's mean, of a regression along pretrained axes: low where they hold at least `ALIKE` of what differs between
# the cells (they are few, and see the types at once), high where the cells are of a kind that was not pretrained on
LOG_TEMPERATURE_ALIKE, LOG_TEMPERATURE_FOREIGN, ALIKE = -1.0, 1.0, 1 / 3
# weight of the shares before any cell speaks, in cells; and that of plain ridge regression where axes that know the
# cells are beside it, which have the rest of the two
SHARES_PRIOR, SHARE_BESIDE_ALIKE = 3.0, 0.1
# where the label is chosen and not the confidence, cells are weighed by this power of one over the cells of their
# class: its share of a reference says little of its share of a query, and a strong penalty would forget rare types
RARENESS = 0.5
# what only chooses is asked of no more cells than these, of each type first of so many: of an atlas nearly all the time
# would go there
MOST_CELLS, CELLS_A_TYPE = 10_000, 50
# of a class that a fold has no cell of
LOWEST_LOGIT = -20.0


@dataclass
class Prior:
    """
    What is thought of a member before any cell speaks.

    Its log temperature is that at the `DEFAULT_PENALTY` (see `expected_temperature`); its share of the average stands
    against those of the others.
    """

    log_temperature: float
    share: float = 1.0


@dataclass
class Mixture:
    """Which penalty each member takes, its share in the average of logits, and the temperatures."""

    places: list[int]
    temperatures: np.ndarray
    shares: np.ndarray
    temperature: float

    @property
    def factors(self) -> np.ndarray:
        """What each member's logits are multiplied by."""
        return self.shares / self.temperatures / self.temperature

    def logits(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """The average of the members' logits, [penalties, cells, classes] each."""
        return sum(
            factor * member[place] for factor, member, place in zip(self.factors, members, self.places)
        )

    def head(self, members: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Weights [classes, genes] and bias [classes] whose logits are the average of the members'."""
        heads = [member.head(place) for member, place in zip(members, self.places)]
        return tuple(sum(factor * part for factor, part in zip(self.factors, parts)) for parts in zip(*heads))


def average_logits(
    members: Sequence[np.ndarray], targets: np.ndarray, folds: np.ndarray, priors: Sequence[Prior]
) -> tuple[np.ndarray, Mixture]:
    """Averaged logits of every cell [cells, classes], chosen without its fold, and what all cells choose."""
    some = some_cells(targets, targets >= 0)

    def choose(among):
        return choose_mixture([member[:, some] for member in members], targets[some], among[some], priors)

    logits = np.full(members[0].shape[1:], LOWEST_LOGIT)
    for fold in np.unique(folds):
        held = folds == fold
        logits[held] = choose(~held).logits([member[:, held] for member in members])
    return logits, choose(targets >= 0)


def some_cells(
    targets: np.ndarray, among: np.ndarray, most: int = MOST_CELLS, a_type: int = CELLS_A_TYPE
) -> np.ndarray:
    """
    At most so many cells at random, bool [cells], of those `among`, bool [cells]: first one of each type,
    then another, up to so many.

    Examples
    --------
    >>> targets = np.repeat([0, 1], [9000, 7])
    >>> np.bincount(targets[some_cells(targets, targets >= 0, 4000, 20)]).tolist()
    [3993, 7]
    """
    drawn = np.random.default_rng(0).permutation(np.flatnonzero(among))
    place_in_type = pd.Series(targets[drawn]).groupby(targets[drawn]).cumcount().to_numpy()
    drawn = drawn[np.argsort(np.minimum(place_in_type, a_type), kind="stable")]
    return np.isin(np.arange(len(targets)), drawn[:most])


def choose_mixture(
    members: Sequence[np.ndarray], targets: np.ndarray, among: np.ndarray, priors: Sequence[Prior]
) -> Mixture:
    """
    Penalties, shares and temperatures by the likelihood of cells that were not learnt from, and a prior.

    What decides the label is chosen by cells that weigh the more the rarer their class is (`RARENESS`); the
    temperature, by all cells alike. Cells of small classes count less in both: a fold without one of two cells says
    little of the fit with both. Where nothing speaks, the penalty is `DEFAULT_PENALTY`, and shares and temperature
    are the prior's. Members are cross-fitted logits [penalties, cells, classes]; the cells `among` choose, bool
    [cells].
    """
    counts = np.bincount(targets, minlength=members[0].shape[-1])
    alike = (counts[targets] - 1) / (counts[targets] + 9)
    cells = np.flatnonzero(among & (alike > 0))
    targets, alike = targets[cells], alike[cells]
    by_rareness = alike * counts[targets] ** -RARENESS
    by_rareness *= alike.sum() / max(by_rareness.sum(), 1e-9)
    # the cost of a penalty is counted by types, not by cells
    balanced = alike / counts[targets]
    chosen = [
        _choose_penalty(logits[:, cells], targets, by_rareness, balanced, prior.log_temperature)
        for prior, logits in zip(priors, members)
    ]
    places, temperatures = zip(*chosen)
    scaled = [member[place][cells] / t for member, place, t in zip(members, places, temperatures)]
    shares = _fit_shares(scaled, targets, by_rareness, np.array([prior.share for prior in priors]))
    mixed = sum(share * logits for share, logits in zip(shares, scaled))
    _, temperature = _fit_temperature(mixed, targets, alike)
    return Mixture(list(places), np.array(temperatures), shares, temperature)


def expected_temperature(power: float) -> float:
    """Mean of the prior of the log temperature, of a regression on genes scaled by this power."""
    return LOG_TEMPERATURE_MEAN + LOG_TEMPERATURE_BY_POWER * power


def _choose_penalty(logits, targets, weights, balanced, start) -> tuple[int, float]:
    """
    Place and temperature of the strongest penalty that costs next to no accuracy, by `balanced`, against the likeliest.

    In-study likelihood is flat over a hundredfold of penalties, and other studies are not: what a weak one learns
    beyond is the study's own (one-standard-error rule, Breiman et al. 1984, with a fixed tolerance). Few cells cannot
    tell what a stronger one costs.
    """
    fits = []
    for place, step in enumerate(np.log(np.array(PENALTIES) / DEFAULT_PENALTY)):
        expected = start + LOG_TEMPERATURE_BY_PENALTY * step
        loss, temperature = _fit_temperature(logits[place], targets, weights, expected, reach=4.0)
        fits.append((loss + (step / LOG_PENALTY_SD) ** 2 / 2, place, temperature))
    _, likeliest, _ = min(fits)
    right = [balanced @ (of_penalty.argmax(axis=1) == targets) for of_penalty in logits]
    enough = right[likeliest] - TOLERANCE * balanced.sum()
    place = next(
        place
        for place, penalty in enumerate(PENALTIES)
        if place == likeliest or (penalty * CELLS_A_UNIT <= len(targets) and right[place] >= enough)
    )
    return place, fits[place][2]


def _fit_temperature(logits, targets, weights, expected=0.0, reach=3.0) -> tuple[float, float]:
    """Loss, with the prior, and temperature where it is least; `expected` is the prior's mean of the logarithm."""

    def loss(x):
        prior = ((x - expected) / LOG_TEMPERATURE_SD) ** 2 / 2
        return _cross_entropy(logits / np.exp(x), targets, weights) + prior

    found = minimize_scalar(loss, bounds=(expected - reach, expected + reach), method="bounded")
    return float(found.fun), float(np.exp(found.x))


def _fit_shares(scaled, targets, weights, prior) -> np.ndarray:
    """Shares of the members in their average, whatever its temperature."""
    prior = prior / prior.sum()

    def loss(x):
        logs, log_temperature = log_softmax(x[:-1]), x[-1]
        mixed = sum(share * logits for share, logits in zip(np.exp(logs), scaled)) / np.exp(log_temperature)
        thought = -SHARES_PRIOR * (prior @ logs) + (log_temperature / LOG_TEMPERATURE_SD) ** 2 / 2
        return _cross_entropy(mixed, targets, weights) + thought

    found = minimize(loss, np.append(np.log(prior), 0.0), method="L-BFGS-B").x
    return np.exp(log_softmax(found[:-1]))


def _cross_entropy(logits, targets, weights) -> float:
    return float(-(weights * log_softmax(logits, axis=1)[np.arange(len(targets)), targets]).sum())
