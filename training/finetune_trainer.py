"""The Trainer of a fine-tuning run: loss, sampling, scores, early stopping, checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from accelerate.utils import extract_model_from_parallel as unwrap_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset, Sampler
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data.cell_dataset import CellDataset
from ..tokenization import InputError
from .callbacks import RedrawFeaturesCallback
from .class_balance import OversamplingSampler, class_weights, weighted_loss
from .collators import DataCollatorForCells
from .finetune_arguments import FinetuneTrainingArguments
from .finetune_data import FinetuneData
from .length_groups import LengthGroupedSampler

# an empty file: whatever stands beside it was written to the end
COMPLETE = "complete"


class CellTrainer(Trainer):
    """`transformers.Trainer` with a sampler of its own, and a learning rate for the encoder."""

    def __init__(self, *args: Any, train_sampler: Sampler[int] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train_sampler = train_sampler

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return self.train_sampler or super()._get_train_sampler(train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.encoder_learning_rate is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._parameter_groups(), **options)
        return super().create_optimizer(*args, **kwargs)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """
        The head's dense layers, and all else at the encoder's rate, each with and without weight decay.

        Every gene moves the encoder and the head's convolution, a weight of the head belongs to one: at the rate that
        the latter needs, few cells would tear the former from what all genes are read by.
        """
        decayed = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                dense = name.startswith("classifier.") and not name.startswith("classifier.conv.")
                groups.setdefault((dense, name in decayed), []).append(parameter)
        rates = {True: self.args.learning_rate, False: self.args.encoder_learning_rate}
        decays = {True: self.args.weight_decay, False: 0.0}
        return [
            {"params": group, "lr": rates[dense], "weight_decay": decays[decay]}
            for (dense, decay), group in groups.items()
        ]


class ThinnedCells(CellDataset):
    """
    Training cells that lose a random part of their expressed genes, another one every time.

    Parameters
    ----------
    bins, targets
        As in `CellDataset`.
    gene_dropout
        Chance of an expressed gene to be read as not expressed, 0 to below 1. Drawn from torch's generator, whose
        state checkpoints hold.
    """

    def __init__(self, bins: sp.csr_matrix, targets: np.ndarray, gene_dropout: float):
        super().__init__(bins, targets)
        self.gene_dropout = gene_dropout

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if not self.gene_dropout:
            return item
        kept = torch.rand(len(item["row"]["indices"])).numpy() >= self.gene_dropout
        return item | {"row": {name: values[kept] for name, values in item["row"].items()}}


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all its files are written: a process may be killed in the middle."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class SparseHead(TrainerCallback):
    """
    An L1 penalty on the head's output layer, as the proximal step of it: every weight loses ``rate * strength`` after
    each optimizer step, down to zero (Parikh and Boyd 2014, section 6.5.2). A gradient would never reach zero.
    """

    def __init__(self, strength: float):
        self.strength = strength

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        weight = unwrap_model(model).classifier.out_proj.weight
        groups = optimizer.param_groups
        rate = next(g["lr"] for g in groups if any(parameter is weight for parameter in g["params"]))
        weight.copy_(torch.nn.functional.softshrink(weight, rate * self.strength))


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no longer a number: nothing good can come of it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = [value for name, value in (logs or {}).items() if name in ("loss", "eval_loss", "grad_norm")]
        if not all(np.isfinite(value) for value in losses):
            raise InputError(
                f"Training diverged at step {state.global_step}: the loss is not a number any more. Lower "
                f"learning_rate (it is {args.learning_rate:g}), or set max_grad_norm, in the recipe."
            )


class ProgressOnStderr(TrainerCallback):
    """One bar over all steps, on stderr, with the last validation scores."""

    def __init__(self, console: Console | None = None):
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self.task = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.disable_tqdm:
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.task is not None and metrics and "eval_macro_f1" in metrics:
            text = f"epoch {state.epoch:.0f}, validation macro-F1 {metrics['eval_macro_f1']:.3f}"
            self.progress.update(self.task, description=text)

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Take the bar down."""
        self.progress.stop()


def stop_progress(trainer: Trainer) -> None:
    """Take the bar down after an error too: it would go on drawing over the message."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressOnStderr):
            callback.stop()


def validation_scores(n_classes: int) -> Callable[[Any], dict[str, float]]:
    """
    Scores after every epoch, as `Trainer(compute_metrics=...)` wants them.

    Macro-F1 runs over the classes that have a cell in the split, as in `evaluation.classification_metrics`;
    from the confusion matrix, because it is asked for every epoch.
    """

    def scores(prediction: Any) -> dict[str, float]:
        true, predicted = prediction.label_ids, prediction.predictions.argmax(axis=-1)
        confusion = np.zeros((n_classes, n_classes))
        np.add.at(confusion, (true, predicted), 1)
        hits, seen = np.diag(confusion), confusion.sum(axis=1) > 0
        f1 = 2 * hits / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1)
        return {"accuracy": float(hits.sum() / confusion.sum()), "macro_f1": float(f1[seen].mean())}

    return scores


def build_trainer(
    model: PreTrainedModel, data: FinetuneData, arguments: FinetuneTrainingArguments
) -> CellTrainer:
    """
    Put model, cells and settings together.

    Parameters
    ----------
    model
        `ScBertForCellClassification`, what is frozen has ``requires_grad`` off.
    data
        Splits; train and validation are used here, test is not.
    arguments
        Settings.
    """
    learnt, validation = data.splits["train"], data.splits["validation"]
    train = ThinnedCells(learnt.bins, learnt.targets, arguments.gene_dropout)
    targets, n_classes = learnt.targets, len(data.classes)
    weights = class_weights(targets, n_classes) if arguments.class_balance == "weights" else None
    callbacks = [CompleteCheckpoints(), StopOnDivergence(), ProgressOnStderr()]
    if all(parameter.requires_grad for parameter in model.parameters()):
        # frozen blocks were trained for the features they came with; theirs stay
        callbacks.append(RedrawFeaturesCallback(arguments.seed))
    if arguments.head_l1:
        callbacks.append(SparseHead(arguments.head_l1))
    if arguments.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = CellTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=CellDataset(validation.bins, validation.targets),
        data_collator=DataCollatorForCells(data.tokenizer),
        compute_metrics=validation_scores(n_classes),
        compute_loss_func=weighted_loss(weights),
        callbacks=callbacks,
        train_sampler=choose_sampler(train, data, arguments),
    )
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    return trainer


def choose_sampler(
    train: CellDataset, data: FinetuneData, arguments: FinetuneTrainingArguments
) -> Sampler[int] | None:
    """Rare classes drawn more often, or cells of like length together; None for the Trainer's own shuffling."""
    if arguments.class_balance == "oversample":
        return OversamplingSampler(data.splits["train"].targets, arguments.seed)
    if data.tokenizer.keep_zeros:
        return None
    # a whole step's cells are of like length, however the step is cut into micro-batches and processes
    batch_size = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return LengthGroupedSampler(train.lengths, batch_size, arguments.seed)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def freeze_first_layers(model: PreTrainedModel, n_layers: int) -> None:
    """Keep the first layers from being trained (scMBERT keeps one); embeddings and all else are trained."""
    depth = len(model.scbert.layers)
    if not 0 <= n_layers <= depth:
        raise InputError(f"frozen_layers is {n_layers}; the model has {depth} layers.")
    model.scbert.layers[:n_layers].requires_grad_(False)


def freeze_whole_encoder(model: PreTrainedModel) -> None:
    """Leave only the final norm and the head to be trained: for few cells, or little time."""
    model.scbert.requires_grad_(False)
    model.scbert.final_norm.requires_grad_(True)


@torch.no_grad()
def freeze_for_finetuning(model: PreTrainedModel) -> None:
    """
    Leave only the final norm, the block before the last and the head to be trained, as the original does.

    A model of one block trains that block.

    Parameters
    ----------
    model
        `ScBertForCellClassification`; changed in place.
    """
    encoder = model.scbert
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for trained in (encoder.final_norm, *encoder.layers[-2:][:1]):
        for parameter in trained.parameters():
            parameter.requires_grad_(True)
