"""Cell-type labels as they stand in files: missing values, reserved words, small classes, and what to say of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..tokenization import InputError
from .read import row_blocks

UNASSIGNED = "unassigned"
# what missing values become when a column has been through text, and the word for no type
NO_LABELS = {"", "nan", "none", "<na>", UNASSIGNED}
# of classes with fewer cells little can be learnt, and nothing said about how well
FEW_CELLS = 3
# a column of measurements has nearly as many values as cells
MAX_SHARE_OF_DISTINCT_NUMBERS = 0.5
# cells with fewer genes that are expressed, or fewer that are not in the highest bin, may be alike by chance
TELLING_GENES = 20


def find_labels(obs: pd.DataFrame, label_key: str, source: str = "the reference") -> np.ndarray:
    """
    Labels of a column of obs: an object array [cells] of str, or None where a cell has none.

    Missing values, empty text and the reserved word "unassigned" are None; whole numbers are written without a decimal
    point. A column that is not there, or holds measurements instead of classes, is refused; `source`, where obs comes
    from, is for messages.

    Examples
    --------
    >>> find_labels(pd.DataFrame({"type": ["B", None, "unassigned", "CD8+/CD45RA+"]}), "type").tolist()
    ['B', None, None, 'CD8+/CD45RA+']
    """
    # a list of columns is no key that could be looked up
    if label_key not in list(obs):
        raise InputError(
            f"There is no column {label_key!r} in obs of {source}; it has: {_listed(obs.columns)}. "
            f"Name the column of cell types (label_key, --label-key)."
        )
    column = obs[label_key]
    _refuse_measurements(column, label_key)
    labels = [None if gone else _as_label(value) for value, gone in zip(column, column.isna(), strict=True)]
    return np.array(labels, dtype=object)


def _as_label(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    # a column of whole numbers with gaps is read as floats: 3.0 was 3
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    label = str(value).strip()
    return None if label.lower() in NO_LABELS else label


def _refuse_measurements(column: pd.Series, label_key: str) -> None:
    values = column.dropna()
    if values.dtype.kind not in "fiu" or len(values) < 20:
        return
    if values.nunique() > MAX_SHARE_OF_DISTINCT_NUMBERS * len(values):
        raise InputError(
            f"The column {label_key!r} holds numbers, {values.nunique()} different ones in {len(values)} "
            f"cells ({values.min():g} to {values.max():g}): these are measurements, not cell types. Name a "
            f"column of classes (label_key, --label-key)."
        )


def choose_classes(labels: Sequence[str | None], label_key: str) -> tuple[list[str], dict[str, Any]]:
    """
    The classes to be learnt, however few cells they have, and what a reader has to know of them.

    Of `find_labels`' output [cells], which must have two classes at least: the sorted classes, and a report of
    ``unlabelled`` (cells) and ``small_classes`` (``{name: cells}``, fewer than three cells).
    """
    counts = Counter(label for label in labels if label is not None)
    classes = sorted(counts)
    small = {name: counts[name] for name in classes if counts[name] < FEW_CELLS}
    report = {"unlabelled": len(labels) - sum(counts.values()), "small_classes": small}
    if len(classes) >= 2:
        return classes, report
    found = f"only {classes[0]!r}" if classes else "none"
    raise InputError(
        f"The column {label_key!r} has {found} as a class"
        + (f"; {report['unlabelled']} of {len(labels)} cells have no label" if report["unlabelled"] else "")
        + ". At least two classes are needed to learn to tell them apart."
    )


def _listed(names: Any) -> str:
    names = [str(name) for name in names]
    shown = ", ".join(name if len(name) <= 40 else name[:39] + "…" for name in names[:10])
    return (shown or "nothing") + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def label_notes(column: pd.Series, labels: np.ndarray) -> list[str]:
    """
    A sentence for each kind of cell whose label is not learnt from.

    `column` is that of obs as it stands in the file, [cells], `labels` what `find_labels` makes of it.

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
    key = repr(column.name)
    told = {
        f"have no label in {key} (missing or empty): left out.": gone & ~reserved,
        f"are called {UNASSIGNED!r} in {key}, the word for cells without a type: they are left out.": reserved,
    }
    return [f"{cells.sum():,} of {len(labels):,} cells {what}" for what, cells in told.items() if cells.any()]


def cell_notes(gene_names: Iterable[str], expressed_genes: np.ndarray) -> list[str]:
    """
    Sentences on genes named twice, and on cells that express nothing: `expressed_genes` [cells] is 0 there.

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


def copy_notes(parts: Sequence[sp.csr_matrix]) -> list[str]:
    """
    A sentence on cells that stand more than once in these parts, [cells, genes] each: held out, they tell nothing.

    Examples
    --------
    >>> cells = sp.csr_matrix(np.random.default_rng(0).poisson(9, size=(3, 50)))
    >>> copy_notes([cells, cells[:1]])[0].partition(":")[0]
    '1 of 4 cells are copies of others, gene for gene'
    """
    weights, keys = np.random.default_rng(0).random(parts[0].shape[1]), []
    highest = max(part.max() for part in parts if part.shape[0])
    for part in parts:
        for block in row_blocks(part.shape[0]):
            rows = part[block].sorted_indices()
            lower = len(weights) - (rows == highest).sum(axis=1)
            telling = np.minimum(np.diff(rows.indptr), np.ravel(lower)) >= TELLING_GENES
            keys.append((rows @ weights)[telling])
    copies = pd.Series(np.concatenate(keys)).duplicated().sum()
    told = (
        f"{copies:,} of {sum(part.shape[0] for part in parts):,} cells are copies of others, gene for gene: scores are "
        "too good, and confidence too high, where one is learnt from and the other held out. Keep each cell once."
    )
    return [told] if copies else []
