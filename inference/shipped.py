"""The annotator that ships with the package, for whoever names no model."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.labels import UNASSIGNED
from ..tokenization import GeneAlignment, InputError

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "model_cards" / "scbert-mini-pbmc"
ABOUT = "annotator.json"
# of the genes a model knows; below 30% a query is refused
FEW_GENES = 0.6
MOST_CELLS = 0.5
# the shipped annotator's type for cells of other tissues
NO_TYPE = "not a blood cell"


def model_or_shipped(model: Any) -> Any:
    """
    The model that was named, or the folder of the shipped annotator, which is then introduced.

    Raises
    ------
    InputError
        If none was named and this installation carries none.

    Examples
    --------
    >>> model_or_shipped("my_model")
    'my_model'
    """
    if model is not None:
        return model
    if not (SHIPPED / "config.json").is_file():
        raise InputError(
            "No model was named, and this installation lacks the annotator that ships with scbert "
            f"({SHIPPED}). Name one with --model DIR, or install the package again."
        )
    logger.warning(introduction(SHIPPED))
    return SHIPPED


def introduction(folder: Path) -> str:
    """One paragraph on what an annotator knows, from its config and its ``annotator.json``."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    labels = ", ".join(names[key] for key in sorted(names, key=int))
    return (
        f"No --model was given: {folder.name} is used, which ships with scbert. It knows {about['tissue']} and these "
        f"{len(names)} types: {labels}. It leaves cells it is not sure of unassigned; cells of another tissue or type "
        f"should be, and often are not."
    )


def doubts(alignment: GeneAlignment, labels: pd.Categorical | np.ndarray, names: list[str]) -> list[str]:
    """
    What speaks against an annotation as a whole.

    Parameters
    ----------
    alignment
        How the query's genes match the model's.
    labels
        Of the cells, [cells].
    names
        The types of the model.

    Returns
    -------
    list of str
        Nothing, or a sentence for each doubt.
    """
    found = []
    if alignment.overlap < FEW_GENES:
        found.append(
            f"Only {alignment.n_matched:,} of the model's {alignment.panel_size:,} genes ({alignment.overlap:.0%}) are "
            f"in the query; the others count as unexpressed. Annotations from so few genes are uncertain: give all "
            f"genes that were measured, or fine-tune a model on a reference with these genes."
        )
    labels = np.asarray(labels, dtype=object)
    unassigned, other = (
        float(np.mean(labels == name)) if len(labels) else 0.0 for name in (UNASSIGNED, NO_TYPE)
    )
    if unassigned > MOST_CELLS:
        found.append(
            f"{unassigned:.0%} of the cells are unassigned. Perhaps they are none of the types the model knows "
            f"({', '.join(names)}), or their values are not what they were taken for (input='counts' or 'log1p')."
        )
    elif unassigned + other > MOST_CELLS:
        found.append(
            f"{other:.0%} of the cells are {NO_TYPE!r} and {unassigned:.0%} unassigned: the model knows blood, and "
            "this looks like another tissue, so do not trust the other cells' types either. Fine-tune a model on a "
            "reference of that tissue."
        )
    return found
