"""The Trainer of a fine-tuning run: loss, sampling, scores, early stopping; and its model, calibrated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerState

from ..evaluation.calibration import choose_threshold, conformal_quantiles, fit_temperature, softmax
from ..evaluation.metrics import classification_metrics
from ..tokenization import InputError
from .callbacks import RedrawFeaturesCallback
from .cell_batches import CellDataset, DataCollatorForCells
from .cell_order import EpochSampler, LengthGroupedSampler, OversamplingSampler
from .finetune_arguments import FinetuneTrainingArguments
from .finetune_data import FinetuneData, LabelledCells
from .run_summary import DEFAULT_THRESHOLD, TunedModel
from .trainer import CellTrainer

# the prior of a temperature, in cells: a handful of validation cells that are all right would ask for certainty
TEMPERATURE_PRIOR = 3.0
MIN_CELLS_FOR_THRESHOLD = 50
ASSIGNED_PRECISION = 0.95


def build_trainer(
    model: PreTrainedModel, data: FinetuneData, arguments: FinetuneTrainingArguments
) -> CellTrainer:
    """Put model, training and validation cells, and settings together; what is frozen has ``requires_grad`` off."""
    learnt, validation = data.splits["train"], data.splits["validation"]
    if not len(validation):
        raise InputError(
            "There are no validation cells, which choose the best epoch: validation_fraction must be above 0, and the "
            "classes need more cells."
        )
    weights = None
    if arguments.class_balance == "weights":
        weights = class_weights(learnt.targets, len(data.classes))
    callbacks = []
    if all(parameter.requires_grad for parameter in model.parameters()):
        # frozen blocks were trained for the features they came with; theirs stay
        callbacks.append(RedrawFeaturesCallback())
    if arguments.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    return CellTrainer(
        choose_sampler(data, arguments),
        lambda metrics: f"validation macro-F1 {metrics['eval_macro_f1']:.3f}",
        callbacks,
        model=model,
        args=arguments,
        train_dataset=CellDataset(learnt.bins, learnt.targets),
        eval_dataset=CellDataset(validation.bins, validation.targets),
        data_collator=DataCollatorForCells(data.tokenizer),
        compute_metrics=validation_scores,
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
    Weights inverse to class size, float32 [classes], with mean 1 over the training cells of these classes [cells].

    Examples
    --------
    >>> class_weights(np.array([0, 0, 0, 1]), 2)
    tensor([0.6667, 2.0000])
    """
    counts = np.bincount(targets, minlength=n_classes)
    return torch.tensor(len(targets) / (n_classes * np.maximum(counts, 1)), dtype=torch.float32)


def weighted_loss(weights: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """
    Cross-entropy for `transformers.Trainer(compute_loss_func=...)`, with a weight for each class or equal ones.

    The sum over cells is divided by the number of cells of the whole step, which the Trainer counts over the
    micro-batches of an accumulation and over processes. Weights have mean 1 over the training set and are not
    renormalised within a micro-batch, so a step's gradient is the same however it is cut.
    """

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"].float()
        weight = None if weights is None else weights.to(logits.device)
        total = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


def validation_scores(prediction: Any) -> dict[str, float]:
    """Scores after every epoch, as `Trainer(compute_metrics=...)` wants them; see `classification_metrics`."""
    scores = classification_metrics(prediction.label_ids, prediction.predictions.argmax(axis=-1))
    return {name: scores[name] for name in ("accuracy", "macro_f1")}


def calibrated(
    model: PreTrainedModel,
    state: TrainerState,
    logits_of: Callable[[LabelledCells], np.ndarray],
    weights: Callable[[], dict[str, torch.Tensor]],
    validation: LabelledCells,
) -> TunedModel:
    """
    A trained model with its temperature in the weights of the output layer; in its config, the threshold of
    "unassigned" and the quantiles of prediction sets. All three are chosen on the validation cells, by logits
    [cells, classes] before the temperature; for the others see `TunedModel`.
    """
    logits = logits_of(validation)
    temperature = fit_temperature(logits, validation.targets, prior=TEMPERATURE_PRIOR)
    probabilities = softmax(logits, temperature)
    model.config.unassigned_threshold = threshold_of(probabilities, validation.targets)
    model.config.conformal_quantiles = conformal_quantiles(probabilities, validation.targets)

    def divided() -> dict[str, torch.Tensor]:
        return {
            name: weight / temperature if "classifier.out_proj." in name else weight
            for name, weight in weights().items()
        }

    return TunedModel(model, state, lambda cells: softmax(logits_of(cells), temperature), divided)


def threshold_of(probabilities: np.ndarray, targets: np.ndarray) -> float | None:
    """
    Confidence below which cells should stay unassigned, so that `ASSIGNED_PRECISION` of the others are right.

    By calibrated probabilities of validation cells, [cells, classes]. At least 0.5; None with fewer than 50 cells, or
    where no threshold reaches the precision.

    Examples
    --------
    >>> sure, unsure = [[0.9, 0.1]] * 60, [[0.7, 0.3]] * 20
    >>> round(threshold_of(np.array(sure + unsure), np.array([0] * 60 + [1] * 20)), 2)
    0.8
    """
    if len(targets) < MIN_CELLS_FOR_THRESHOLD:
        return None
    chosen = choose_threshold(probabilities, targets, ASSIGNED_PRECISION)
    return None if chosen is None else max(DEFAULT_THRESHOLD, chosen)
