"""Folders of models, and names on the Hub: checked, loaded strictly and quietly, written; versions of libraries."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..extras import DISTRIBUTION
from ..modeling_scbert import ScBertConfig, ScBertForCellClassification, ScBertModel
from ..tokenization import InputError, ScBertTokenizer
from .prediction import LoadedModel

logger = logging.getLogger(__name__)

# the folders of the models that ship
SHIPPED_MODELS = Path(__file__).parents[1] / "model_cards"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer_config.json", "gene_panel.txt")
# the packages that decide a result
DECISIVE = (DISTRIBUTION, "torch", "transformers", "accelerate", "anndata", "numpy", "scipy")
COPY_AGAIN = "Copy the whole folder again, or repeat the command that made it."


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own reports and bars: what they would say is checked instead."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def find_model(model: str | Path) -> Path:
    """
    The local folder of a model: itself, one that ships, or where a Hub repository ``user/name`` was downloaded to.

    A folder of one's own comes before one of that name that ships. Of the Hub, only settings, weights and the
    gene panel are fetched: code of a repository is neither needed nor run.
    """
    folder, shipped = Path(model), SHIPPED_MODELS / model
    name = folder.as_posix()
    if not folder.exists() and folder.name == name and (shipped / "config.json").is_file():
        return shipped
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or folder.parent.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:
        raise InputError(
            f"There is no model folder {model}, and no model of that name could be had from the Hugging Face Hub: "
            f"{_first_line(error)}"
        ) from error


def check_outside(model: str | Path | LoadedModel, *outputs: str | Path | None) -> None:
    """Refuse outputs in the folder of a model, loaded or not: no consent to overwrite is meant for its files."""
    folder = Path(model.name) if isinstance(model, LoadedModel) else find_model(model)
    for path in outputs:
        if path is not None and folder.resolve() in Path(path).resolve().parents:
            raise InputError(
                f"The output {path} is in the folder of the model, {folder}. Choose another folder."
            )


def check_model_folder(folder: str | Path) -> dict[str, Any]:
    """The content of a model folder's config.json; one without a complete scBERT model, by its files, is refused."""
    folder = Path(folder)
    config = _read_config(folder)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(
            f"The model folder {folder} is incomplete: it has no weights (none of {', '.join(WEIGHT_FILES)}). "
            f"{COPY_AGAIN}"
        )
    missing = [name for name in TOKENIZER_FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"The model folder {folder} is incomplete: {', '.join(missing)} is missing. {COPY_AGAIN}"
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"The weights {path} are damaged or cut short ({_first_line(error)}) {COPY_AGAIN}"
            ) from error
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        hint = f" There is {partial}, of a run that did not end: the same command with resume=True (--resume) ends it."
        raise InputError(f"There is no model folder {folder}.{hint if partial.exists() else ''}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; a model is a folder, as fine-tuning and converting write it.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: it holds no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: it is not a JSON object ({error}).") from error
    if model_type != "scbert":
        raise InputError(f"{folder} holds a model of type {model_type!r}; one of type 'scbert' was needed.")
    return config


def load_tokenizer(folder: str | Path) -> ScBertTokenizer:
    """The tokenizer of a model folder."""
    try:
        with quiet_transformers():
            return ScBertTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise InputError(f"The tokenizer in {folder} cannot be read: {_first_line(error)}") from error


def load_weights(
    model_class: type[PreTrainedModel],
    folder: str | Path,
    new: str | tuple[str, ...] = (),
    **fields: Any,
) -> PreTrainedModel:
    """
    A model of a folder on the CPU in float32, every weight present, of the right shape and finite, or an `InputError`:
    transformers would fill the others at random.

    Weights of another head than the class has are left out; those whose names begin with one of `new` may be missing,
    or of another shape, and are then new. The folder is checked before, by `check_model_folder`; `fields` of the
    configuration are changed.
    """
    try:
        with quiet_transformers():
            network, report = model_class.from_pretrained(
                folder,
                config=ScBertConfig.from_pretrained(folder, local_files_only=True, **fields),
                dtype=torch.float32,
                local_files_only=True,
                # mismatches are then reported rather than printed as a table, and refused below
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    # safetensors, torch and huggingface_hub raise types of their own
    except Exception as error:
        raise InputError(
            f"The model in {folder} cannot be loaded, its files are damaged or do not belong together: "
            f"{_first_line(error)} {COPY_AGAIN}"
        ) from error
    _check_weights(folder, network, report, new)
    return network


def _check_weights(
    folder: str | Path, network: PreTrainedModel, report: Any, new: str | tuple[str, ...]
) -> None:
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(new))
    if missing:
        raise InputError(
            f"The weights in {folder} lack {len(missing)} of the model's tensors (first: {', '.join(missing[:3])}). "
            f"They would be random; the model is refused. {COPY_AGAIN}"
        )
    mismatched = sorted(item for item in report["mismatched_keys"] if not item[0].startswith(new))
    if mismatched:
        name, found, needed = mismatched[0]
        raise InputError(
            f"{len(mismatched)} tensor(s) of the weights in {folder} do not have the shape config.json asks for "
            f"(first: {name} is {tuple(found)}, needed {tuple(needed)}). They would be random; the model is refused."
        )
    broken = [name for name, tensor in network.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise InputError(
            f"The weights in {folder} hold NaN or infinite numbers (first in {broken[0]}): its training diverged "
            "or the file is damaged."
        )


def load_model(
    model: str | Path | LoadedModel,
    task: str = "annotation",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoadedModel:
    """
    A model, ready for annotating or embedding cells; one that is not fit for it, or not complete, is refused.

    `model` is a folder written by `finetune`, `pretrain` or `convert`, or the ``user/name`` of one on the Hub; a
    `LoadedModel` passes through. The `task` ``"annotation"`` needs a fine-tuned model, ``"embedding"`` takes any, and
    so does ``"any"``, which keeps the head that tells types.
    The `device` is ``"cpu"``, ``"cuda"``, ``"cuda:1"``..., by default (``"auto"``) the first GPU, or else the CPU;
    `dtype` is ``"float32"`` or ``"bfloat16"``, by default (``"auto"``) the latter on GPUs that have it.
    """
    if isinstance(model, LoadedModel):
        if task == "annotation" and not isinstance(model.model, ScBertForCellClassification):
            raise _without_types(model.name, [type(model.model).__name__])
        return model
    folder = find_model(model)
    config = check_model_folder(folder)
    architectures = config.get("architectures") or []
    tells_types = architectures == [ScBertForCellClassification.__name__]
    if task == "annotation" and not tells_types:
        raise _without_types(folder, architectures)
    device, tokenizer = pick_device(device), load_tokenizer(folder)
    classifier = config.get("cell_vector_size") if task == "embedding" else tells_types
    model_class = ScBertForCellClassification if classifier else ScBertModel
    network = load_weights(model_class, folder)
    _check_match(folder, network, tokenizer)
    dtype = _pick_dtype(device, dtype)
    logger.info("Model %s on %s in %s.", folder, device, str(dtype).removeprefix("torch."))
    return LoadedModel(network.to(device).eval(), tokenizer, str(folder), dtype)


def _without_types(folder: str | Path, architectures: list[str]) -> InputError:
    return InputError(
        f"The model in {folder} ({', '.join(architectures) or 'no architecture named'}) has no cell types yet: it "
        f"cannot annotate. Teach it some first: finetune(reference, label_key, output, base={str(folder)!r}), or "
        f"`scbert finetune REF.h5ad --label-key KEY --base {folder} --output DIR`."
    )


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


def save_model(
    model: PreTrainedModel,
    tokenizer: ScBertTokenizer,
    folder: str | Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (the model's own if left out), configuration, code and tokenizer into a folder."""
    folder = Path(folder)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        # safetensors writes for the owner alone; who may read the other files may read these
        path.chmod((folder / "config.json").stat().st_mode)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in DECISIVE:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") + "." if lines else type(error).__name__ + "."
