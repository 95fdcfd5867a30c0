"""From probabilities to labels: the likeliest, or "unassigned"."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..data.disk_matrix import DiskMatrix, row_blocks
from ..data.labels import UNASSIGNED


def assign(
    probabilities: np.ndarray | DiskMatrix, names: list[str], threshold: float
) -> tuple[pd.Categorical, np.ndarray]:
    """
    Label and confidence of every cell.

    Parameters
    ----------
    probabilities
        [cells, labels]; all zero for a cell without expression.
    names
        Labels in the order of the columns.
    threshold
        Below it a cell is "unassigned"; a cell with confidence 0 always is.

    Returns
    -------
    labels
        [cells]; its categories are those that occur, in the model's order, "unassigned" last.
    confidence
        float32 [cells].

    Examples
    --------
    >>> assign(np.array([[0.9, 0.1], [0.4, 0.3]]), ["B", "T"], 0.5)[0].tolist()
    ['B', 'unassigned']
    """
    order = list(dict.fromkeys([*names, UNASSIGNED]))
    # two columns may have one name
    code_of_column = np.array([order.index(name) for name in names], dtype=np.int16)
    codes = np.empty(len(probabilities), dtype=np.int16)
    confidence = np.empty(len(probabilities), dtype=np.float32)
    for block in row_blocks(len(probabilities)):
        values = probabilities[block]
        largest = values.max(axis=1)
        codes[block] = code_of_column[values.argmax(axis=1)]
        codes[block][(largest < threshold) | (largest == 0)] = order.index(UNASSIGNED)
        confidence[block] = largest
    return pd.Categorical.from_codes(codes, order).remove_unused_categories(), confidence
