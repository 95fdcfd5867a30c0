"""What a user should know of a labelled reference: labels that are none, genes named twice, cells that are empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from .labels import UNASSIGNED


def label_notes(column: pd.Series, labels: np.ndarray) -> list[str]:
    """
    Sentences on cells whose labels are not learnt from.

    Parameters
    ----------
    column
        The column of obs as it stands in the file, [cells].
    labels
        The same as `find_labels` reads it: None where a cell has no label, [cells].

    Returns
    -------
    list of str
        Nothing, or a sentence for each kind of cell left out.

    Examples
    --------
    >>> column = pd.Series(["B", None, "unassigned", "Mast"], name="type")
    >>> for note in label_notes(column, np.array(["B", None, None, "Mast"], dtype=object)):
    ...     print(note)
    1 of 4 cells have no label in 'type' (missing or empty): left out.
    1 of 4 cells are called 'unassigned' in 'type', the word for cells without a type: they are left out.
    """
    gone = np.array([label is None for label in labels], dtype=bool)
    reserved = gone & (column.astype(str).str.strip().str.lower() == UNASSIGNED).to_numpy()
    n_missing, n_reserved, n_cells = int((gone & ~reserved).sum()), int(reserved.sum()), len(labels)
    notes = []
    if n_missing:
        notes.append(
            f"{n_missing:,} of {n_cells:,} cells have no label in {column.name!r} (missing or empty): left out."
        )
    if n_reserved:
        notes.append(
            f"{n_reserved:,} of {n_cells:,} cells are called {UNASSIGNED!r} in {column.name!r}, the word for cells "
            "without a type: they are left out."
        )
    return notes


def cell_notes(gene_names: Iterable[str], expressed_genes: np.ndarray) -> list[str]:
    """
    Sentences on genes named twice, and on cells that express nothing.

    Parameters
    ----------
    gene_names
        Of the columns.
    expressed_genes
        How many genes every cell expresses, [cells].

    Examples
    --------
    >>> for note in cell_notes(["CD3E", "CD3E", "LYZ"], np.array([2, 0])):
    ...     print(note)
    1 gene name occurs more than once (CD3E): the values of its columns are summed.
    1 of 2 cells express no gene at all.
    """
    twice = [name for name, count in Counter(gene_names).items() if count > 1]
    notes = []
    if twice:
        shown = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
        what = "1 gene name occurs" if len(twice) == 1 else f"{len(twice):,} gene names occur"
        whose = "its" if len(twice) == 1 else "their"
        notes.append(f"{what} more than once ({shown}): the values of {whose} columns are summed.")
    n_empty = int((np.asarray(expressed_genes) == 0).sum())
    if n_empty:
        notes.append(f"{n_empty:,} of {len(expressed_genes):,} cells express no gene at all.")
    return notes
