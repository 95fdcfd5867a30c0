"""
Pretrain a model by masked expression modelling: ``scbert pretrain``, or

    python -m scbert.training.run_pretrain recipe.json --corpus CELLS --output DIR
    accelerate launch -m scbert.training.run_pretrain recipe.json ...
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ..data.paths import check_output_folder
from ..modeling_scbert import ScBertForMaskedExpression
from ..tokenization import InputError
from ..trained_model.model_folder import quiet_transformers, versions
from .gene2vec import assign_gene_vectors, load_gene_vectors
from .initial_model import base_tokenizer, load_masked_model, new_config, start_cell
from .pretrain_arguments import (
    PRETRAIN,
    PretrainDataArguments,
    PretrainModelArguments,
    PretrainTrainingArguments,
)
from .pretrain_data import PretrainData, load_data
from .pretrain_trainer import MaskedExpressionTrainer, build_pretrainer
from .run_folder import finish, run_folder
from .settings import parse, run_command

logger = logging.getLogger(__name__)

# a lead over guessing averages that is no accident of a few cells
LEAD = 0.005


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
    >>> summary["masked_accuracy"], summary["baseline_masked_accuracy"]  # doctest: +SKIP
    """
    options = {"corpus": corpus, "output": output, **options}
    settings, data_arguments, model_arguments, training = parse(PRETRAIN, options)
    check_output_folder(data_arguments.output, data_arguments.overwrite)
    set_seed(training.seed)
    data = load(data_arguments, model_arguments, training)
    model = build_model(model_arguments, data, training)
    return train_and_save(settings, data_arguments, training, data, model)


def load(
    data: PretrainDataArguments, model: PretrainModelArguments, training: PretrainTrainingArguments
) -> PretrainData:
    """Read, bin and split the cells, with the base's tokenizer where there is a base."""
    tokenizer = base_tokenizer(model.base, data.genes) if model.base else model.tokenizer
    return load_data(data, tokenizer, training.seed)


def build_model(
    arguments: PretrainModelArguments, data: PretrainData, training: PretrainTrainingArguments
) -> PreTrainedModel:
    """The base, or the recipe's size with random weights; with gene vectors or axes of cells where asked for."""
    if arguments.base:
        model = load_masked_model(arguments.base)
    else:
        model = ScBertForMaskedExpression(new_config(arguments.model, data.tokenizer, training.seed))
    # most tokens are not asked for: decoding them would cost time and memory for nothing
    model.config.sparse_prediction = True
    if arguments.gene_vectors:
        vectors = load_gene_vectors(arguments.gene_vectors)
        if arguments.gene_vectors_std:
            vectors.matrix *= arguments.gene_vectors_std / vectors.matrix.std()
        data.report["gene_vectors"] = assign_gene_vectors(model, data.tokenizer, vectors, seed=training.seed)
    if arguments.n_cell_axes:
        # read by those who need it only
        from .cell_axes import cell_axes

        try:
            axes = cell_axes(data.cells_by_file, arguments.n_cell_axes)
        except ValueError as error:
            raise InputError(f"{error} Leave n_cell_axes out, or add cells.") from error
        start_cell(model, axes.vectors, axes.center)
        n_genes = int(axes.vectors.any(axis=1).sum())
        logger.info(
            "The gene table starts from %d axes of cells, of %d genes.", axes.vectors.shape[1], n_genes
        )
        data.report["cell_axes"] = {"axes": axes.vectors.shape[1], "genes": n_genes}
    decoder = getattr(model, "cell_decoder", None)
    if decoder is not None and not decoder.bias.any():
        decoder.bias.data.copy_(torch.from_numpy(data.mean_cell()))
    if decoder is None and model.config.pooling == "cell":
        # nothing asks for the cell: what is trained must be part of every step
        model.scbert.cell.requires_grad_(False)
    return model


def train_and_save(
    settings: dict[str, Any],
    data_arguments: PretrainDataArguments,
    training: PretrainTrainingArguments,
    data: PretrainData,
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Train in the partial folder, put the figures beside the model, and give it its name."""
    with run_folder(settings, data_arguments, training, data.fingerprint()) as (folder, checkpoint):
        start = time.perf_counter()
        trainer = build_pretrainer(model, data, data_arguments, training)
        trainer.run(checkpoint)
        seconds = time.perf_counter() - start
        with quiet_transformers():
            scores = trainer.evaluate()
        summary = summarise(settings, data, trainer, scores, seconds)
        # every process must ask: under FSDP each holds a part
        weights = trainer.accelerator.get_state_dict(trainer.model)
        if training.process_index == 0:
            finish(folder, training.output_dir, trainer.model, data.tokenizer, weights, summary)
    if training.process_index == 0:
        log_pretraining(summary, data_arguments.output)
    return summary


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


def log_pretraining(summary: dict[str, Any], output: str | Path) -> None:
    """Log what was learnt without labels, how good it is beside knowing averages alone, and what to do next."""
    training = summary["training"]
    logger.info(
        f"Learnt from {summary['cells']['train']:,} cells and {summary['genes']:,} genes in {summary['seconds']:.0f} s "
        f"({training['steps']:,} steps, {training['epochs']:.3g} passes over the cells)."
    )
    found, of_gene, of_cell = (
        summary[f"{whose}masked_accuracy"] for whose in ("", "baseline_", "cell_baseline_")
    )
    logger.info(
        f"Of {summary['masked_tokens']:,} hidden values, in cells that were not learnt from, {found:.1%} were guessed "
        f"right; always saying a gene's commonest value is right for {of_gene:.1%}, a cell's for {of_cell:.1%}."
    )
    if "cell_loss" in summary:
        gain = summary["baseline_cell_loss"] - summary["cell_loss"]
        logger.info(f"From its vector a whole cell is told {gain:.3f} nats better than by the mean cell.")
    if found <= max(of_gene, of_cell) + LEAD:
        logger.warning(
            "The model guesses no better than that: it has learnt averages at most. Let it learn for longer (epochs, "
            "--epochs), or from more cells."
        )
    logger.info("Next: scbert finetune REF.h5ad --label-key KEY --base %s --output my_model", output)


def main() -> int:
    """Entry of ``python -m scbert.training.run_pretrain``; returns the exit code."""
    return run_command(PRETRAIN, pretrain)


if __name__ == "__main__":
    sys.exit(main())
