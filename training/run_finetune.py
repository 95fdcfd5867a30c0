"""
Fine-tune a model on labelled cells: ``scbert finetune``, or

    python -m scbert.training.run_finetune recipe.json --reference REF.h5ad --label_key cell_type --output DIR
    accelerate launch -m scbert.training.run_finetune recipe.json ...
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from transformers import PreTrainedModel, TrainerState, set_seed

from ..data.labels import copy_notes
from ..data.paths import check_output_folder
from ..evaluation.calibration import conformal_quantiles
from ..tokenization import InputError
from ..trained_model.prediction import LoadedModel, predict_probabilities
from .cell_batches import CellDataset
from .finetune_arguments import (
    FINETUNE,
    FinetuneDataArguments,
    FinetuneModelArguments,
    FinetuneTrainingArguments,
)
from .finetune_data import FinetuneData, load_data
from .finetune_trainer import build_trainer, calibrated
from .frozen_layer_cache import cached_frozen_layers
from .initial_model import (
    base_tokenizer,
    freeze_first_layers,
    freeze_for_finetuning,
    freeze_whole_encoder,
    load_base,
    new_model,
    pretrained_effects,
    pretrained_vectors,
)
from .run_folder import finish, run_folder
from .run_summary import (
    TunedModel,
    draw_figures,
    judged_cells,
    log_summary,
    score_baseline,
    score_splits,
    summarise,
)
from .settings import SHORT_NAMES, parse, run_command
from .solved_head import solve_classifier

logger = logging.getLogger(__name__)

# what a user may well give, and a solved head has no use for
SETTINGS_OF_STEPS = {
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "learning_rate",
    "class_balance",
    "cache_frozen",
    "validation_fraction",
    "early_stopping_patience",
}
# what keeps weights of a base as they are
SETTINGS_OF_A_BASE = {"frozen_layers", "freeze_encoder"}
# from so many cells of the median type on, a reference's own genes carry over to other studies, pretrained axes less
MANY_OF_A_TYPE = 50


def finetune(
    reference: AnnData | str | Path | None = None,
    label_key: str | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Teach a model the cell types of a labelled reference.

    Parameters
    ----------
    reference
        Labelled cells: an AnnData, which is left as it is, or a file: .h5ad, 10x .h5 or folder, .zarr.
    label_key
        Column of obs that holds the cell types.
    output
        The model folder to write. It is built in ``OUTPUT.partial`` and appears when complete.
    **options
        ``base`` (model folder or Hub name), ``test`` (AnnData or file of cells to test on), ``unlabelled`` (AnnData or
        files of cells without labels, such as those to annotate, to learn from as well), ``recipe`` (name or file),
        ``epochs``, ``batch_size``, ``seed``, ``device`` and ``dtype`` (see `device_settings`), ``resume``,
        ``overwrite``, and every field of `FinetuneDataArguments`, `FinetuneModelArguments` and
        `FinetuneTrainingArguments` (so all of `transformers.TrainingArguments`). They go over the recipe's.

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
    >>> summary = finetune("reference.h5ad", "cell_type", "model")  # doctest: +SKIP
    >>> summary["cross_validation_macro_f1"]  # doctest: +SKIP
    """
    cells = {
        "reference": reference,
        "test": options.get("test"),
        "unlabelled": as_list(options.get("unlabelled")),
    }
    options |= {name: name_of(given) for name, given in cells.items() if name != "unlabelled"}
    options["unlabelled"] = [name_of(given) for given in cells["unlabelled"]] or None
    settings, data_arguments, model_arguments, training = parse(
        FINETUNE, {"label_key": label_key, "output": output, **options}
    )
    check_output_folder(data_arguments.output, data_arguments.overwrite)
    if training.solved_head:
        why = "this recipe solves for the head and takes no steps (scbert, scmbert and screformer take them)"
        _name_idle_settings(options, SETTINGS_OF_STEPS | SETTINGS_OF_A_BASE, why)
    elif not model_arguments.base:
        why = "without a base (base, --base) every weight is trained"
        _name_idle_settings(options, SETTINGS_OF_A_BASE, why)
    elif model_arguments.freeze_encoder or not model_arguments.train_all:
        why = "all layers are frozen, or all but the one before the last (train_all: none)"
        _name_idle_settings(options, {"frozen_layers"}, why)
    if data_arguments.unlabelled and not training.solved_head:
        raise InputError(
            "Cells without labels are learnt from by recipes that solve for the head, as the default one; leave them "
            "(unlabelled) out, or pretrain on them first."
        )
    set_seed(training.seed)
    logger.info("Fine-tuning on %s in %s.", training.device, "bfloat16" if training.bf16 else "float32")
    data = load(data_arguments, model_arguments, training, **cells)
    notes = copy_notes([part.bins for part in data.splits.values()])
    if unknown := data.report.get("test_classes_unknown"):
        notes.append(f"Scores leave out test cells of types that are not learnt: {', '.join(unknown)}.")
    data.report["notes"] = notes
    for note in notes:
        logger.warning(note)
    model = build_model(model_arguments, data, training.seed)
    model.config.update({"label_ontology_ids": data.term_ids, "label_parents": data.parents})
    return train_and_save(settings, data_arguments, training, data, model)


def _name_idle_settings(options: dict[str, Any], settings: set[str], reason: str) -> None:
    """Say which of some settings were given in vain."""
    given = {SHORT_NAMES.get(name, name) for name, value in options.items() if value is not None}
    if idle := sorted(given & settings):
        logger.warning("Of no effect, since %s: %s.", reason, ", ".join(idle))


def as_list(cells: Any) -> list[Any]:
    """Several AnnData or files, where one or none may be given."""
    if cells is None:
        return []
    return list(cells) if isinstance(cells, (list, tuple)) else [cells]


def name_of(cells: AnnData | str | Path | None) -> str | None:
    """What stands for cells in the settings."""
    if isinstance(cells, AnnData):
        return f"AnnData of {cells.n_obs} cells x {cells.n_vars} genes"
    return None if cells is None else str(cells)


def load(
    data: FinetuneDataArguments,
    model: FinetuneModelArguments,
    training: FinetuneTrainingArguments,
    **cells: Any,
) -> FinetuneData:
    """Read, choose, split and bin the cells, with the base's tokenizer where there is a base."""
    tokenizer = base_tokenizer(model.base, data.genes) if model.base else model.tokenizer
    solved = training.solved_head
    return load_data(data, tokenizer, training.seed, validate=not solved, learn_levels=solved, **cells)


def build_model(arguments: FinetuneModelArguments, data: FinetuneData, seed: int) -> PreTrainedModel:
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
    data_arguments: FinetuneDataArguments,
    training: FinetuneTrainingArguments,
    data: FinetuneData,
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Train in the partial folder, score, put the figures beside the model, and give it its name."""
    with run_folder(settings, data_arguments, training, data.fingerprint()) as (folder, checkpoint):
        start = time.perf_counter()
        tuned = train(model, data, training, checkpoint)
        seconds = {"training": time.perf_counter() - start}
        scores = score_splits(tuned, data)
        seconds["scoring"] = time.perf_counter() - start - seconds["training"]
        summary, weights = scores, tuned.weights()
        if training.process_index == 0:
            baseline = score_baseline(data, tuned, data_arguments.layer, training.seed)
            summary = summarise(settings, data, tuned, training, scores, baseline, seconds)
            draw_figures(folder, summary)
            finish(folder, training.output_dir, tuned.model, data.tokenizer, weights, summary)
            log_summary(summary, data_arguments.output)
    return summary


def train(
    model: PreTrainedModel,
    data: FinetuneData,
    arguments: FinetuneTrainingArguments,
    checkpoint: Path | None = None,
) -> TunedModel:
    """Solve for the head, or train to the best validation score."""
    if arguments.solved_head:
        return solve(model.to(arguments.device), data, arguments)
    trainer = build_trainer(model, data, arguments)
    n_cells = len(data.splits["train"]) + len(data.splits["validation"])
    # one process that drives several GPUs copies the model to each
    storage = arguments.cache_frozen if arguments.n_gpu <= 1 else "off"
    with cached_frozen_layers(model.scbert, storage, n_cells, arguments.output_dir):
        trainer.run(checkpoint)
    return calibrated(
        trainer.model,
        trainer.state,
        lambda cells: trainer.predict(CellDataset(cells.bins, cells.targets)).predictions,
        lambda: trainer.accelerator.get_state_dict(trainer.model),
        data.splits["validation"],
    )


def solve(model: PreTrainedModel, data: FinetuneData, arguments: FinetuneTrainingArguments) -> TunedModel:
    """Give the model a head that is solved for; nothing else is trained."""
    loaded, learnt = LoadedModel(model, data.tokenizer), data.splits["train"]
    shown = not arguments.disable_tqdm
    vectors, effects, panel = None, None, data.tokenizer.gene_panel
    if arguments.cell_axes:
        effects = pretrained_effects(arguments.cell_axes, panel)
    if arguments.cell_axes and np.median(np.bincount(learnt.targets)) < MANY_OF_A_TYPE:
        vectors = pretrained_vectors(arguments.cell_axes, panel)
    n_known = 0 if vectors is None else int(vectors.any(axis=1).sum())
    held_out = solve_classifier(
        loaded, learnt.bins, learnt.targets, arguments.seed, shown, data.unlabelled, vectors, effects
    )
    signal = held_out.report.pop("signal")
    held_out.report["cell_axes"] = {"model": arguments.cell_axes, "genes": n_known, "signal": signal}
    held_out.report["batch_effects"] = 0 if effects is None else len(effects)
    if signal is not None:
        logger.info(
            "%s knows %s of the reference's genes, and its axes hold %.0f%% of what differs between these cells.",
            arguments.cell_axes,
            f"{n_known:,}",
            100 * signal,
        )
    judged = judged_cells(learnt.targets)
    model.config.conformal_quantiles = conformal_quantiles(
        held_out.probabilities[judged], learnt.targets[judged]
    )
    return TunedModel(
        model,
        TrainerState(),
        lambda cells: predict_probabilities(loaded, cells.bins, cells.absent),
        model.state_dict,
        held_out,
    )


def main() -> int:
    """Entry of ``python -m scbert.training.run_finetune``; returns the exit code."""
    return run_command(FINETUNE, finetune)


if __name__ == "__main__":
    sys.exit(main())
