"""A model in memory with its tokenizer, ready to be run: of a folder or from the Hub."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling_scbert import ScBertForCellClassification, ScBertModel
from ..tokenization import InputError, ScBertTokenizer
from .model_folder import check_model_folder, find_model, load_tokenizer, load_weights

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """
    A model ready to be run, with its tokenizer.

    Attributes
    ----------
    model
        Any scBERT model.
    tokenizer
        Its gene panel has one gene less than the model has positions.
    name
        Where it came from.
    dtype
        Precision of the matrix products: float32, or a half precision under autocast.
    """

    model: PreTrainedModel
    tokenizer: ScBertTokenizer
    name: str = "in memory"
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    @property
    def labels(self) -> list[str]:
        """Cell types in the order of the logits."""
        return [str(self.model.config.id2label[index]) for index in range(self.model.config.num_labels)]

    @property
    def embedding_size(self) -> int:
        """Width of an embedding: a classifier's cell vectors where it makes them, else hidden states."""
        return self.model.config.cell_vector_size if self.has_cell_vectors else self.model.config.hidden_size

    @property
    def has_cell_vectors(self) -> bool:
        """Whether the model is a classifier that makes cell vectors."""
        return getattr(getattr(self.model, "classifier", None), "novelty", None) is not None

    @property
    def embedding_kind(self) -> str:
        """What an embedding is, in words."""
        if self.has_cell_vectors:
            return "the classifier's cell vector"
        if self.model.config.pooling == "cell":
            return "cell token: the genes' vectors summed by expression, corrected by attention"
        return "mean over expressed genes and the trailing token"

    @property
    def threshold(self) -> float:
        """Confidence below which a cell is "unassigned": chosen on held-out cells, or 0.5."""
        chosen = self.model.config.unassigned_threshold
        return 0.5 if chosen is None else float(chosen)

    def quantiles(self, coverage: float) -> list[float]:
        """
        Largest score of each label within a prediction set of a coverage, [labels].

        Raises
        ------
        InputError
            If the model has none of this coverage.
        """
        known = {
            float(name): values for name, values in (self.model.config.conformal_quantiles or {}).items()
        }
        if not known:
            raise InputError(
                f"The model {self.name} cannot make prediction sets: an earlier version made it, or the held-out "
                "cells were too few. Fine-tune it again, or leave coverage (--coverage) out."
            )
        if coverage not in known:
            raise InputError(
                f"The coverage is {coverage:g}; the model {self.name} can do {', '.join(f'{c:g}' for c in known)}."
            )
        return known[coverage]


def load_model(
    model: str | Path | LoadedModel,
    task: str = "annotation",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoadedModel:
    """
    Load a model folder for annotating or embedding cells.

    Parameters
    ----------
    model
        Folder written by `finetune`, `pretrain` or `convert`, or the ``user/name`` of one on the Hub; a `LoadedModel`
        passes through.
    task
        ``"annotation"`` needs a fine-tuned model; ``"embedding"`` takes any scBERT model.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``...; by default (``"auto"``) the first GPU, or else the CPU.
    dtype
        ``"float32"`` or ``"bfloat16"``; by default (``"auto"``) bfloat16 on GPUs that have it, float32 elsewhere.

    Returns
    -------
    LoadedModel
        In evaluation mode.

    Raises
    ------
    InputError
        When the folder is not a complete scBERT model fit for the task; nothing is filled with random weights.

    Examples
    --------
    >>> loaded = load_model("my_model")  # doctest: +SKIP
    >>> loaded.labels  # doctest: +SKIP
    ['B', 'NK', 'T']
    """
    if isinstance(model, LoadedModel):
        return model
    folder = find_model(model)
    config = check_model_folder(folder)
    architectures = config.get("architectures") or []
    if task == "annotation" and architectures != [ScBertForCellClassification.__name__]:
        raise InputError(
            f"The model in {folder} ({', '.join(architectures) or 'no architecture named'}) has no cell types yet: it "
            f"cannot annotate. Teach it some first: finetune(reference, label_key, output, base={str(folder)!r}), or "
            f"`scbert finetune REF.h5ad --label-key KEY --base {folder} --output DIR`."
        )
    device, tokenizer = pick_device(device), load_tokenizer(folder)
    classifier = task == "annotation" or config.get("cell_vector_size")
    model_class = ScBertForCellClassification if classifier else ScBertModel
    network = load_weights(model_class, folder)
    _check_match(folder, network, tokenizer)
    dtype = _pick_dtype(device, dtype)
    logger.info("Model %s on %s in %s.", folder, device, str(dtype).removeprefix("torch."))
    return LoadedModel(network.to(device).eval(), tokenizer, str(folder), dtype)


def _check_match(folder: Path, network: PreTrainedModel, tokenizer: ScBertTokenizer) -> None:
    """Refuse a tokenizer of another model."""
    positions, ids = network.config.max_position_embeddings, network.config.vocab_size
    if len(tokenizer.gene_panel) + 1 != positions or tokenizer.vocab_size != ids:
        raise InputError(
            f"The tokenizer in {folder} belongs to another model: it has {len(tokenizer.gene_panel)} genes and "
            f"{tokenizer.vocab_size} expression ids, the model {positions - 1} genes and {ids} ids."
        )


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device of a name; None or ``"auto"``: the first GPU, or else the CPU."""
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"There is no device {device!r}; cpu, cuda, cuda:1 and the like are known."
        ) from error
    n_gpus = torch.cuda.device_count()
    if picked.type == "cuda" and (picked.index or 0) >= n_gpus:
        raise InputError(f"The device {device} was asked for, and torch sees {n_gpus} CUDA GPU(s) here.")
    return picked


def _pick_dtype(device: torch.device, dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None or dtype == "auto":
        # older GPUs emulate it, slowly
        half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if half else torch.float32
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError("dtype must be float32 or bfloat16.")
    return dtype
