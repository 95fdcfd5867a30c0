"""A model in memory with its tokenizer, and its outputs for binned cells, batch by batch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import scipy.sparse as sp
import torch
from transformers import PreTrainedModel

from ..modeling_scbert.heads_scbert import probabilities_of
from ..modeling_scbert.pipeline_scbert import cell_embedding
from ..modeling_scbert.workload_scbert import expect_work
from ..tokenization import InputError, ScBertTokenizer

logger = logging.getLogger(__name__)

# activations a batch may take: more on a CPU gains nothing, its caches are long full
CPU_BATCH_BYTES = 1 << 30
MAX_BATCH = 256


@dataclass
class LoadedModel:
    """A model ready to be run, with its tokenizer, whose panel has one gene less than the model has positions."""

    model: PreTrainedModel
    tokenizer: ScBertTokenizer
    # where it came from
    name: str = "in memory"
    # precision of the matrix products: float32, or a half precision under autocast
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

    def tells_novelty_without(self, absent: Sequence[int]) -> bool:
        """Whether it can tell that cells are of none of its types which lack these genes, places in the panel."""
        return not self.has_cell_vectors or self.model.classifier.novelty.tells_without(absent)

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
        """Largest score of each label within a prediction set of a coverage, [labels]."""
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


def predict(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    outputs: Collection[str] = ("logits",),
    batch_size: int | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """
    Outputs of binned cells, batch by batch.

    A cell's result depends neither on its batch mates nor on the order: FAVOR+ stabilises per cell, and masked
    positions contribute exactly nothing. Cells are taken by length, so that batches hold little padding.

    Of `bins` [cells, panel], as ``tokenizer.bin_cells`` makes them, come the rows of each batch and its `outputs` by
    name, float32: ``"logits"`` and ``"probabilities"`` of a classifier [batch, labels], ``"embeddings"`` [batch,
    hidden] (a classifier's cell vectors, or see `cell_embedding`), and ``"pooled"``, what a classifier's head pools.
    The size of a batch is chosen by the size of the model and the memory if left out.
    """
    check_batch_size(batch_size)
    loaded.model.eval()
    lengths = _sequence_lengths(loaded.tokenizer, bins)
    if loaded.model.config.num_hidden_layers:
        # whether compiling the layers pays
        expect_work(loaded.model.config, lengths.sum())
    order = np.argsort(lengths, kind="stable")
    batches = _batches(order, lengths, loaded, batch_size)
    for rows, encoded in _encoded_ahead(loaded.tokenizer, bins, batches):
        yield rows, _run(loaded, encoded, outputs)


def predict_cells(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    outputs: Collection[str] = ("logits",),
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda n_cells: None,
) -> dict[str, np.ndarray]:
    """
    Outputs of all cells in their order; arguments as in `predict`.

    `on_batch` is called with the number of cells of every batch that is done.
    """
    n_labels = loaded.model.config.num_labels
    sizes = {"logits": n_labels, "probabilities": n_labels, "embeddings": loaded.embedding_size}
    found = {name: np.zeros((bins.shape[0], sizes[name]), dtype=np.float32) for name in outputs}
    for rows, batch in predict(loaded, bins, outputs, batch_size):
        for name in found:
            found[name][rows] = batch[name]
        on_batch(len(rows))
    return found


def predict_probabilities(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    absent: Sequence[int] = (),
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda n_cells: None,
) -> np.ndarray:
    """
    Probabilities [cells, labels], zeros for cells without expression; arguments as in `predict_cells`.

    Where too many genes are `absent`, places in the panel that the cells lack, no cell is novel.
    """
    expressed = np.flatnonzero(np.diff(bins.indptr))
    on_batch(bins.shape[0] - len(expressed))
    probabilities = np.zeros((bins.shape[0], len(loaded.labels)), dtype=np.float32)
    asked = "probabilities" if loaded.tells_novelty_without(absent) else "logits"
    found = predict_cells(loaded, bins[expressed], (asked,), batch_size, on_batch)[asked]
    if asked == "logits":
        found = probabilities_of(torch.from_numpy(found), loaded.model.config).numpy()
    probabilities[expressed] = found
    return probabilities


def _sequence_lengths(tokenizer, bins: sp.csr_matrix) -> np.ndarray:
    """Tokens of every cell, the trailing one included, [cells]."""
    if tokenizer.keep_zeros:
        return np.full(bins.shape[0], bins.shape[1] + 1)
    return np.minimum(np.diff(bins.indptr) + 1, tokenizer.max_length or np.inf).astype(int)


def pick_batch_size(loaded: LoadedModel, length: int) -> int:
    """Cells of `length` tokens whose activations fit the memory set aside for a batch."""
    config = loaded.model.config
    inner = config.num_attention_heads * config.head_dim
    # floats a token takes at the widest point of a layer: random features of query and key, or a row of scores
    width = {
        "favor": 4 * config.num_attention_heads * config.num_random_features,
        "softmax": config.num_attention_heads * length,
    }.get(config.attention_type, 8 * inner)
    token_bytes = 4 * (width + 4 * inner + 2 * config.intermediate_size + 4 * config.hidden_size)
    memory = CPU_BATCH_BYTES
    if loaded.device.type == "cuda":
        memory = torch.cuda.mem_get_info(loaded.device)[0] // 2
    return int(np.clip(memory // (token_bytes * int(length)), 1, MAX_BATCH))


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a number of cells per batch that is none."""
    if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size >= 1):
        raise InputError(
            f"The batch size must be a whole number of 1 or more; found {batch_size!r}. Leave it out to have it chosen "
            "by the memory."
        )


def log_batch_size(loaded: LoadedModel, batch_size: int | None = None) -> None:
    """Log how many cells go into a batch, for the longest cells the tokenizer makes."""
    longest = len(loaded.tokenizer.gene_panel) + 1
    if not loaded.tokenizer.keep_zeros:
        longest = min(longest, loaded.tokenizer.max_length or longest)
    size = batch_size or pick_batch_size(loaded, longest)
    more = "" if batch_size or loaded.tokenizer.keep_zeros else ", more of shorter ones"
    # without attention layers the batch decides on neither time nor memory
    level = logging.INFO if loaded.model.config.num_hidden_layers else logging.DEBUG
    logger.log(level, "Batches of %d cells of %s tokens%s.", size, f"{longest:,}", more)


def _batches(order, lengths, loaded: LoadedModel, batch_size: int | None) -> Iterator[np.ndarray]:
    start = 0
    while start < len(order):
        size = batch_size
        if size is None:
            # ascending lengths: guess by the first cell, then correct by the last of that guess
            size = pick_batch_size(loaded, lengths[order[start]])
            size = pick_batch_size(loaded, lengths[order[min(start + size, len(order)) - 1]])
        yield order[start : start + size]
        start += size


def _encoded_ahead(tokenizer, bins: sp.csr_matrix, batches: Iterator[np.ndarray]):
    """Rows of each batch and its arrays; the next batch is made in a thread while the model runs on this one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for rows in batches:
            following = rows, pool.submit(lambda rows=rows: tokenizer.encode_bins(bins[rows]))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _run(loaded: LoadedModel, encoded: dict[str, np.ndarray], outputs: Collection[str]):
    """Outputs of one batch; halved where the GPU's memory does not hold it."""
    n_cells = len(encoded["input_ids"])
    try:
        return _forward(loaded, encoded, outputs)
    except torch.OutOfMemoryError:
        if n_cells == 1:
            raise
    # outside the handler: the failed batch's tensors are freed by now
    torch.cuda.empty_cache()
    halves = [
        _run(loaded, {name: array[part] for name, array in encoded.items()}, outputs)
        for part in (slice(n_cells // 2), slice(n_cells // 2, None))
    ]
    return {name: np.concatenate([half[name] for half in halves]) for name in outputs}


@torch.inference_mode()
def _forward(loaded: LoadedModel, arrays: dict[str, np.ndarray], outputs: Collection[str]):
    inputs = {name: _to_device(array, loaded.device) for name, array in arrays.items()}
    half = loaded.dtype != torch.float32
    autocast = torch.autocast(loaded.device.type, loaded.dtype) if half else contextlib.nullcontext()
    model, found = loaded.model, {}
    # in turn, and without hooks that would catch what passes by: another thread may run the same model
    with autocast:
        encoded = model.base_model(**inputs)
        states = encoded.last_hidden_state, inputs.get("attention_mask"), inputs.get("gene_ids")
        cells = encoded.get("pooler_output")
        if "pooled" in outputs and cells is None:
            cells = model.classifier.pool(*states)
        of_encoder = {"pooled"} if loaded.has_cell_vectors else {"pooled", "embeddings"}
        if set(outputs) - of_encoder:
            found = model.classifier(*states, cells)
    found["pooled"] = cells
    if "embeddings" in outputs:
        found["embeddings"] = found.get("cell_vectors")
        if found["embeddings"] is None:
            found["embeddings"] = cell_embedding(encoded, **inputs)
    return {name: found[name].float().cpu().numpy() for name in outputs}


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # from pinned memory the copy need not be waited for
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
