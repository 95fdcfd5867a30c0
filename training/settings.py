"""Settings of a run, whatever it trains: options over a recipe, as dataclasses for HfArgumentParser."""

# HfArg makes a dataclass field, with a text of help
# ruff: noqa: RUF009

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from ..tokenization import InputError

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = ("data", "model", "tokenizer", "training")
# names of the command line -> names of transformers.TrainingArguments
SHORT_NAMES = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
# settings that say how to run, not what is computed: they may differ when a run is resumed. Of a corpus the cells are
# compared: it has a new path every time it comes from memory
NOT_COMPARED = {"resume", "overwrite", "cache_frozen", "dataloader_num_workers", "disable_tqdm", "use_cpu"}
NOT_COMPARED |= {"corpus"}
# numbers that transformers counts with before it looks at them
AT_LEAST_1 = ("per_device_train_batch_size", "gradient_accumulation_steps")
AT_LEAST_0 = ("num_train_epochs", "dataloader_num_workers", "early_stopping_patience", "seed")


@dataclass
class RunDataArguments:
    """Which cells are learnt from, and where the model goes."""

    output: str = HfArg(default=None, help="The model folder to write.")
    genes: str | None = HfArg(
        default=None, help="Gene panel file, without a base; the expressed genes if left out."
    )
    layer: str | None = HfArg(default=None, help="Layer that holds the values; 'raw' for .raw.")
    input: str = HfArg(default="auto", help="What the values are: auto, counts or log1p.")
    resume: bool = HfArg(default=False, help="Continue an interrupted run of the same command.")
    overwrite: bool = HfArg(default=False, help="Replace an existing model folder.")

    def require(self, cells: str, *more: str) -> None:
        """Refuse a setting that is missing, and an output that is the cells themselves."""
        for name in (cells, *more, "output"):
            if not getattr(self, name):
                raise InputError(
                    f"The setting {name} is missing: give it as an option, or in the recipe's data."
                )
        if Path(getattr(self, cells)).resolve() == Path(self.output).resolve():
            raise InputError(f"The output {self.output} is the {cells} itself; choose another output.")


@dataclass
class RunModelArguments:
    """What is trained: a pretrained base, or the recipe's size from random weights."""

    base: str | None = HfArg(default=None, help="Model to start from: a folder, or a name on the Hub.")
    model: dict | str = HfArg(
        default_factory=dict, help="JSON: fields of ScBertConfig, for a model without a base."
    )
    tokenizer: dict | str = HfArg(
        default_factory=dict, help="JSON: options of ScBertTokenizer, for a model without a base."
    )

    def __post_init__(self):
        self.model, self.tokenizer = read_json(self.model), read_json(self.tokenizer)


@dataclass
class RunTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults that all runs share."""

    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    report_to: str = "none"
    remove_unused_columns: bool = False
    # a loss that is no number must be seen, not left out of the mean
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    dataloader_pin_memory: bool = False
    # whatever is trained is part of every forward
    ddp_find_unused_parameters: bool | None = False
    per_device_eval_batch_size: int = 0

    def __post_init__(self):
        for name in (*AT_LEAST_1, *AT_LEAST_0):
            least = int(name in AT_LEAST_1)
            if getattr(self, name, least) < least:
                raise InputError(f"{name} must be {least} or more; found {getattr(self, name)}.")
        if not self.per_device_eval_batch_size:
            self.per_device_eval_batch_size = 2 * self.per_device_train_batch_size
        # left open, transformers takes its own verbosity for an answer; bars only show in a terminal anyway
        self.disable_tqdm = bool(self.disable_tqdm)
        super().__post_init__()
        started = processes_launched()
        if started > 1 and self.world_size == 1:
            raise InputError(
                f"A launcher started {started} processes that do not form a group: each would do the whole run and "
                "write the same output. Launch them with torchrun, or with accelerate's types MULTI_GPU or FSDP."
            )


@dataclass(frozen=True)
class RunKind:
    """
    What is particular about the settings of one kind of run.

    The name is the verb, and the end of the module's name; `argument_types` are its dataclasses of data, model and
    training; `renamed` leads from recipes of earlier versions to those that took their place.
    """

    name: str
    argument_types: tuple[type, type, type]
    recipes: Path
    default_recipe: str
    default_with_base: str
    renamed: dict[str, str] = field(default_factory=dict)


def parse(kind: RunKind, options: dict[str, Any]) -> tuple[dict[str, Any], Any, Any, Any]:
    """Options over their recipe, merged, and as the three dataclasses; an `InputError` where these do not work."""
    settings = merge_settings(kind, options)
    output = Path(str(settings.get("output", "")))
    checkpoints = output.with_name(f"{output.name}.partial") / "checkpoints"
    try:
        arguments = {"output_dir": str(checkpoints), **settings}
        return settings, *HfArgumentParser(kind.argument_types).parse_dict(arguments)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"These settings do not work: {error}") from error


def merge_settings(kind: RunKind, options: dict[str, Any]) -> dict[str, Any]:
    """
    Put what was given over its recipe; within ``model`` and ``tokenizer`` field by field.

    Options are settings by name, None where not given. ``recipe`` names the recipe; `SHORT_NAMES`, ``device`` and
    ``dtype`` are understood; an unknown name or recipe is an `InputError`.
    """
    given = {SHORT_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    given = device_settings(given.pop("device", None), given.pop("dtype", None)) | given
    default = kind.default_with_base if given.get("base") else kind.default_recipe
    recipe = given.pop("recipe", default)
    if str(recipe) in kind.renamed:
        raise InputError(f"The recipe {recipe!r} is no more; {kind.renamed[str(recipe)]!r} took its place.")
    settings = load_recipe(recipe, kind.recipes)
    known = {item.name for part in kind.argument_types for item in dataclasses.fields(part) if item.init}
    unknown = sorted({*given, *settings} - known)
    if unknown:
        raise InputError(f"Unknown setting(s): {', '.join(unknown)}.")
    for name in ("model", "tokenizer"):
        settings[name] = {**settings.get(name, {}), **read_json(given.pop(name, {}))}
    return settings | given


def load_recipe(recipe: str | Path, folder: Path = RECIPES) -> dict[str, Any]:
    """
    Settings of a recipe, which has the sections ``data``, ``model``, ``tokenizer`` and ``training``.

    It is a .json file, or one of those that ship, by its name in `folder`. The levels ``data`` and ``training`` are
    gone in what comes back; ``model`` and ``tokenizer`` stay dicts. Other sections, or no file, are an `InputError`.

    Examples
    --------
    >>> load_recipe("scbert")["learning_rate"]
    0.0001
    """
    path = Path(recipe) if str(recipe).endswith(".json") else folder / f"{recipe}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise InputError(
            f"There is no recipe {str(recipe)!r}. Shipped ones: {shipped}; or give a .json file."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise InputError(f"{path} must hold an object with the sections {', '.join(SECTIONS)}.")
    unknown = sorted(set(content) - set(SECTIONS))
    if unknown:
        raise InputError(
            f"{path} has the section(s) {', '.join(unknown)}; a recipe has {', '.join(SECTIONS)}."
        )
    nested = {name: content[name] for name in ("model", "tokenizer") if name in content}
    return {**content.get("data", {}), **content.get("training", {}), **nested}


def run_command(kind: RunKind, job: Callable[..., dict[str, Any]]) -> int:
    """Do the job with the settings of the command line, print the scores it returns; the exit code."""
    try:
        summary = job(**parse_command_line(kind, sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    # of several processes, some return no whole summary
    if "settings" in summary:
        print(json.dumps({name: value for name, value in summary.items() if isinstance(value, float)}))
    return 0


def parse_command_line(kind: RunKind, arguments: list[str]) -> dict[str, Any]:
    """
    Read ``[recipe.json] --name value ...`` into the settings that were given.

    Any field of the kind's dataclasses is an option, hence all of `transformers.TrainingArguments`.
    """
    recipe = {"recipe": arguments[0]} if arguments and not arguments[0].startswith("-") else {}
    parser = HfArgumentParser(
        kind.argument_types,
        prog=f"python -m scbert.training.run_{kind.name}",
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

    The device is ``"auto"`` (every GPU that ``CUDA_VISIBLE_DEVICES`` shows, else the CPU), ``"cpu"`` or ``"cuda"``; the
    precision ``"float32"`` or ``"bfloat16"`` (under autocast; weights stay in float32), by default the recipe's. Others
    are an `InputError`.

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
    # without a GPU transformers refuses bfloat16, and makes no group of processes, unless the CPU is asked for
    needs_asking = dtype == "bfloat16" or processes_launched() > 1
    settings: dict[str, Any] = {}
    if device == "cpu" or (needs_asking and not torch.accelerator.is_available()):
        settings["use_cpu"] = True
    if dtype in ("float32", "bfloat16"):
        settings["bf16"] = dtype == "bfloat16"
    return settings


def processes_launched() -> int:
    """Processes that a launcher (accelerate, torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the result, as JSON holds them: a resumed run must have the same."""
    kept = {name: value for name, value in sorted(settings.items()) if name not in NOT_COMPARED}
    return json.loads(json.dumps(kept, default=str))


def read_json(value: dict[str, Any] | str) -> dict[str, Any]:
    """A dict from a dict or its JSON text; an `InputError` where it is none."""
    try:
        return dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError) as error:
        raise InputError(
            f'A JSON object was needed, such as {{"name": 1}}; found {value!r} ({error}).'
        ) from error
