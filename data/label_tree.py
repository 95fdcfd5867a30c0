"""Trees of cell types, child -> parent: of a table, of a coarser column of the reference, of the Cell Ontology."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np

from ..tokenization import InputError
from .cell_ontology import ROOT, CellOntology, read_table
from .labels import UNASSIGNED

logger = logging.getLogger(__name__)

# a label most of whose cells have one coarse type, but so many have not, is worth a word
CLEAR_SHARE = 0.9


def ancestors_of(name: str, parents: dict[str, str]) -> list[str]:
    """The types above one, the nearest first; parents that go round in a circle are refused.

    Examples
    --------
    >>> ancestors_of("CD4", {"CD4": "T", "T": "lymphocyte"})
    ['T', 'lymphocyte']
    """
    found: list[str] = []
    while name in parents:
        name = parents[name]
        if name in found:
            raise InputError(f"The tree of cell types goes round in a circle: {' > '.join([*found, name])}.")
        found.append(name)
    return found


def tree_from_table(path: str | Path, labels: list[str]) -> dict[str, str]:
    """
    The tree of a .csv with the columns ``label`` and ``parent``; parents may have parents.

    A row without a parent is a type with nothing above it. What is above none of the model's `labels` is left out.
    """
    table = read_table(path, ("label", "parent"))
    parents: dict[str, str] = {}
    for label, parent in table.loc[table["parent"] != "", ["label", "parent"]].values.tolist():
        if parents.setdefault(label, parent) != parent:
            raise InputError(
                f"{path} gives {label!r} two parents, {parents[label]!r} and {parent!r}. Keep one."
            )
    return _above(parents, labels, str(path))


def tree_from_column(
    labels: np.ndarray, coarse: np.ndarray, classes: list[str], coarse_key: str
) -> dict[str, str]:
    """
    The tree of two levels that a coarser column makes: each label under the type most of its cells have there.

    `labels` and `coarse` types are those of the reference's cells, [cells], None where a cell has none; `classes` are
    the types of the model, and `coarse_key` is the name of the column, for messages.
    """
    parents = {}
    for name in classes:
        counts = Counter(value for value in coarse[labels == name] if value is not None)
        if not counts:
            continue
        [(parent, count)] = counts.most_common(1)
        if count < CLEAR_SHARE * counts.total():
            share = 100 * count / counts.total()
            logger.warning("Only %.0f%% of the cells of %s are %s in %s.", share, name, parent, coarse_key)
        if parent != name:
            parents[name] = parent
    return _above(parents, classes, f"the column {coarse_key!r}")


def tree_from_ontology(
    terms: dict[str, str], ontology: CellOntology, labels: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """
    The tree of the Cell Ontology's terms above some labels, and the terms of its types.

    The ontology is no tree: a dendritic cell is a leukocyte and an antigen-presenting cell. Terms above at least two
    labels are taken in turn where they stand above those taken, below them or apart: those of labels first, then
    well-known types, wide ones first, then others, narrow ones first. The root, "cell", says nothing and is left out.

    Of `terms` (label -> term id) and all types of the model, `labels`, also those without a term, come parents (child
    -> parent), and the term ids of the labels and of all types above them.
    """
    below: dict[str, set[str]] = {}
    for label, term_id in terms.items():
        for above in (ontology.ancestors[term_id] | {term_id}) - {ROOT}:
            below.setdefault(above, set()).add(label)
    widths = Counter(above for ancestors in ontology.ancestors.values() for above in ancestors)
    order = sorted(
        (term_id for term_id in below if len(below[term_id]) > 1),
        key=lambda term_id: (
            term_id not in terms.values(),
            term_id not in ontology.lineages,
            -len(below[term_id]) if term_id in ontology.lineages else 0,
            # of terms above the same labels the narrowest
            widths[term_id],
            term_id,
        ),
    )
    kept: dict[str, set[str]] = {}
    for term_id in order:
        if all(_fits(term_id, other, below, ontology) for other in kept):
            kept[term_id] = below[term_id]
    return _named_tree(terms, kept, ontology, labels)


def _fits(term_id: str, other: str, below: dict[str, set[str]], ontology: CellOntology) -> bool:
    """Whether two terms stand apart, or one above the other in the ontology and by their labels."""
    one, two = below[term_id], below[other]
    if one < two:
        return other in ontology.ancestors[term_id]
    return term_id in ontology.ancestors[other] if one > two else not one & two


def _named_tree(
    terms: dict[str, str], kept: dict[str, set[str]], ontology: CellOntology, labels: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Sets of labels within each other as child -> parent, and the terms of all names."""
    bearers: dict[str, list[str]] = {}
    for label, term_id in terms.items():
        bearers.setdefault(term_id, []).append(label)
    names = {}
    for term_id in kept:
        # a label that alone has a term is the type itself
        bearing = bearers.get(term_id, [])
        name = bearing[0] if len(bearing) == 1 else ontology.names[term_id]
        # and one of the same name that has it not, or shares it, is another
        names[term_id] = name if bearing == [name] or name not in labels else f"{name} ({term_id})"
    wider = sorted(kept, key=lambda term_id: len(kept[term_id]))
    below = [(label, {label}) for label in terms] + [(names[term_id], kept[term_id]) for term_id in wider]
    parents = {}
    for name, labels_below in below:
        over = next((t for t in wider if labels_below < kept[t] and names[t] != name), None)
        if over is not None:
            parents[name] = names[over]
    return parents, terms | {names[term_id]: term_id for term_id in kept}


def _above(parents: dict[str, str], labels: list[str], source: str) -> dict[str, str]:
    """The part of a tree that stands above some labels, checked."""
    if UNASSIGNED in parents.values():
        raise InputError(f"A parent in {source} is called {UNASSIGNED!r}, the word for cells of no type.")
    needed = [name for label in labels for name in (label, *ancestors_of(label, parents))]
    kept = {name: parents[name] for name in dict.fromkeys(needed) if name in parents}
    if not kept:
        raise InputError(
            f"Nothing in {source} stands above a type of the reference ({', '.join(labels[:5])}...): "
            "there is no tree to back off in."
        )
    return kept
