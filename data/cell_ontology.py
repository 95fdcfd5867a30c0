"""Labels of cells and the terms of the Cell Ontology: proposed, confirmed by a person in a table, checked."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..extras import require
from ..tokenization import InputError
from .labels import find_labels
from .paths import atomic_path, check_output_path
from .read import opened_cells

logger = logging.getLogger(__name__)

ROOT = "CL:0000000"
# what CELLxGENE's schema accepts for no cell: eukaryotic cell, a name it retired, animal cell
REFUSED = {"CL:0000255", "CL:0000257", "CL:0000548"}
# what CELLxGENE's schema wants where the type of a cell is not known
UNKNOWN_TERM = "unknown"
COLUMNS = ["label", "term_id", "term_name", "found"]
TO_CONFIRM = "to confirm"
# cosine of character n-grams below which a proposal is more trouble than help
LEAST_SIMILARITY = 0.5
# short forms of the field, for proposals only
SHORT_FORMS = {
    "mono": "monocyte",
    "mac": "macrophage",
    "tcell": "t cell",
    "bcell": "b cell",
    "gdt": "gamma delta t cell",
    "mait": "mucosal invariant t cell",
    "nk": "natural killer cell",
    "dc": "dendritic cell",
    "cdc": "conventional dendritic cell",
    "pdc": "plasmacytoid dendritic cell",
    "mk": "megakaryocyte",
    "treg": "regulatory t cell",
    "tconv": "conventional t cell",
    "endo": "endothelial cell",
    "epi": "epithelial cell",
    "fibro": "fibroblast",
    "fibo": "fibroblast",
    "astro": "astrocyte",
    "oligo": "oligodendrocyte",
    "opc": "oligodendrocyte precursor cell",
    "hsc": "hematopoietic stem cell",
}


@dataclass
class CellOntology:
    """The terms of the Cell Ontology that may name a cell, by term id."""

    names: dict[str, str]
    # exact ones
    synonyms: dict[str, list[str]]
    # ids of all terms above it (is-a)
    ancestors: dict[str, set[str]]
    # ids of well-known types such as "T cell", which a tree of types prefers to groups by function
    lineages: set[str] = field(default_factory=set)


def read_cell_ontology() -> CellOntology:
    """The Cell Ontology as `cellxgene-ontology-guide` carries it: terms that CELLxGENE accepts, none obsolete."""
    library = "cellxgene_ontology_guide"
    graph = require(f"{library}.ontology_parser").OntologyParser().cxg_schema.ontology("CL")
    kinds = require(f"{library}.entities").CuratedOntologyTermList
    curated = require(f"{library}.curated_ontology_term_lists").get_curated_ontology_term_list
    usable = {
        term_id: term
        for term_id, term in graph.items()
        if not term.get("deprecated")
        and term_id not in REFUSED
        and (term_id == ROOT or ROOT in term["ancestors"])
    }
    return CellOntology(
        {term_id: term["label"] for term_id, term in usable.items()},
        {term_id: list(term.get("synonyms", [])) for term_id, term in usable.items()},
        {term_id: set(term["ancestors"]) & set(usable) for term_id, term in usable.items()},
        set(curated(kinds.CELL_SUBCLASS)) & set(usable),
    )


def propose_terms(labels: Iterable[str], ontology: CellOntology) -> pd.DataFrame:
    """
    A term of the Cell Ontology for each label, and how it was found.

    The columns are ``label``, ``term_id``, ``term_name``, ``found``: by ``"name"`` or ``"synonym"``, exactly but for
    case, hyphens and the plural of "cell"; or ``"to confirm"``, the name most like the label, which a person has to
    look at. Where nothing is alike all but the label are empty.
    """
    labels = list(labels)
    named = _index((name, term_id) for term_id, name in ontology.names.items())
    synonyms = _index((word, term_id) for term_id, words in ontology.synonyms.items() for word in words)
    rows, alike = [], _most_alike(labels, ontology)
    for label, proposal in zip(labels, alike, strict=True):
        term_id, found = named.get(_folded(label)), "name"
        if term_id is None:
            term_id, found = synonyms.get(_folded(label)), "synonym"
        if term_id is None:
            term_id, found = proposal, TO_CONFIRM if proposal else ""
        rows.append([label, term_id or "", ontology.names.get(term_id, ""), found])
    return pd.DataFrame(rows, columns=COLUMNS)


def _index(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Folded words -> term; words of several terms say nothing."""
    pairs = {(_folded(word), term_id) for word, term_id in pairs}
    counts = Counter(word for word, _ in pairs)
    return {word: term_id for word, term_id in pairs if counts[word] == 1}


def _folded(text: str) -> str:
    # a hyphen within words is a space; one at the end says "negative", as in CD25-
    text = re.sub(r"(?<=\w)[-_](?=\w)", " ", text.casefold())
    return re.sub(r"\s+", " ", re.sub(r"cells\b", "cell", text)).strip()


def _spelt_out(text: str) -> str:
    """A label as the ontology might put it: short forms in full, "+" as "positive", without the word "cell"."""
    text = re.sub(r"\bcd([48])\+? t\b", r"cd\1 positive alpha beta t", _folded(text))
    words = text.replace("+", " positive ").replace("/", " ").split()
    words = [SHORT_FORMS.get(word, SHORT_FORMS.get(word.removesuffix("s"), word)) for word in words]
    return re.sub(r"\bcell\b", "", " ".join(words)).strip()


def _most_alike(labels: list[str], ontology: CellOntology) -> list[str | None]:
    """The term with the name or synonym most like each label, by the cosine of weighted character n-grams."""
    words = [(term_id, name) for term_id, name in ontology.names.items() if term_id != ROOT]
    words += [(term_id, word) for term_id, several in ontology.synonyms.items() for word in several]
    if not labels or not words:
        return [None] * len(labels)
    vectorizer = require("sklearn.feature_extraction.text").TfidfVectorizer(
        analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True
    )
    known = vectorizer.fit_transform([_spelt_out(word) for _, word in words])
    likeness = (vectorizer.transform([_spelt_out(label) for label in labels]) @ known.T).toarray()
    best = likeness.argmax(axis=1)
    enough = likeness[np.arange(len(labels)), best] >= LEAST_SIMILARITY
    return [words[place][0] if good else None for place, good in zip(best, enough, strict=True)]


def map_labels(
    reference: AnnData | str | Path, label_key: str, output: str | Path, overwrite: bool = False
) -> dict[str, Any]:
    """
    Write a table of the labels of a reference and the terms of the Cell Ontology proposed for them.

    Parameters
    ----------
    reference
        Labelled cells: an AnnData or a file.
    label_key
        Column of obs that holds the cell types.
    output
        The .csv to write: see `propose_terms`. A person corrects it, and takes "to confirm" out of the rows that are
        right; fine-tuning reads it (``ontology``, or ``--ontology``).
    overwrite
        Replace an existing file.

    Returns
    -------
    dict
        ``output``, and how many labels were found by ``name``, by ``synonym``, are ``to_confirm`` or ``without_term``.

    Raises
    ------
    InputError
        If there is no such column, or the output exists.
    MissingLibrary
        If `cellxgene-ontology-guide` is not installed.

    Examples
    --------
    >>> from scbert.data.cell_ontology import map_labels
    >>> map_labels("reference.h5ad", "cell_type", "labels.csv")["to_confirm"]  # doctest: +SKIP
    3
    """
    in_memory = isinstance(reference, AnnData)
    inputs = () if in_memory else (reference,)
    check_output_path(output, overwrite, inputs, suffix=".csv")
    ontology = read_cell_ontology()
    with nullcontext(reference) if in_memory else opened_cells(reference, check=False) as cells:
        labels = find_labels(cells.obs, label_key)
    table = propose_terms(sorted({label for label in labels if label is not None}), ontology)
    with atomic_path(output, overwrite, inputs=inputs) as temporary:
        table.to_csv(temporary, index=False)
    counts = {found: int((table["found"] == found).sum()) for found in ("name", "synonym", TO_CONFIRM, "")}
    logger.info(
        "Written to %s: %d labels; terms of the Cell Ontology were found for %d by name, for %d by synonym.",
        *(output, len(table), counts["name"], counts["synonym"]),
    )
    if counts[TO_CONFIRM] or counts[""]:
        logger.warning(
            "%d got the term of the most similar name, often a wrong one: correct it in the table, and take the words "
            "%r away, or it is not used. %d have no term: give them one, or leave them empty.",
            *(counts[TO_CONFIRM], TO_CONFIRM, counts[""]),
        )
    logger.info(
        "Next: scbert finetune %s --label-key %s --ontology %s --output MODEL",
        *("REFERENCE.h5ad" if in_memory else reference, label_key, output),
    )
    names = ("by_name", "by_synonym", "to_confirm", "without_term")
    return {"output": str(output), "labels": len(table), **dict(zip(names, counts.values(), strict=True))}


def read_terms(path: str | Path, labels: list[str], ontology: CellOntology) -> dict[str, str]:
    """
    Label -> term id from a table that `map_labels` wrote and a person corrected, of the labels that have one.

    It is a .csv with the columns ``label`` and ``term_id``, and perhaps ``found``: rows "to confirm" are not taken,
    rows of other `labels` than these passed over. Every term is checked against the `ontology`.
    """
    table = read_table(path, ("label", "term_id"))
    table = table[table["label"].isin(labels)]
    twice = table["label"][table["label"].duplicated()].tolist()
    if twice:
        raise InputError(f"{path} has more than one row for {twice[0]!r}. Keep the right one.")
    waiting = table.get("found", pd.Series("", index=table.index)) == TO_CONFIRM
    terms = dict(table.loc[~waiting & (table["term_id"] != ""), ["label", "term_id"]].values.tolist())
    for label, term_id in terms.items():
        if term_id not in ontology.names:
            raise InputError(
                f"{path} gives {label!r} the term {term_id!r}, which is no cell type of the Cell Ontology (such as "
                f"CL:0000084), is obsolete, or is one that CELLxGENE refuses. Correct it, or leave it empty."
            )
    without = [label for label in labels if label not in terms]
    if without:
        more = f" ({int(waiting.sum())} still {TO_CONFIRM} in {path})" if waiting.any() else ""
        logger.warning("Without a term of the Cell Ontology: %s%s.", ", ".join(without), more)
    return terms


def read_table(path: str | Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A .csv as text, empty where nothing stands; one that lacks a column is refused."""
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig"
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a .csv table: {error}") from error
    absent = [name for name in columns if name not in table]
    if absent:
        raise InputError(
            f"{path} has no column {absent[0]!r}; it needs {', '.join(columns)} and has {', '.join(table)}."
        )
    return table.apply(lambda column: column.str.strip())
