"""
Fine-tune a model on labelled cells: ``scbert finetune``, or

    python -m scbert.training.run_finetune recipe.json --reference REF.h5ad --label_key cell_type --output DIR
    accelerate launch -m scbert.training.run_finetune recipe.json ...
"""

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from ..data.check_paths import check_output_folder
from ..tokenization import InputError
from .callbacks import saving_on_terminate
from .finetune_arguments import (
    DataArguments,
    FinetuneTrainingArguments,
    ModelArguments,
    build_arguments,
    device_settings,
    field_names,
    merge_settings,
    parse_command_line,
)
from .finetune_data import FinetuneData, load_data
from .finetune_trainer import (
    CellTrainer,
    build_trainer,
    freeze_first_layers,
    freeze_for_finetuning,
    freeze_whole_encoder,
    stop_progress,
)
from .frozen_prefix import attach_frozen_prefix
from .pretrained import check_model_folder, load_base, load_tokenizer, new_model, quiet_transformers
from .run_output import run_folder, whole_weights, write_model
from .run_record import RECORD
from .run_summary import score_control, score_splits, summarise, write_summary
from .solved_head import solve_head

logger = logging.getLogger(__name__)

# names of the command line -> names of transformers.TrainingArguments
SHORT_NAMES = {"epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}


def finetune(
    reference: str | Path | None = None,
    label_key: str | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Teach a model the cell types of a labelled reference.

    Parameters
    ----------
    reference
        Labelled cells: .h5ad, 10x .h5 or folder, .zarr.
    label_key
        Column of obs that holds the cell types.
    output
        The model folder to write. It is built in ``OUTPUT.partial`` and appears when complete.
    **options
        ``base`` (model folder), ``recipe`` (name or file), ``epochs``, ``batch_size``, ``seed``, ``device`` and
        ``dtype`` (see `device_settings`), ``resume``, ``overwrite``, and every field of `DataArguments`,
        `ModelArguments` and `FinetuneTrainingArguments` (so all of `transformers.TrainingArguments`). They go over
        the recipe's.

    Returns
    -------
    dict
        What is written to ``metrics.json``.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> from scbert.training.run_finetune import finetune
    >>> summary = finetune("reference.h5ad", "cell_type", "model", epochs=5)  # doctest: +SKIP
    >>> summary["test"]["macro_f1"]  # doctest: +SKIP
    """
    settings, data_arguments, model_arguments, training_arguments = parse(
        {"reference": reference, "label_key": label_key, "output": output, **options}
    )
    check_output(data_arguments)
    set_seed(training_arguments.seed)
    logger.info(
        "Fine-tuning on %s in %s.",
        training_arguments.device,
        "bfloat16" if training_arguments.bf16 else "float32",
    )
    data = load(data_arguments, model_arguments, training_arguments)
    model = build_model(model_arguments, data, training_arguments.seed)
    return train_and_save(settings, data_arguments, training_arguments, data, model)


def parse(
    options: dict[str, Any],
) -> tuple[dict[str, Any], DataArguments, ModelArguments, FinetuneTrainingArguments]:
    """Options over their recipe, as the merged settings and as dataclasses."""
    given = {SHORT_NAMES.get(name, name): value for name, value in options.items() if value is not None}
    given = device_settings(given.pop("device", None), given.pop("dtype", None)) | given
    paths = ("reference", "output", "base", "test", "genes")
    given |= {name: str(given[name]) for name in paths if name in given}
    unknown = sorted(set(given) - field_names() - {"recipe"})
    if unknown:
        raise InputError(f"Unknown setting(s): {', '.join(unknown)}.")
    settings = merge_settings(given)
    return settings, *build_arguments(settings)


def check_output(data: DataArguments) -> None:
    """Refuse an output that cannot be written, before the slow work."""
    check_output_folder(data.output, data.overwrite)


def load(data: DataArguments, model: ModelArguments, training: FinetuneTrainingArguments) -> FinetuneData:
    """Read, choose, split and bin the cells, with the base's tokenizer where there is a base."""
    if model.base:
        check_model_folder(model.base)
        if data.genes:
            raise InputError(
                "--genes chooses the panel of a new model; a base has its own. Leave one of them out."
            )
    return load_data(data, load_tokenizer(model.base) if model.base else model.tokenizer, training.seed)


def build_model(arguments: ModelArguments, data: FinetuneData, seed: int) -> PreTrainedModel:
    """The base with a new head, frozen as the original is; or the recipe's size with random weights."""
    if not arguments.base:
        return new_model(arguments.model, data.tokenizer, data.classes, seed)
    model = load_base(arguments.base, data.classes, arguments.model)
    if arguments.freeze_encoder:
        freeze_whole_encoder(model)
    elif arguments.train_all:
        freeze_first_layers(model, arguments.frozen_layers)
    else:
        freeze_for_finetuning(model)
    return model


def train_and_save(
    settings: dict[str, Any],
    data_arguments: DataArguments,
    training: FinetuneTrainingArguments,
    data: FinetuneData,
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Train in the partial folder, score, put the figures beside the model, and give it its name."""
    with run_folder(settings, data_arguments, training, data) as (folder, checkpoint):
        start = time.perf_counter()
        trainer = train(model, data, training, checkpoint)
        seconds = {"training": time.perf_counter() - start}
        scores = score_splits(trainer, data)
        seconds["scoring"] = time.perf_counter() - start - seconds["training"]
        summary, weights = scores, whole_weights(trainer)
        if training.process_index == 0:
            control = score_control(data, data_arguments.layer, training.seed)
            summary = summarise(settings, data, trainer, scores, control, seconds)
            save(folder, trainer, data, summary, weights)
    return summary


def train(
    model: PreTrainedModel, data: FinetuneData, arguments: FinetuneTrainingArguments, checkpoint: Path | None
) -> CellTrainer:
    """Train to the best validation macro-F1; the trainer that comes back holds the best weights."""
    if arguments.solved_head != "none":
        learnt = data.splits["train"]
        solve_head(model, data.tokenizer, learnt.bins, learnt.targets, arguments.solved_head, arguments.seed)
        return build_trainer(model, data, arguments)
    trainer = build_trainer(model, data, arguments)
    n_cells = len(data.splits["train"]) + len(data.splits["validation"])
    # one process that drives several GPUs copies the model to each
    storage = arguments.cache_frozen if arguments.n_gpu <= 1 else "off"
    cache = attach_frozen_prefix(model.scbert, storage, n_cells, arguments.output_dir)
    try:
        with quiet_transformers(), saving_on_terminate(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop_progress(trainer)
        if cache is not None:
            cache.detach()
    return trainer


def save(
    folder: Path, trainer: CellTrainer, data: FinetuneData, summary: dict[str, Any], weights: dict[str, Any]
) -> None:
    """Write weights, config, code, tokenizer and figures; take away what only training needed."""
    write_model(folder, trainer, data.tokenizer, weights)
    write_summary(folder, summary)
    shutil.rmtree(trainer.args.output_dir)
    (folder / RECORD).unlink()


def main() -> int:
    """Entry of ``python -m scbert.training.run_finetune``; returns the exit code."""
    try:
        summary = finetune(**parse_command_line(sys.argv[1:]))
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    if "settings" in summary:
        shown = {name: value for name, value in summary.items() if isinstance(value, float)}
        print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
