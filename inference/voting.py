"""Majority vote: one label for every group of cells."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.disk_matrix import DiskMatrix
from ..data.labels import UNASSIGNED
from ..data.read import row_blocks
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
    """Outcome of a majority vote."""

    # winning label of each cell's group, [cells]; the cell's own where it has no group
    labels: pd.Categorical
    # share of the group's cells that voted for it, [cells]; NaN for cells without a group
    shares: np.ndarray
    # number of the group, [cells]; -1 without one
    groups: np.ndarray
    # groups whose vote was tied, with the tied labels
    ties: dict[str, list[str]]
    # mean probability that the group's cells give the winning label, [cells]; of a group that stays "unassigned" their
    # mean largest probability; NaN for cells without a group
    confidences: np.ndarray
    # one row per group, its `runner_up` the second label, or ""
    table: pd.DataFrame

    @property
    def mixed(self) -> pd.DataFrame:
        """Rows of the groups in which the winner has less than 60% of the cells."""
        return self.table[self.table["share"] < MIXED_SHARE]


def majority_vote(
    labels: np.ndarray | pd.Categorical, groups, probabilities: np.ndarray | DiskMatrix, names: list[str]
) -> Vote:
    """
    Give each group the label most of its cells have.

    "unassigned" is a vote like any other: a group whose cells the model does not know stays unassigned. Of tied
    labels the one with the larger summed probability wins, then the earlier one in `names`, which are in the order of
    the columns of `probabilities` [cells, labels]. A cell whose group [cells] is missing has none.

    Examples
    --------
    >>> probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    >>> majority_vote(np.array(["B", "T", "T"]), [1, 1, 1], probabilities, ["B", "T"]).labels.tolist()
    ['T', 'T', 'T']
    """
    groups, group_names = pd.factorize(pd.Series(groups))
    order = list(dict.fromkeys([*names, UNASSIGNED]))
    own = pd.Categorical(labels, categories=order).codes
    votes, sums, sure = _tally(groups, own, probabilities, len(group_names), len(order))
    column = {name: index for index, name in enumerate(names)}
    winners, rows, ties = np.zeros(len(group_names), dtype=own.dtype), [], {}
    for index, group in enumerate(map(str, group_names)):
        # no column stands for "unassigned": it wins only outright
        weights = [(-sums[index, column[name]], column[name]) if name in column else (1, 0) for name in order]
        ranked = sorted(np.flatnonzero(votes[index]), key=lambda i: (-votes[index, i], *weights[i]))
        winner, n_cells = ranked[0], votes[index].sum()
        winners[index] = winner
        tied = [order[i] for i in ranked if votes[index, i] == votes[index, winner]]
        if len(tied) > 1:
            ties[group] = tied
        of_winner = sums[index, column[order[winner]]] if order[winner] in column else sure[index]
        second = order[ranked[1]] if len(ranked) > 1 else ""
        share, confidence = votes[index, winner] / n_cells, of_winner / n_cells
        rows.append((group, order[winner], n_cells, np.float32(share), np.float32(confidence), second))
    table = pd.DataFrame(rows, columns=TABLE_COLUMNS)
    # cells without a group, whose number is -1, take what stands last
    shares, confidences = (
        np.append(table[name].to_numpy(np.float32), np.float32(np.nan))[groups]
        for name in ("share", "confidence")
    )
    codes = np.where(groups < 0, own, np.append(winners, winners.dtype.type(0))[groups])
    labels = pd.Categorical.from_codes(codes, order).remove_unused_categories()
    return Vote(labels, shares, groups, ties, confidences, table)


def _tally(groups, own, probabilities, n_groups, n_labels):
    """Votes [groups, labels], summed probabilities [groups, columns], summed largest probabilities [groups]."""
    votes = np.zeros((n_groups, n_labels), dtype=np.int64)
    sums, sure = np.zeros((n_groups, probabilities.shape[1])), np.zeros(n_groups)
    for block in row_blocks(len(own)):
        voters = np.flatnonzero(groups[block] >= 0)
        group, values = groups[block][voters], probabilities[block][voters]
        np.add.at(votes, (group, own[block][voters]), 1)
        np.add.at(sums, group, values)
        np.add.at(sure, group, values.max(axis=1))
    return votes, sums, sure


def vote_notes(vote: Vote) -> list[str]:
    """What the user should know of tied and mixed groups, and of cells without one."""
    notes = []
    if vote.ties:
        shown = "; ".join(f"{group}: {' = '.join(tied)}" for group, tied in list(vote.ties.items())[:5])
        notes.append(
            f"{len(vote.ties)} group(s) had a tied vote, won by the label of larger summed probability, the first "
            f"named ({shown}{'; ...' if len(vote.ties) > 5 else ''})."
        )
    if len(vote.mixed):
        shown = "; ".join(
            f"{row.group}: {row.label} {row.share:.0%}, then {row.runner_up}"
            for row in vote.mixed.head(5).itertuples()
        )
        notes.append(
            f"Mixed groups, whose commonest type has less than {MIXED_SHARE:.0%} of the cells: {len(vote.mixed)} of "
            f"{len(vote.table)} ({shown}{'; ...' if len(vote.mixed) > 5 else ''})."
        )
    alone = int((vote.groups < 0).sum())
    if alone:
        notes.append(f"{alone} cell(s) belong to no group and keep their own label in the majority vote.")
    return notes


def check_vote(adata: AnnData, key: str) -> None:
    """Refuse a grouping that cannot be had, before any computing."""
    if key in list(adata.obs):
        return
    if key != LEIDEN:
        raise InputError(
            f"There is no column {key!r} in obs to vote by; it has: {', '.join(map(str, adata.obs)) or 'none'}. "
            "Name one of them, or 'leiden' for clusters of the expression."
        )
    # found missing here rather than after the model has run; the command line names the extra to install
    import igraph  # noqa: F401
    import leidenalg  # noqa: F401
    import scanpy  # noqa: F401


def leiden_groups(vectors: np.ndarray) -> np.ndarray:
    """Fine Leiden clusters, [cells] of strings, of cells by their vectors [cells, features]."""
    import scanpy

    n_cells = len(vectors)
    if n_cells < 3:
        return np.full(n_cells, "0", dtype=object)
    cells = AnnData(obs=pd.DataFrame(index=[str(i) for i in range(n_cells)]), obsm={"vectors": vectors})
    resolution = next(value for limit, value in RESOLUTIONS if n_cells < limit)
    neighbors = min(10, n_cells - 1)
    scanpy.pp.neighbors(cells, n_neighbors=neighbors, use_rep="vectors", random_state=0)
    scanpy.tl.leiden(
        cells, resolution=resolution, random_state=0, flavor="igraph", n_iterations=2, directed=False
    )
    logger.info("Leiden: %d groups at resolution %d.", cells.obs["leiden"].nunique(), resolution)
    return cells.obs["leiden"].astype(str).to_numpy()
