"""Majority vote: one label for every group of cells."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from ..tokenization import InputError

logger = logging.getLogger(__name__)

LEIDEN = "leiden"
# a group whose winner has a smaller share holds more than one kind of cell
MIXED_SHARE = 0.6
TABLE_COLUMNS = ["group", "label", "cells", "share", "confidence", "runner_up"]
# over-clustering, as celltypist does before its majority vote: small groups of one type each
RESOLUTIONS = ((1_000, 2), (5_000, 5), (20_000, 10), (40_000, 15), (100_000, 20), (200_000, 25), (np.inf, 30))


@dataclass
class Vote:
    """
    Outcome of a majority vote.

    Attributes
    ----------
    labels
        Winning label of each cell's group, [cells]; the cell's own where it has no group.
    shares
        Share of the group's cells that voted for it, [cells]; NaN for cells without a group.
    groups
        The groups, [cells]; -1 without one.
    ties
        Groups whose vote was tied, with the tied labels.
    confidences
        Mean probability that the group's cells give the winning label, [cells]; of a group that stays
        "unassigned" their mean largest probability. NaN for cells without a group.
    table
        One row per group: ``group, label, cells, share, confidence, runner_up`` (the second label, or "").
    """

    labels: np.ndarray
    shares: np.ndarray
    groups: np.ndarray
    ties: dict[str, list[str]]
    confidences: np.ndarray
    table: pd.DataFrame

    @property
    def mixed(self) -> pd.DataFrame:
        """Rows of the groups in which the winner has less than 60% of the cells."""
        return self.table[self.table["share"] < MIXED_SHARE]


def majority_vote(labels: np.ndarray, groups, probabilities: np.ndarray, names: list[str]) -> Vote:
    """
    Give each group the label most of its cells have.

    "unassigned" is a vote like any other: a group whose cells the model does not know stays unassigned. Of tied
    labels the one with the larger summed probability wins, then the earlier one in `names`.

    Parameters
    ----------
    labels
        Label of every cell, [cells].
    groups
        Group of every cell, [cells]; missing values are cells without one.
    probabilities
        [cells, len(names)].
    names
        Labels in the order of the columns.

    Examples
    --------
    >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    >>> majority_vote(np.array(["B", "T", "T"]), [1, 1, 1], probabilities, ["B", "T"]).labels.tolist()
    ['T', 'T', 'T']
    """
    codes, group_names = pd.factorize(pd.Series(groups).reset_index(drop=True))
    labels = np.asarray(labels, dtype=object)
    winners, shares, ties = labels.copy(), np.full(len(labels), np.nan, dtype=np.float32), {}
    confidences, rows_of_table = np.full(len(labels), np.nan, dtype=np.float32), []
    column = {name: index for index, name in enumerate(names)}
    order = np.argsort(codes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        if not len(rows) or codes[rows[0]] < 0:
            continue
        votes = pd.Series(labels[rows]).value_counts()
        tied = [label for label, count in votes.items() if count == votes.iloc[0]]
        sums = probabilities[rows].sum(axis=0, dtype=np.float64)
        # no column stands for "unassigned": it wins only outright
        tied.sort(key=lambda label: (-sums[column[label]], column[label]) if label in column else (1.0, 0))
        group, winner = str(group_names[codes[rows[0]]]), tied[0]
        if len(tied) > 1:
            ties[group] = tied
        winners[rows], shares[rows] = winner, votes.iloc[0] / len(rows)
        of_winner = probabilities[rows][:, column[winner]] if winner in column else probabilities[rows].max(1)
        confidences[rows] = of_winner.mean()
        others = [label for label in votes.index if label != winner]
        second = tied[1] if len(tied) > 1 else (others or [""])[0]
        rows_of_table.append((group, winner, len(rows), shares[rows[0]], confidences[rows[0]], second))
    table = pd.DataFrame(rows_of_table, columns=TABLE_COLUMNS)
    return Vote(winners, shares, codes, ties, confidences, table)


def check_vote(adata: AnnData, key: str | None) -> None:
    """Refuse a grouping that cannot be had, before any computing."""
    if key is None or key in adata.obs:
        return
    if key != LEIDEN:
        raise InputError(
            f"--majority-vote: there is no column {key!r} in obs; it has: {', '.join(map(str, adata.obs)) or 'none'}. "
            "Name one of them, or use 'leiden' to group the cells by their own neighbourhoods."
        )
    # found missing here rather than after the model has run; the command line names the extra to install
    import igraph  # noqa: F401
    import leidenalg  # noqa: F401
    import scanpy  # noqa: F401


def leiden_groups(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Fine Leiden clusters of cells, [cells] of strings.

    Parameters
    ----------
    vectors
        A representation of the cells, [cells, features].
    """
    import scanpy

    n_cells = len(vectors)
    if n_cells < 3:
        return np.full(n_cells, "0", dtype=object)
    cells = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(n_cells)]), obsm={"vectors": vectors})
    resolution = next(value for limit, value in RESOLUTIONS if n_cells < limit)
    neighbors = min(10, n_cells - 1)
    scanpy.pp.neighbors(cells, n_neighbors=neighbors, use_rep="vectors", random_state=seed)
    scanpy.tl.leiden(
        cells, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=2, directed=False
    )
    logger.info("Leiden: %d groups at resolution %d.", cells.obs["leiden"].nunique(), resolution)
    return cells.obs["leiden"].astype(str).to_numpy()
