"""What the models with a head return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput


@dataclass
class ScBertMaskedExpressionOutput(MaskedLMOutput):
    """
    Output of masked expression modelling; with several modalities, also of modality prediction, and with
    ``cell_targets`` of whole-cell prediction.

    Parameters
    ----------
    masked_expression_loss, modality_loss, cell_loss
        The parts of ``loss = masked_expression_loss + modality_loss_weight * modality_loss + cell_loss_weight *
        cell_loss``; scalars.
    modality_logits
        ``[batch, length, num_modalities]``.
    """

    masked_expression_loss: torch.FloatTensor | None = None
    modality_loss: torch.FloatTensor | None = None
    cell_loss: torch.FloatTensor | None = None
    modality_logits: torch.FloatTensor | None = None


@dataclass
class ScBertCellClassificationOutput(SequenceClassifierOutput):
    """
    Output of cell-type annotation.

    Parameters
    ----------
    probabilities
        ``[batch, num_labels]``, float32, where the model is in evaluation mode: of each type. With
        ``config.cell_vector_size`` their sum is the probability that the cell is of a known type, else 1. A cell whose
        largest one is below ``config.unassigned_threshold`` is best called "unassigned".
    cell_vectors
        ``[batch, cell_vector_size]``, in evaluation mode and with ``config.cell_vector_size`` only.
    """

    probabilities: torch.FloatTensor | None = None
    cell_vectors: torch.FloatTensor | None = None
