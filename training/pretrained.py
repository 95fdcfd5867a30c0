"""Models for training: from a recipe with random weights, or from a folder whose weights are all there."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..modeling_scbert import ScBertConfig, ScBertForCellClassification
from ..tokenization import InputError, ScBertTokenizer

# fields of the head, which is new: a recipe may set them over what the base says
HEAD_FIELDS = ("classifier_hidden_sizes", "classifier_dropout", "pooling", "hidden_dropout_prob")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading without transformers' own reports and bars; what they would say is checked instead."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_model_folder(folder: str | Path) -> dict[str, Any]:
    """
    Refuse a folder that holds no complete scBERT model, by its files alone.

    Returns
    -------
    dict
        The content of its config.json.

    Raises
    ------
    InputError
        Saying what is missing, or of which other type it is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no model folder {folder}.")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json.")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = content.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder}/config.json is damaged ({error}).") from error
    if model_type != ScBertConfig.model_type:
        raise InputError(
            f"{folder} holds a model of type {model_type!r}; one of type {ScBertConfig.model_type!r} is "
            f"needed."
        )
    needed = {
        "weights": WEIGHT_FILES,
        "the gene panel": ("gene_panel.txt",),
        "the tokenizer": ("tokenizer_config.json",),
    }
    missing = [
        f"{what} ({names[0]})"
        for what, names in needed.items()
        if not any((folder / name).is_file() for name in names)
    ]
    if missing:
        raise InputError(f"The model folder {folder} is incomplete: {', '.join(missing)} missing.")
    return content


def load_tokenizer(folder: str | Path) -> ScBertTokenizer:
    """The tokenizer of a model folder."""
    with quiet_transformers():
        try:
            return ScBertTokenizer.from_pretrained(str(folder))
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise InputError(f"The tokenizer of the model folder {folder} cannot be read: {error}") from error


def load_base(folder: str | Path, labels: list[str], changes: dict[str, Any]) -> PreTrainedModel:
    """
    A pretrained encoder with a head for `labels`.

    Parameters
    ----------
    folder
        Model folder of any head; weights of the encoder must all be there.
    labels
        Names of the classes, in order.
    changes
        Recipe's fields of the model; only those of the head are taken.

    Raises
    ------
    InputError
        If weights are missing, damaged or of another shape: transformers would fill them at random.
    """
    check_model_folder(folder)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head = {name: value for name, value in changes.items() if name in HEAD_FIELDS}
    with quiet_transformers():
        try:
            config = ScBertConfig.from_pretrained(str(folder), **names, **head)
            model, info = ScBertForCellClassification.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        # safetensors and torch raise types of their own for a damaged file
        except Exception as error:
            raise InputError(f"The model folder {folder} cannot be loaded: {error}") from error
    wrong = [name for name in info["missing_keys"] if not name.startswith("classifier.")]
    wrong += [item[0] for item in info["mismatched_keys"] if not item[0].startswith("classifier.")]
    if wrong or info["error_msgs"]:
        raise InputError(
            f"{len(wrong)} weight(s) of the model folder {folder} are missing or of another shape than its "
            f"config says (first: {', '.join(sorted(wrong)[:3])}). It is damaged or incomplete: get it anew."
        )
    return model


def new_model(
    fields: dict[str, Any], tokenizer: ScBertTokenizer, labels: list[str], seed: int
) -> PreTrainedModel:
    """
    A model of the recipe's size with random weights, for the tokenizer's panel and bins.

    Parameters
    ----------
    fields
        Fields of `ScBertConfig`.
    tokenizer
        Decides vocabulary and sequence length.
    labels
        Names of the classes, in order.
    seed
        Of the random features, unless `fields` has one; weights follow torch's own generator.
    """
    modalities = tokenizer.feature_modalities
    fields = {"seed": seed, **fields} | {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "max_position_embeddings": len(tokenizer.gene_panel) + 1,
        "num_modalities": 1 if modalities is None else int(max(modalities)) + 1,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    unknown = sorted(set(fields) - set(ScBertConfig().to_dict()) - {"id2label", "label2id"})
    if unknown:
        raise InputError(f"The recipe's model has the unknown field(s) {', '.join(unknown)}.")
    try:
        config = ScBertConfig(**fields)
    # @strict raises types of huggingface_hub's own, all of them about values
    except Exception as error:
        raise InputError(f"The recipe's model cannot be built: {error}") from error
    return ScBertForCellClassification(config)
