"""The annotators that ship with the package, for whoever names no model of their own."""

import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.labels import UNASSIGNED
from ..tokenization import GeneAlignment, InputError
from ..trained_model.model_folder import SHIPPED_MODELS

logger = logging.getLogger(__name__)

# by the tissue that is asked for; the first is taken where none is
SHIPPED = {"blood": SHIPPED_MODELS / "scbert-mini-pbmc", "tissue": SHIPPED_MODELS / "scbert-mini-tissue"}
ABOUT = "annotator.json"
# of the genes a model knows; below 30% a query is refused
FEW_GENES = 0.6
MOST_CELLS = 0.5
# the type of the annotator of blood for cells of other tissues
NO_TYPE = "not a blood cell"


def model_or_shipped(model: Any, tissue: str | None = None) -> Any:
    """
    The model that was named, as it is, or the folder of a shipped annotator, introduced if nobody asked for it.

    The annotator is asked for by its `tissue`, one of `SHIPPED`.
    """
    if model is not None and tissue is not None:
        raise InputError(f"A model and the tissue {tissue!r} were given: one of them says which model it is.")
    if tissue not in (None, *SHIPPED):
        raise InputError(f"No annotator ships for the tissue {tissue!r}; there are: {', '.join(SHIPPED)}.")
    if model is not None:
        return model
    folder = SHIPPED[tissue or next(iter(SHIPPED))]
    if not (folder / "config.json").is_file():
        raise InputError(
            f"No model was named, and this installation lacks the annotator that ships with scbert ({folder}). "
            "Name one with --model DIR, or install the package again."
        )
    if tissue is None:
        logger.warning(introduction(folder))
    return folder


def read_about(folder: Path) -> dict[str, Any]:
    """What a shipped annotator knows, from its config and its ``annotator.json``."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config["id2label"]
    return {
        "name": folder.name,
        **about,
        "types": [names[key] for key in sorted(names, key=int)],
        "ontology_term_ids": config.get("label_ontology_ids") or {},
    }


def introduction(folder: Path) -> str:
    """One paragraph on what an annotator knows."""
    about = read_about(folder)
    others = [tissue for tissue, other in SHIPPED.items() if other != folder]
    return (
        f"No --model was given: {folder.name} is used, which ships with scbert. It knows {about['tissue']} and these "
        f"{len(about['types'])} types: {', '.join(about['types'])}. It leaves cells it is not sure of unassigned, but "
        f"often not those of other tissues and types. For these: --tissue {' or '.join(others)}, or your own model."
    )


def list_shipped() -> dict[str, Any]:
    """
    The annotators that ship, told in words.

    Returns
    -------
    dict
        By name: what tissue, types and terms they know, the studies they learnt from, and their accuracy on studies
        left out of learning beside logistic regression taught the same cells.

    Examples
    --------
    >>> list(list_shipped())
    ['scbert-mini-pbmc', 'scbert-mini-tissue']
    """
    found = {}
    for tissue, folder in SHIPPED.items():
        about = read_about(folder)
        scores = [
            f"    {study}: {row['scbert']:.3f} ({max(row[name] for name in row if name != 'scbert'):.3f})"
            for study, row in about["left_out"].items()
        ]
        types = textwrap.fill(", ".join(about["types"]), 96, initial_indent="    ", subsequent_indent="    ")
        logger.info(
            "%s (--tissue %s): %s\n  %d types:\n%s\n  learnt from %d studies; share of cells named right in studies "
            "kept out of learning\n  (in brackets: the better of two logistic regressions taught the same cells):\n%s",
            *(folder.name, tissue, about["tissue"], len(about["types"]), types, len(about["trained_on"])),
            "\n".join(scores),
        )
        found[folder.name] = about
    logger.info("Next: scbert annotate QUERY.h5ad --tissue %s --output annotated.h5ad", next(iter(SHIPPED)))
    return found


def few_genes(alignment: GeneAlignment) -> list[str]:
    """A sentence where the query has few of the model's genes."""
    if alignment.overlap >= FEW_GENES:
        return []
    return [
        f"Only {alignment.n_matched:,} of the model's {alignment.panel_size:,} genes ({alignment.overlap:.0%}) are in "
        f"the query. Annotations from so few genes are uncertain: give all genes that were measured, or fine-tune a "
        f"model on a reference with these genes."
    ]


def doubts(labels: pd.Categorical | np.ndarray, names: list[str]) -> list[str]:
    """A sentence where the `labels` of the cells speak against them as a whole; `names` are the model's types."""
    labels = np.asarray(labels, dtype=object)
    unassigned, other = (float(np.mean(labels == name)) for name in (UNASSIGNED, NO_TYPE))
    if unassigned > MOST_CELLS:
        return [
            f"{unassigned:.0%} of the cells are unassigned. Perhaps they are none of the types the model knows "
            f"({', '.join(names)}), or their values are not what they were taken for (input='counts' or 'log1p')."
        ]
    if unassigned + other > MOST_CELLS:
        return [
            f"{other:.0%} of the cells are {NO_TYPE!r} and {unassigned:.0%} unassigned: the model knows blood, and "
            "this looks like another tissue, so do not trust the other cells' types either. Try the annotator of "
            "tissue that ships (tissue='tissue'), or fine-tune a model on a reference of that tissue."
        ]
    return []
