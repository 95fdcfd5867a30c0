"""Models for training: from a recipe with random weights, or from a folder whose weights are all there."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..modeling_scbert import ScBertConfig, ScBertForCellClassification, ScBertForMaskedExpression
from ..tokenization import InputError, ScBertTokenizer

# fields of the head, which is new: a recipe may set them over what the base says
HEAD_FIELDS = ("classifier_hidden_sizes", "classifier_dropout", "pooling", "hidden_dropout_prob")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading without transformers' own reports and bars; what they would say is checked instead."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def read_config(folder: str | Path) -> dict[str, Any]:
    """
    The content of a model folder's config.json.

    Raises
    ------
    InputError
        If it is no folder of an scBERT model.
    """
    folder = Path(folder)
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        more = (
            f" There is {partial}, of a run that did not end: continue it with --resume."
            if partial.exists()
            else ""
        )
        raise InputError(f"There is no model folder {folder}.{more}")
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file; a model is a folder, as `scbert finetune` or `scbert convert` write it."
        )
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no model folder: it holds no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: it is not a JSON object ({error}).") from error
    if model_type != "scbert":
        raise InputError(
            f"{folder} holds a model of type {model_type!r}; a model of type 'scbert' was needed."
        )
    return config


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
    content = read_config(folder)
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
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head = {name: value for name, value in changes.items() if name in HEAD_FIELDS}
    model = _load(ScBertForCellClassification, folder, "classifier.", **names, **head)
    if check_model_folder(folder).get("architectures") != [ScBertForCellClassification.__name__]:
        start_head(model)
    return model


def load_masked_model(folder: str | Path) -> PreTrainedModel:
    """A model of any head to go on pretraining; without the head of masked expression it gets a new one."""
    return _load(ScBertForMaskedExpression, folder, "decoder.")


def load_classifier(folder: str | Path) -> PreTrainedModel:
    """
    A fine-tuned model in evaluation mode, every weight from its folder.

    Raises
    ------
    InputError
        If the folder is incomplete, or its model has no cell types yet.
    """
    architectures = check_model_folder(folder).get("architectures") or []
    if architectures != [ScBertForCellClassification.__name__]:
        raise InputError(
            f"The model in {folder} ({', '.join(architectures) or 'no architecture named'}) has no cell types "
            f"yet. Teach it some first, with `scbert finetune REF.h5ad --label-key KEY --base {folder}`."
        )
    # no tensor's name begins so: none may be missing
    return _load(ScBertForCellClassification, folder, "\0").eval()


def _load(
    model_class: type[PreTrainedModel], folder: str | Path, head: str, **fields: Any
) -> PreTrainedModel:
    """Load all weights of the encoder; those named `head...` may be missing, and are then new."""
    check_model_folder(folder)
    with quiet_transformers():
        try:
            config = ScBertConfig.from_pretrained(str(folder), **fields)
            model, info = model_class.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        # safetensors and torch raise types of their own for a damaged file
        except Exception as error:
            raise InputError(f"The model folder {folder} cannot be loaded: {error}") from error
    wrong = [name for name in info["missing_keys"] if not name.startswith(head)]
    wrong += [item[0] for item in info["mismatched_keys"] if not item[0].startswith(head)]
    if wrong or info["error_msgs"]:
        raise InputError(
            f"{len(wrong)} weight(s) of the model folder {folder} are missing or of another shape than its config "
            f"says (first: {', '.join(sorted(wrong)[:3])}). It is damaged or incomplete: get it anew."
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
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = ScBertForCellClassification(new_config(fields, tokenizer, seed, **names))
    start_head(model)
    return model


@torch.no_grad()
def start_head(model: PreTrainedModel) -> None:
    """
    Begin a new head where every gene can be learnt and none has been heard yet.

    The output layer starts at zero: genes that few training cells express would otherwise keep random votes. The
    convolution's bias starts at 0.5: below zero its ReLU hides a gene from the head, and no gradient brings it back.
    With ``ordinal_expression`` the convolution reads along the line of the bins instead, from zero: a gene's
    number is then nearly proportional to its bin.

    Parameters
    ----------
    model
        `ScBertForCellClassification`; changed in place.
    """
    model.classifier.out_proj.weight.zero_()
    if model.config.pooling == "conv":
        model.classifier.conv.bias.fill_(0.5)
        if model.config.ordinal_expression:
            table = model.base_model.embeddings.expression_embeddings.weight
            direction = (table[-2] - table[0]) / (table[-2] - table[0]).norm()
            model.classifier.conv.weight.copy_(
                direction.view_as(model.classifier.conv.weight) * 2 / len(direction) ** 0.5
            )
            model.classifier.conv.bias.zero_()


def new_masked_model(fields: dict[str, Any], tokenizer: ScBertTokenizer, seed: int) -> PreTrainedModel:
    """Like `new_model`, with the head of masked expression modelling."""
    return ScBertForMaskedExpression(new_config(fields, tokenizer, seed))


def new_config(fields: dict[str, Any], tokenizer: ScBertTokenizer, seed: int, **more: Any) -> ScBertConfig:
    """
    The configuration of a recipe's fields, with sizes that the tokenizer decides.

    Raises
    ------
    InputError
        If a field is unknown or its value cannot be.
    """
    modalities = tokenizer.feature_modalities
    unknown = sorted(set(fields) - set(ScBertConfig().to_dict()))
    if unknown:
        raise InputError(f"The recipe's model has the unknown field(s) {', '.join(unknown)}.")
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "max_position_embeddings": len(tokenizer.gene_panel) + 1,
        "num_modalities": 1 if modalities is None else int(max(modalities)) + 1,
    }
    try:
        return ScBertConfig(**{"seed": seed, **fields, **sizes, **more})
    # @strict raises types of huggingface_hub's own, all of them about values
    except Exception as error:
        raise InputError(f"The recipe's model cannot be built: {error}") from error
