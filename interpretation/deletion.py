"""The deletion test: an explanation is to be trusted if removing its genes hurts more than removing random ones."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..trained_model.prediction import LoadedModel, predict_cells

# draws of random genes that are averaged
N_RANDOM = 3
COLUMNS = ["explanation", "genes_removed", "margin", "drop", "random_drop", "ratio", "cells_hurt_more"]


def deletion_test(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    targets: np.ndarray,
    explanations: Mapping[str, np.ndarray],
    n_genes: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """
    Fall of the target's margin when a cell loses its top genes, beside losing as many random ones.

    The margin is the target's logit over the best other logit: unlike a probability near 1 it cannot hide a loss.

    `explanations` are name -> scores [cells, panel]; a cell loses its `n_genes` expressed genes of the highest score,
    or all it expresses where there are fewer. The table has a row per explanation: mean ``margin`` of the whole cells,
    ``drop`` by the explanation's genes, ``random_drop``, their ``ratio``, and the share of cells that the explanation
    hurts more than chance (``cells_hurt_more``).
    """
    targets = np.asarray(targets)

    def margin(cells: sp.csr_matrix) -> np.ndarray:
        logits = predict_cells(loaded, cells)["logits"]
        own = logits[np.arange(len(targets)), targets].copy()
        logits[np.arange(len(targets)), targets] = -np.inf
        return own - logits.max(axis=1)

    whole = margin(bins)
    rng = np.random.default_rng(seed)
    draws = [whole - margin(remove_top(bins, rng.random(bins.shape), n_genes)) for _ in range(N_RANDOM)]
    by_chance = np.mean(draws, axis=0)
    rows = []
    for name, scores in explanations.items():
        drop = whole - margin(remove_top(bins, scores, n_genes))
        ratio = float(drop.mean() / by_chance.mean()) if by_chance.mean() > 1e-9 else float("nan")
        hurt = float((drop > by_chance).mean())
        rows.append([name, n_genes, whole.mean(), drop.mean(), by_chance.mean(), ratio, hurt])
    return pd.DataFrame(rows, columns=COLUMNS)


def remove_top(bins: sp.csr_matrix, scores: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """
    Cells without their `n_genes` expressed genes of the highest score.

    Examples
    --------
    >>> bins = sp.csr_matrix(np.array([[3, 0, 1, 2]], dtype=np.int8))
    >>> remove_top(bins, np.array([[0.1, 0.9, 0.2, 0.3]]), 2).toarray().tolist()
    [[3, 0, 0, 0]]
    """
    kept = bins.copy()
    for row in range(bins.shape[0]):
        place = slice(bins.indptr[row], bins.indptr[row + 1])
        best = np.argsort(-scores[row, bins.indices[place]], kind="stable")[:n_genes]
        kept.data[place.start + best] = 0
    kept.eliminate_zeros()
    return kept


def verdict(table: pd.DataFrame) -> str:
    """
    Which explanation to trust, in a sentence.

    Examples
    --------
    >>> row = ["shap", 20, 0.9, 0.4, 0.1, 4.0, 0.8]
    >>> verdict(pd.DataFrame([row], columns=COLUMNS))
    'Deletion test: trust shap (its 20 genes cost 0.40 of margin, random ones 0.10).'
    """
    trusted = table[(table["drop"] > table["random_drop"]) & (table["cells_hurt_more"] > 0.5)]
    removed, chance = int(table["genes_removed"].iloc[0]), table["random_drop"].iloc[0]
    if not len(trusted):
        return (
            f"Deletion test: no explanation is to be trusted; {removed} random genes cost {chance:.2f} of "
            f"margin, the best explanation's {table['drop'].max():.2f}."
        )
    best = trusted.loc[trusted["drop"].idxmax()]
    failed = sorted(set(table["explanation"]) - set(trusted["explanation"]))
    more = f"; not {' nor '.join(failed)}, no better than chance" if failed else ""
    return (
        f"Deletion test: trust {best['explanation']} (its {removed} genes cost {best['drop']:.2f} of "
        f"margin, random ones {chance:.2f}){more}."
    )
