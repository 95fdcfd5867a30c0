"""The Trainer of a fine-tuning run: loss, sampling, scores, early stopping."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel

from .callbacks import L1HeadCallback, RedrawFeaturesCallback
from .cell_batches import CellDataset, DataCollatorForCells, GeneDropoutDataset
from .cell_order import EpochSampler, LengthGroupedSampler, OversamplingSampler
from .finetune_arguments import FinetuneTrainingArguments
from .finetune_data import FinetuneData
from .trainer import CellTrainer


class FinetuneTrainer(CellTrainer):
    """`CellTrainer` with a learning rate for the encoder."""

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


def build_trainer(
    model: PreTrainedModel, data: FinetuneData, arguments: FinetuneTrainingArguments
) -> FinetuneTrainer:
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
    train = CellDataset(learnt.bins, learnt.targets)
    if arguments.gene_dropout:
        train = GeneDropoutDataset(learnt.bins, learnt.targets, arguments.gene_dropout)
    n_classes = len(data.classes)
    weights = class_weights(learnt.targets, n_classes) if arguments.class_balance == "weights" else None
    callbacks = []
    if all(parameter.requires_grad for parameter in model.parameters()):
        # frozen blocks were trained for the features they came with; theirs stay
        callbacks.append(RedrawFeaturesCallback(arguments.seed))
    if arguments.head_l1:
        callbacks.append(L1HeadCallback(arguments.head_l1))
    if arguments.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    return FinetuneTrainer(
        choose_sampler(data, arguments),
        lambda metrics: f"validation macro-F1 {metrics['eval_macro_f1']:.3f}",
        callbacks,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=CellDataset(validation.bins, validation.targets),
        data_collator=DataCollatorForCells(data.tokenizer),
        compute_metrics=validation_scores(n_classes),
        compute_loss_func=weighted_loss(weights),
    )


def choose_sampler(data: FinetuneData, arguments: FinetuneTrainingArguments) -> EpochSampler | None:
    """Rare classes drawn more often, or cells of like length together; None for the Trainer's own shuffling."""
    learnt = data.splits["train"]
    if arguments.class_balance == "oversample":
        return OversamplingSampler(learnt.targets, arguments.seed)
    if data.tokenizer.keep_zeros:
        return None
    # a whole step's cells are of like length, however the step is cut into micro-batches and processes
    batch_size = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return LengthGroupedSampler(np.diff(learnt.bins.indptr), batch_size, arguments.seed)


def class_weights(targets: np.ndarray, n_classes: int) -> torch.Tensor:
    """
    Weights inverse to class size, with mean 1 over the training cells.

    Parameters
    ----------
    targets
        Class of every training cell, [cells].
    n_classes
        Number of classes; each needs a cell.

    Returns
    -------
    torch.Tensor
        float32 [classes].

    Examples
    --------
    >>> class_weights(np.array([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = np.bincount(targets, minlength=n_classes)
    return torch.tensor(len(targets) / (n_classes * np.maximum(counts, 1)), dtype=torch.float32)


def weighted_loss(weights: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """
    Cross-entropy for `transformers.Trainer(compute_loss_func=...)`.

    The sum over cells is divided by the number of cells of the whole step, which the Trainer counts over the
    micro-batches of an accumulation and over processes. Weights have mean 1 over the training set and are not
    renormalised within a micro-batch, so a step's gradient is the same however it is cut.

    Parameters
    ----------
    weights
        One per class, or None for equal ones.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"].float()
        weight = None if weights is None else weights.to(logits.device)
        total = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


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
