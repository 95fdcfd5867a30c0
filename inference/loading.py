"""Load a model folder strictly: every weight present and of the right shape, or one clear paragraph."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ..modeling_scbert import ScBertForCellClassification, ScBertModel
from ..tokenization import InputError, ScBertTokenizer
from ..training.pretrained import quiet_transformers, read_config

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer_config.json", "gene_panel.txt")


@dataclass
class LoadedModel:
    """
    A model ready to be run, with its tokenizer.

    Attributes
    ----------
    model
        In evaluation mode, on `device`.
    tokenizer
        Its gene panel has one gene less than the model has positions.
    name
        Where it came from.
    device
        Where it runs.
    dtype
        Precision of the matrix products: float32, or a half precision under autocast.
    """

    model: ScBertModel | ScBertForCellClassification
    tokenizer: ScBertTokenizer
    name: str
    device: torch.device
    dtype: torch.dtype

    @property
    def labels(self) -> list[str]:
        """Cell types in the order of the logits."""
        return [str(self.model.config.id2label[index]) for index in range(self.model.config.num_labels)]

    @property
    def temperature(self) -> float:
        """What divides the logits; 1 unless the model was calibrated."""
        return float(self.model.config.classifier_temperature)

    @property
    def threshold(self) -> float:
        """Confidence below which a cell is "unassigned": chosen on validation cells, or 0.5."""
        chosen = self.model.config.unassigned_threshold
        return 0.5 if chosen is None else float(chosen)


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
        Folder written by `scbert finetune`, `pretrain` or `convert`, or the ``user/name`` of one on the Hub; a
        `LoadedModel` passes through.
    task
        ``"annotation"`` needs a fine-tuned model; ``"embedding"`` takes any scBERT model.
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``...; by default (``"auto"``) the first GPU, or else the CPU.
    dtype
        ``"float32"`` or ``"bfloat16"``; by default (``"auto"``) bfloat16 on GPUs that have it, float32 elsewhere.

    Returns
    -------
    LoadedModel

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
    folder = model_folder(model)
    config = _read_config(folder, task)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(
            f"The model folder {folder} is incomplete: it has no weights (none of {', '.join(WEIGHT_FILES)}). "
            "Copy the whole folder again, or repeat the command that made it."
        )
    tokenizer = _load_tokenizer(folder)
    network = _load_weights(folder, task, config)
    _check_match(folder, network, tokenizer)
    device = _pick_device(device)
    dtype = _pick_dtype(device, dtype)
    logger.info("Model %s on %s in %s.", folder, device, str(dtype).removeprefix("torch."))
    return LoadedModel(network.to(device).eval(), tokenizer, str(folder), device, dtype)


def model_folder(model: str | Path) -> Path:
    """
    The local folder of a model: itself, or where a Hub repository ``user/name`` was downloaded to.

    Only settings, weights and the gene panel are fetched: code of a repository is neither needed nor run.
    """
    folder = Path(model)
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)) or folder.parent.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:
        raise InputError(
            f"There is no model folder {model}, and no model of that name could be had from the Hugging Face Hub: "
            f"{_first_line(error)}"
        ) from error


def _read_config(folder: Path, task: str) -> dict:
    """The folder's config.json, of the right kind for `task`."""
    config = read_config(folder)
    architectures = config.get("architectures") or []
    if task == "annotation" and architectures != [ScBertForCellClassification.__name__]:
        raise InputError(
            f"The model in {folder} ({', '.join(architectures) or 'no architecture named'}) has no cell types "
            "yet: it cannot annotate. Teach it some first, with `scbert finetune REF.h5ad --label-key KEY --base "
            f"{folder} --output DIR`."
        )
    return config


def _load_tokenizer(folder: Path) -> ScBertTokenizer:
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"The tokenizer in {folder} is incomplete: {', '.join(missing)} is missing. Copy the whole folder "
            "again, or repeat the command that made it."
        )
    try:
        with quiet_transformers():
            return ScBertTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"The tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def _load_weights(folder: Path, task: str, config: dict) -> ScBertModel | ScBertForCellClassification:
    model_class = ScBertForCellClassification if task == "annotation" else ScBertModel
    try:
        with quiet_transformers():
            network, report = model_class.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                # mismatches are then reported rather than printed as a table; both are refused below
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(
            f"The model in {folder} cannot be loaded, its files are damaged or do not belong together: "
            f"{_first_line(error)} Copy the folder again, or repeat the command that made it."
        ) from error
    wrong = sorted(report["missing_keys"])
    if wrong:
        raise InputError(
            f"The weights in {folder} lack {len(wrong)} of the model's tensors (first: {', '.join(wrong[:3])}). "
            "They would be random; the model is refused."
        )
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        name, found, needed = wrong[0]
        raise InputError(
            f"{len(wrong)} tensor(s) of the weights in {folder} do not have the shape config.json asks for "
            f"(first: {name} is {tuple(found)}, needed {tuple(needed)}). They would be random; the model is refused."
        )
    broken = [name for name, tensor in network.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"The weights in {folder} hold NaN or infinite numbers (first in {broken[0]}): its training diverged "
            "or the file is damaged."
        )
    return network


def _check_match(folder: Path, network, tokenizer: ScBertTokenizer) -> None:
    """Refuse a tokenizer of another model."""
    positions, ids = network.config.max_position_embeddings, network.config.vocab_size
    if len(tokenizer.gene_panel) + 1 != positions or tokenizer.vocab_size != ids:
        raise InputError(
            f"The tokenizer in {folder} belongs to another model: it has {len(tokenizer.gene_panel)} genes and "
            f"{tokenizer.vocab_size} expression ids, the model {positions - 1} genes and {ids} ids."
        )


def _pick_device(device: torch.device | str | None) -> torch.device:
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


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
