"""Settings of a pretraining run: dataclasses for HfArgumentParser; recipes in recipes/pretrain/."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from ..tokenization import InputError
from .finetune_arguments import RECIPES, load_recipe

PRETRAIN_RECIPES = RECIPES / "pretrain"
# without a base: a size that a CPU trains; with one, how the paper trains its own
DEFAULT_RECIPE = "small"
DEFAULT_RECIPE_WITH_BASE = "scbert"
# names of the command line -> names of transformers.TrainingArguments
SHORT_NAMES = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}


@dataclass
class PretrainDataArguments:
    """Which cells are learnt from, and where the model goes."""

    corpus: str = field(
        default=None, metadata={"help": "A corpus of scbert build, a file, or a folder of files."}
    )
    output: str = field(default=None, metadata={"help": "The model folder to write."})
    genes: str | None = field(
        default=None, metadata={"help": "Gene panel file, without a base; the expressed genes if left out."}
    )
    layer: str | None = field(default=None, metadata={"help": "Layer that holds the values; 'raw' for .raw."})
    input: str = field(default="auto", metadata={"help": "What the values are: auto, counts or log1p."})
    min_genes: int | None = field(
        default=None, metadata={"help": "Expressed genes a cell needs (200, or 0 for small panels)."}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of the cells not learnt from."})
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of a cell's expressed genes asked for."}
    )
    replace_probability: float = field(
        default=0.9, metadata={"help": "Probability that a gene asked for is hidden."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read neighbouring cells together, in bounded memory: for files too large for it."},
    )
    force: bool = field(default=False, metadata={"help": "Take files with few genes of the panel too."})
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted run of the same command."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing model folder."})

    def __post_init__(self):
        for name in ("corpus", "output"):
            if not getattr(self, name):
                raise InputError(f"Pretraining needs {name}: give it as an option, or in the recipe's data.")
        if Path(self.corpus).resolve() == Path(self.output).resolve():
            raise InputError(f"The output {self.output} is the corpus itself; choose another --output.")
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction must be above 0 and below 1; found {self.validation_fraction}."
            )
        if not 0 < self.mlm_probability <= 1 or not 0 <= self.replace_probability <= 1:
            raise InputError(
                "mlm_probability and replace_probability must be probabilities, the first above 0."
            )


@dataclass
class PretrainModelArguments:
    """What is trained: a base that goes on learning, or the recipe's size from random weights."""

    base: str | None = field(default=None, metadata={"help": "Model folder to go on from."})
    gene_vectors: str | None = field(
        default=None, metadata={"help": "Gene vectors (gene2vec) for the gene table, by symbol."}
    )
    gene_vectors_std: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation to bring the gene vectors to (their own if left out). gene2vec's, some "
            "0.2, drowns expression embeddings that start at 0.02."
        },
    )
    model: dict | str = field(
        default_factory=dict, metadata={"help": "JSON: fields of ScBertConfig, for a model without a base."}
    )
    tokenizer: dict | str = field(
        default_factory=dict, metadata={"help": "JSON: options of ScBertTokenizer, without a base."}
    )

    def __post_init__(self):
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else dict(value))


@dataclass
class PretrainTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of masked expression modelling, and the restarts."""

    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_steps: float = 10
    # a process killed while it writes one checkpoint can go back to the other
    save_total_limit: int = 2
    report_to: str = "none"
    remove_unused_columns: bool = False
    # a loss that is no number must be seen, not left out of the mean
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    dataloader_pin_memory: bool = False
    # every weight takes part in every step; a frozen gene table is no weight
    ddp_find_unused_parameters: bool | None = False
    per_device_eval_batch_size: int = 0
    packing: bool = field(
        default=False,
        metadata={
            "help": "Train on the cells of a batch one after another in a row, in place of padding them."
        },
    )
    cosine_restarts: dict | str = field(
        default_factory=dict,
        metadata={
            "help": "JSON: first_cycle, cycle_growth, warmup, min_rate, decay of cosine annealing with warm-up "
            "restarts, in epochs; takes the place of lr_scheduler_type. {} for the latter."
        },
    )

    def __post_init__(self):
        if isinstance(self.cosine_restarts, str):
            self.cosine_restarts = json.loads(self.cosine_restarts)
        unknown = set(self.cosine_restarts) - {"first_cycle", "cycle_growth", "warmup", "min_rate", "decay"}
        if unknown:
            raise InputError(f"cosine_restarts has no setting {', '.join(sorted(unknown))}.")
        if not self.per_device_eval_batch_size:
            self.per_device_eval_batch_size = 2 * self.per_device_train_batch_size
        super().__post_init__()


ARGUMENT_TYPES = (PretrainDataArguments, PretrainModelArguments, PretrainTrainingArguments)


def pretrain_settings(options: dict[str, Any]) -> dict[str, Any]:
    """
    Put what was given over its recipe; within ``model`` and ``tokenizer`` field by field.

    Parameters
    ----------
    options
        Settings by name, None where not given; ``recipe`` names a shipped recipe or a .json file.

    Returns
    -------
    dict
        Settings of `ARGUMENT_TYPES`.

    Raises
    ------
    InputError
        If a name or the recipe is unknown.

    Examples
    --------
    >>> pretrain_settings({"corpus": "cells.h5ad", "output": "model", "epochs": 2})["num_train_epochs"]
    2
    """
    given = {SHORT_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    for name in ("corpus", "output", "genes", "base", "gene_vectors"):
        if name in given:
            given[name] = str(given[name])
    default = DEFAULT_RECIPE_WITH_BASE if given.get("base") else DEFAULT_RECIPE
    settings = load_recipe(_recipe_file(given.pop("recipe", default)))
    known = {item.name for kind in ARGUMENT_TYPES for item in dataclasses.fields(kind) if item.init}
    unknown = sorted({*given, *settings} - known)
    if unknown:
        raise InputError(f"Unknown setting(s): {', '.join(unknown)}.")
    for name in ("model", "tokenizer"):
        part = given.pop(name, {})
        settings[name] = {**settings.get(name, {}), **(json.loads(part) if isinstance(part, str) else part)}
    return settings | given


def pretrain_arguments(
    settings: dict[str, Any],
) -> tuple[PretrainDataArguments, PretrainModelArguments, PretrainTrainingArguments]:
    """Make the dataclasses of `pretrain_settings`; wrong values are an `InputError`."""
    output = Path(str(settings.get("output", "")))
    partial = output.with_name(f"{output.name}.partial")
    try:
        return HfArgumentParser(ARGUMENT_TYPES).parse_dict(
            {"output_dir": str(partial / "checkpoints"), **settings}
        )
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"These settings do not work: {error}") from error


def _recipe_file(recipe: str) -> Path:
    path = Path(recipe) if str(recipe).endswith(".json") else PRETRAIN_RECIPES / f"{recipe}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in PRETRAIN_RECIPES.glob("*.json")))
        raise InputError(
            f"There is no pretraining recipe {str(recipe)!r}. Shipped ones: {shipped}; or give a .json file."
        )
    return path
