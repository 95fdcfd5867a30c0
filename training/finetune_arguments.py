"""Settings of a fine-tuning run: dataclasses for HfArgumentParser, and the recipes that fill them."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from ..tokenization import InputError

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = ("data", "model", "tokenizer", "training")
# without a base: a size that a CPU trains; with one, what the paper does with its pretrained weights
DEFAULT_RECIPE = "small"
DEFAULT_RECIPE_WITH_BASE = "scbert"
# settings that say how to run, not what is computed: they may differ when a run is resumed
NOT_COMPARED = {"resume", "overwrite", "cache_frozen", "dataloader_num_workers", "disable_tqdm", "use_cpu"}


@dataclass
class DataArguments:
    """Which cells are learnt, and where the model goes."""

    reference: str = field(
        default=None, metadata={"help": "Labelled cells: .h5ad, 10x .h5 or folder, .zarr."}
    )
    label_key: str = field(default=None, metadata={"help": "Column of obs that holds the cell types."})
    output: str = field(default=None, metadata={"help": "The model folder to write."})
    layer: str | None = field(default=None, metadata={"help": "Layer that holds the values; 'raw' for .raw."})
    input: str = field(default="auto", metadata={"help": "What the values are: auto, counts or log1p."})
    min_genes: int | None = field(
        default=None, metadata={"help": "Expressed genes a training cell needs (200, or 0 for small panels)."}
    )
    test: str | None = field(
        default=None, metadata={"help": "Labelled cells to test on, in a file of their own."}
    )
    test_key: str | None = field(
        default=None, metadata={"help": "Column of obs that says train, validation or test for each cell."}
    )
    test_fraction: float = field(default=0.2, metadata={"help": "Share of the labelled cells to test on."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of the labelled cells that choose the best epoch."}
    )
    genes: str | None = field(
        default=None, metadata={"help": "Gene panel file, without a base; the expressed genes if left out."}
    )
    top_genes: int | None = field(
        default=None,
        metadata={
            "help": "Without a base or a panel file: only so many most variable genes of the cells learnt (0: all)."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Continue an interrupted run of the same command."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing model folder."})

    def __post_init__(self):
        for name in ("reference", "label_key", "output"):
            if not getattr(self, name):
                raise InputError(f"Fine-tuning needs {name}: give it as an option, or in the recipe's data.")
        _check_paths(self)
        if self.test and self.test_key:
            raise InputError("Give --test FILE or --test-key COLUMN, not both.")
        for name in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1; found {getattr(self, name)}.")
        if not self.validation_fraction > 0:
            raise InputError("validation_fraction must be above 0: validation cells choose the best epoch.")
        if self.test_fraction + self.validation_fraction >= 1:
            raise InputError("test_fraction and validation_fraction leave no cells to train on.")


@dataclass
class ModelArguments:
    """What is trained: a pretrained base, or the recipe's size from random weights."""

    base: str | None = field(default=None, metadata={"help": "Pretrained model folder."})
    train_all: bool | None = field(
        default=None,
        metadata={
            "help": "Train every weight. Default: yes from random weights; with a base only the final norm, "
            "the block before the last and the head."
        },
    )
    frozen_layers: int = field(
        default=0,
        metadata={"help": "First layers of a base to keep as they are when every other weight is trained."},
    )
    freeze_encoder: bool = field(
        default=False,
        metadata={
            "help": "Train the final norm and the head of a base alone; its states are computed once a cell."
        },
    )
    model: dict | str = field(
        default_factory=dict, metadata={"help": "JSON: fields of ScBertConfig, for a model without a base."}
    )
    tokenizer: dict | str = field(
        default_factory=dict,
        metadata={"help": "JSON: options of ScBertTokenizer, for a model without a base."},
    )

    def __post_init__(self):
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else dict(value))


@dataclass
class FinetuneTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of cell-type annotation, and a few settings more."""

    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    # the best, and the last two: a process killed while it writes one can go back to the other
    save_total_limit: int = 3
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "macro_f1"
    greater_is_better: bool = True
    report_to: str = "none"
    remove_unused_columns: bool = False
    # a loss that is no number must be seen, not left out of the mean
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    dataloader_pin_memory: bool = False
    # whatever is trained is part of every forward
    ddp_find_unused_parameters: bool = False
    per_device_eval_batch_size: int = 0
    early_stopping_patience: int = field(
        default=10, metadata={"help": "Epochs without a better validation macro-F1 before the end; 0: never."}
    )
    class_balance: str = field(
        default="none",
        metadata={
            "help": "none, weights (loss weighted by inverse class size) or oversample (rare classes)."
        },
    )
    assigned_precision: float = field(
        default=0.95,
        metadata={
            "help": "Wanted share of right labels among the assigned cells; chooses the threshold of 'unassigned' "
            "on validation cells, never below 0.5."
        },
    )
    encoder_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of all but the head's dense layers, whose weights belong to one gene each; the "
            "same as learning_rate by default."
        },
    )
    solved_head: str = field(
        default="none",
        metadata={
            "help": "l1 or l2: the head's output layer is no result of steps but of a logistic regression with that "
            "penalty, and nothing else is trained; none: train."
        },
    )
    head_l1: float = field(
        default=0.0,
        metadata={
            "help": "L1 penalty on the weights of the head's output layer, beside a mean loss; keeps genes that hardly "
            "matter from having a say, which carries over to other cohorts better."
        },
    )
    gene_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Chance of an expressed gene to be hidden from a training step; against overfitting."
        },
    )
    cache_frozen: str = field(
        default="auto", metadata={"help": "Where frozen layers' outputs are kept: auto, memory, disk or off."}
    )

    def __post_init__(self):
        for name, choices in (
            ("class_balance", ("none", "weights", "oversample")),
            ("cache_frozen", ("auto", "memory", "disk", "off")),
            ("solved_head", ("none", "l1", "l2")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}; found {getattr(self, name)!r}."
                )
        if not 0 < self.assigned_precision <= 1:
            raise InputError(
                f"assigned_precision must be above 0 and at most 1; found {self.assigned_precision}."
            )
        if not 0 <= self.gene_dropout < 1:
            raise InputError(f"gene_dropout must be from 0 to below 1; found {self.gene_dropout}.")
        if self.encoder_learning_rate is not None and self.encoder_learning_rate < 0:
            raise InputError(f"encoder_learning_rate cannot be negative; found {self.encoder_learning_rate}.")
        if self.head_l1 < 0:
            raise InputError(f"head_l1 cannot be negative; found {self.head_l1}.")
        if not self.per_device_eval_batch_size:
            self.per_device_eval_batch_size = 2 * self.per_device_train_batch_size
        super().__post_init__()


ARGUMENT_TYPES = (DataArguments, ModelArguments, FinetuneTrainingArguments)


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """
    Read a recipe: sections ``data``, ``model``, ``tokenizer`` and ``training`` of settings.

    Parameters
    ----------
    recipe
        Name of a shipped recipe (``"scbert"``, ``"small"``, ``"demo"``, ...) or a .json file.

    Returns
    -------
    dict
        The settings without the levels ``data`` and ``training``; ``model`` and ``tokenizer`` stay dicts.

    Raises
    ------
    InputError
        If there is no such recipe, or it has other sections.

    Examples
    --------
    >>> load_recipe("scbert")["learning_rate"]
    0.0001
    """
    path = Path(recipe) if str(recipe).endswith(".json") else RECIPES / f"{recipe}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
        raise InputError(
            f"There is no recipe {str(recipe)!r}. Shipped ones: {shipped}; or give a .json file."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise InputError(f"{path} must hold an object with the sections {', '.join(SECTIONS)}.")
    unknown = sorted(set(content) - set(SECTIONS))
    if unknown:
        raise InputError(
            f"{path} has the section(s) {', '.join(unknown)}; a recipe has {', '.join(SECTIONS)}."
        )
    nested = {name: content[name] for name in ("model", "tokenizer") if name in content}
    return {**content.get("data", {}), **content.get("training", {}), **nested}


def merge_settings(given: dict[str, Any]) -> dict[str, Any]:
    """
    Put what was given over its recipe; within ``model`` and ``tokenizer`` field by field.

    Parameters
    ----------
    given
        Settings by name; ``recipe`` names the recipe. None means not given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    default = DEFAULT_RECIPE_WITH_BASE if given.get("base") else DEFAULT_RECIPE
    settings = load_recipe(given.pop("recipe", default))
    for name in ("model", "tokenizer"):
        part = given.pop(name, {})
        part = json.loads(part) if isinstance(part, str) else part
        settings[name] = {**settings.get(name, {}), **part}
    return settings | given


def build_arguments(
    settings: dict[str, Any],
) -> tuple[DataArguments, ModelArguments, FinetuneTrainingArguments]:
    """Make the dataclasses of merged settings; unknown names and wrong values are an `InputError`."""
    partial = Path(str(settings.get("output", ""))).with_name(
        f"{Path(str(settings.get('output', ''))).name}.partial"
    )
    settings = {"output_dir": str(partial / "checkpoints"), **settings}
    try:
        return HfArgumentParser(ARGUMENT_TYPES).parse_dict(settings)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"These settings do not work: {error}") from error


def parse_command_line(
    arguments: list[str], kinds: tuple[type, ...] = ARGUMENT_TYPES, module: str = "run_finetune"
) -> dict[str, Any]:
    """
    Read ``[recipe.json] --name value ...`` into the settings that were given.

    Any field of the dataclasses `kinds` is an option, hence all of `transformers.TrainingArguments`.
    """
    recipe = {"recipe": arguments[0]} if arguments and not arguments[0].startswith("-") else {}
    parser = HfArgumentParser(
        kinds,
        prog=f"python -m scbert.training.{module}",
        usage="%(prog)s [RECIPE.json] [--name value ...]",
        formatter_class=argparse.HelpFormatter,
    )
    for action in parser._actions:
        # what is not given stays out, so that the recipe decides
        action.default, action.required = argparse.SUPPRESS, False
        # of `dict | str` HfArgumentParser keeps the dict, which reads no text
        action.type = json.loads if action.type is dict else action.type
    return {**recipe, **vars(parser.parse_args(arguments[len(recipe) :]))}


def device_settings(device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """
    The settings of `transformers.TrainingArguments` that put a run on a device, in a precision.

    Parameters
    ----------
    device
        ``"auto"`` (every GPU that ``CUDA_VISIBLE_DEVICES`` shows, else the CPU), ``"cpu"`` or ``"cuda"``.
    dtype
        ``"float32"`` or ``"bfloat16"`` (under autocast; weights stay in float32); the recipe's if left out.

    Raises
    ------
    InputError
        If there is no such device or precision.

    Examples
    --------
    >>> device_settings("cpu", "bfloat16")
    {'use_cpu': True, 'bf16': True}
    """
    if device not in (None, "auto", "cpu", "cuda"):
        raise InputError(
            f"Training takes the device auto, cpu or cuda; found {device!r}. Which GPUs cuda means is said by the "
            "environment variable CUDA_VISIBLE_DEVICES."
        )
    if dtype not in (None, "auto", "float32", "bfloat16"):
        raise InputError(f"dtype must be auto, float32 or bfloat16; found {dtype!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("The device cuda was asked for, and torch sees no CUDA GPU here.")
    # transformers refuses bfloat16 where there is no GPU, unless the CPU is asked for
    on_cpu = device == "cpu" or (dtype == "bfloat16" and not torch.cuda.is_available())
    settings: dict[str, Any] = {"use_cpu": True} if on_cpu else {}
    if dtype in ("float32", "bfloat16"):
        settings["bf16"] = dtype == "bfloat16"
    return settings


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the result, as JSON holds them: a resumed run must have the same."""
    kept = {name: value for name, value in sorted(settings.items()) if name not in NOT_COMPARED}
    return json.loads(json.dumps(kept, default=str))


def field_names() -> set[str]:
    """Every setting's name."""
    return {item.name for kind in ARGUMENT_TYPES for item in dataclasses.fields(kind) if item.init}


def _check_paths(data: DataArguments):
    output, reference = Path(data.output).resolve(), Path(data.reference).resolve()
    if output == reference:
        raise InputError(f"The output {data.output} is the reference itself; choose another --output.")
