"""
Pretrain a model by masked expression modelling: ``scbert pretrain``, or

    python -m scbert.training.run_pretrain recipe.json --corpus CELLS --output DIR
    accelerate launch -m scbert.training.run_pretrain recipe.json ...
"""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed

from ..data.check_paths import check_output_folder
from ..data.corpus_manifest import is_corpus
from ..tokenization import InputError
from .callbacks import saving_on_terminate
from .corpus_data import load_corpus_data
from .finetune_arguments import parse_command_line
from .finetune_trainer import stop_progress
from .gene2vec import assign_gene_vectors, load_gene_vectors
from .pretrain_arguments import (
    ARGUMENT_TYPES,
    PretrainDataArguments,
    PretrainModelArguments,
    PretrainTrainingArguments,
    pretrain_arguments,
    pretrain_settings,
)
from .pretrain_data import PretrainData, load_pretrain_data
from .pretrain_trainer import MaskedExpressionTrainer, build_pretrainer
from .pretrained import (
    check_model_folder,
    load_masked_model,
    load_tokenizer,
    new_masked_model,
    quiet_transformers,
)
from .run_output import run_folder, whole_weights, write_model
from .run_record import RECORD
from .run_summary import versions

logger = logging.getLogger(__name__)


def pretrain(
    corpus: str | Path | None = None, output: str | Path | None = None, **options: Any
) -> dict[str, Any]:
    """
    Teach a model to predict hidden expression from the rest of the cell.

    Parameters
    ----------
    corpus
        Cells: a file (.h5ad, 10x .h5, .zarr) or a folder of them. Labels are not looked at.
    output
        The model folder to write. It is built in ``OUTPUT.partial`` and appears when complete.
    **options
        ``base`` (model folder to go on from), ``recipe`` (name or file), ``gene_vectors``, ``epochs``,
        ``batch_size``, ``seed``, ``resume``, ``overwrite``, and every field of `PretrainDataArguments`,
        `PretrainModelArguments` and `PretrainTrainingArguments` (so all of `transformers.TrainingArguments`).

    Returns
    -------
    dict
        What is written to ``metrics.json``: validation loss and masked accuracy, overall and by bin, each beside
        what always predicting a gene's commonest bin achieves.

    Raises
    ------
    InputError
        For every fault of the input that a user can mend.

    Examples
    --------
    >>> from scbert.training.run_pretrain import pretrain
    >>> summary = pretrain("cells.h5ad", "model", epochs=5)  # doctest: +SKIP
    >>> summary["masked_accuracy"], summary["control_masked_accuracy"]  # doctest: +SKIP
    """
    settings = pretrain_settings({"corpus": corpus, "output": output, **options})
    data_arguments, model_arguments, training = pretrain_arguments(settings)
    check_output_folder(data_arguments.output, data_arguments.overwrite)
    set_seed(training.seed)
    data = load_data(data_arguments, model_arguments, training)
    model = build_model(model_arguments, data, training)
    return train_and_save(settings, data_arguments, training, data, model)


def load_data(
    data: PretrainDataArguments, model: PretrainModelArguments, training: PretrainTrainingArguments
) -> PretrainData:
    """Read, bin and split the cells, with the base's tokenizer where there is a base."""
    if model.base:
        check_model_folder(model.base)
        if data.genes:
            raise InputError("--genes chooses the panel of a new model; a base has its own. Leave one out.")
    load = load_corpus_data if data.streaming or is_corpus(data.corpus) else load_pretrain_data
    return load(data, load_tokenizer(model.base) if model.base else model.tokenizer, training.seed)


def build_model(
    arguments: PretrainModelArguments, data: PretrainData, training: PretrainTrainingArguments
) -> PreTrainedModel:
    """The base, or the recipe's size with random weights; with gene vectors where they are given."""
    if arguments.base:
        model = load_masked_model(arguments.base)
    else:
        model = new_masked_model(arguments.model, data.tokenizer, training.seed)
    # most tokens are not asked for: decoding them would cost time and memory for nothing
    model.config.sparse_prediction = True
    if arguments.gene_vectors:
        vectors = load_gene_vectors(arguments.gene_vectors)
        if arguments.gene_vectors_std:
            vectors.matrix *= arguments.gene_vectors_std / vectors.matrix.std()
        report = assign_gene_vectors(model, data.tokenizer, vectors, seed=training.seed)
        logger.warning("Gene vectors: %s", report)
        data.report["gene_vectors"] = {
            "assigned": report.assigned, "initialised": report.initialised, "unused": report.unused,
        }  # fmt: skip
    return model


def train_and_save(
    settings: dict[str, Any],
    data_arguments: PretrainDataArguments,
    training: PretrainTrainingArguments,
    data: PretrainData,
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Train in the partial folder, put the figures beside the model, and give it its name."""
    with run_folder(settings, data_arguments, training, data) as (folder, checkpoint):
        start = time.perf_counter()
        trainer = train(build_pretrainer(model, data, data_arguments, training), checkpoint)
        seconds = time.perf_counter() - start
        with quiet_transformers():
            scores = trainer.evaluate()
        summary = summarise(settings, data, trainer, scores, seconds)
        weights = whole_weights(trainer)
        if training.process_index == 0:
            save(folder, trainer, data, summary, weights)
    return summary


def train(trainer: MaskedExpressionTrainer, checkpoint: Path | None) -> MaskedExpressionTrainer:
    """Train to the end, from a checkpoint if there is one."""
    try:
        with quiet_transformers(), saving_on_terminate(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        stop_progress(trainer)
    return trainer


def summarise(
    settings: dict[str, Any],
    data: PretrainData,
    trainer: MaskedExpressionTrainer,
    scores: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Everything a reader of the model has to know, as plain JSON; the figures that count come first."""
    found = {name.removeprefix("eval_"): value for name, value in scores.items()}
    speed = ("runtime", "samples_per_second", "steps_per_second", "epoch")
    state = trainer.state
    return {
        **{name: value for name, value in found.items() if name not in speed},
        "cells": data.report["cells"],
        "genes": len(data.tokenizer.gene_panel),
        "data": data.report,
        "training": {
            "epochs": state.epoch,
            "steps": state.global_step,
            "processes": trainer.args.world_size,
            "device": str(trainer.args.device),
            "parameters": trainer.model.num_parameters(),
            "history": state.log_history,
        },
        "seconds": seconds,
        "settings": settings,
        "versions": versions(),
    }


def save(
    folder: Path,
    trainer: MaskedExpressionTrainer,
    data: PretrainData,
    summary: dict[str, Any],
    weights: dict[str, Any],
) -> None:
    """Write weights, config, code, tokenizer and figures; take away what only training needed."""
    write_model(folder, trainer, data.tokenizer, weights)
    text = json.dumps(summary, indent=2, ensure_ascii=False, default=str)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    logs = Path(trainer.args.output_dir) / "runs"
    if logs.is_dir():
        # tensorboard's own place for them lies among the checkpoints
        os.replace(logs, folder / "runs")
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    (folder / RECORD).unlink()


def main() -> int:
    """Entry of ``python -m scbert.training.run_pretrain``; returns the exit code."""
    try:
        summary = pretrain(**parse_command_line(sys.argv[1:], ARGUMENT_TYPES, "run_pretrain"))
    except (InputError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: value for name, value in summary.items() if isinstance(value, float)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
