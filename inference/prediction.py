"""Run a model over binned cells: batches by length, mean embeddings, probabilities."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse as sp
import torch

from ..modeling_scbert.pipeline_scbert import mean_of_expressed
from ..modeling_scbert.workload_scbert import expect_work
from .loading import LoadedModel

logger = logging.getLogger(__name__)

# activations a batch may take: more on a CPU gains nothing, its caches are long full
CPU_BATCH_BYTES = 1 << 30
MAX_BATCH = 256


def predict(
    loaded: LoadedModel, bins: sp.csr_matrix, batch_size: int | None = None, embed: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """
    Logits and embeddings of binned cells, batch by batch.

    A cell's result depends neither on its batch mates nor on the order: FAVOR+ stabilises per cell, and masked
    positions contribute exactly nothing. Cells are taken by length, so that batches hold little padding.

    Parameters
    ----------
    loaded
        Model and tokenizer.
    bins
        Expression bins [cells, panel], of ``tokenizer.bin_cells``.
    batch_size
        Cells per step; chosen by the size of the model and the memory if left out.
    embed
        Also return the mean embeddings.

    Yields
    ------
    rows
        Which rows of `bins`, [batch].
    logits
        float32 [batch, labels]; None for a model without a head.
    embeddings
        float32 [batch, hidden], see `mean_of_expressed`; None unless asked for or the model has no head.
    """
    lengths = sequence_lengths(loaded.tokenizer, bins)
    expect_work(loaded.model.config, lengths.sum())
    order = np.argsort(lengths, kind="stable")
    batches = _batches(order, lengths, loaded, batch_size)
    for rows, encoded in _encoded_ahead(loaded.tokenizer, bins, batches):
        yield rows, *_run(loaded, encoded, embed)


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


def predict_cells(
    loaded: LoadedModel,
    bins: sp.csr_matrix,
    batch_size: int | None = None,
    embed: bool = False,
    on_batch=None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Probabilities [cells, labels] and, if asked for, embeddings [cells, hidden]; zeros for cells without expression.

    Parameters
    ----------
    loaded, bins, batch_size, embed
        As in `predict`.
    on_batch : callable, optional
        Called with the number of cells that are done.
    """
    probabilities = np.zeros((bins.shape[0], len(loaded.labels)), dtype=np.float32)
    embeddings = (
        np.zeros((bins.shape[0], loaded.model.config.hidden_size), dtype=np.float32) if embed else None
    )
    expressed = np.flatnonzero(np.diff(bins.indptr))
    done = on_batch or (lambda n_cells: None)
    done(bins.shape[0] - len(expressed))
    for rows, logits, vectors in predict(loaded, bins[expressed], batch_size, embed):
        probabilities[expressed[rows]] = probabilities_of(logits, loaded.temperature)
        if embed:
            embeddings[expressed[rows]] = vectors
        done(len(rows))
    return probabilities, embeddings


def sequence_lengths(tokenizer, bins: sp.csr_matrix) -> np.ndarray:
    """Tokens of every cell, the trailing one included, [cells]."""
    if tokenizer.keep_zeros:
        return np.full(bins.shape[0], bins.shape[1] + 1)
    return np.minimum(np.diff(bins.indptr) + 1, tokenizer.max_length or np.inf).astype(int)


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


def say_batch_size(loaded: LoadedModel, batch_size: int | None = None) -> None:
    """Log how many cells go into a batch, for the longest cells the tokenizer makes."""
    longest = len(loaded.tokenizer.gene_panel) + 1
    if not loaded.tokenizer.keep_zeros:
        longest = min(longest, loaded.tokenizer.max_length or longest)
    size = batch_size or pick_batch_size(loaded, longest)
    more = "" if batch_size or loaded.tokenizer.keep_zeros else ", more of shorter ones"
    logger.info("Batches of %d cells of %s tokens%s.", size, f"{longest:,}", more)


def _run(loaded: LoadedModel, encoded: dict[str, np.ndarray], embed: bool):
    """Logits and embeddings of one batch; halved where the GPU's memory does not hold it."""
    n_cells = len(encoded["input_ids"])
    try:
        return _forward(loaded, encoded, embed)
    except torch.OutOfMemoryError:
        if n_cells == 1:
            raise
    # outside the handler: the failed batch's tensors are freed by now
    torch.cuda.empty_cache()
    halves = [
        _run(loaded, {name: array[part] for name, array in encoded.items()}, embed)
        for part in (slice(n_cells // 2), slice(n_cells // 2, None))
    ]
    return tuple(None if parts[0] is None else np.concatenate(parts) for parts in zip(*halves, strict=True))


@torch.inference_mode()
def _forward(loaded: LoadedModel, encoded: dict[str, np.ndarray], embed: bool):
    inputs = {name: _to_device(array, loaded.device) for name, array in encoded.items()}
    half = loaded.dtype != torch.float32
    autocast = torch.autocast(loaded.device.type, loaded.dtype) if half else contextlib.nullcontext()
    network = loaded.model
    has_head = hasattr(network, "classifier")
    with autocast:
        hidden = (network.scbert if has_head else network)(**inputs).last_hidden_state
        mask, gene_ids = inputs.get("attention_mask"), inputs.get("gene_ids")
        logits = network.classifier(hidden, mask, gene_ids) if has_head else None
    embeddings = mean_of_expressed(hidden, **inputs) if embed or not has_head else None
    return tuple(None if tensor is None else tensor.float().cpu().numpy() for tensor in (logits, embeddings))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # from pinned memory the copy need not be waited for
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def probabilities_of(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """
    Softmax of logits [cells, labels] divided by `temperature`, float32.

    Examples
    --------
    >>> probabilities_of(np.array([[0.0, 0.0]], dtype=np.float32))
    array([[0.5, 0.5]], dtype=float32)
    """
    scaled = logits.astype(np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32)
