"""
What frozen first layers put out, computed once per cell and kept.

Fine-tuning as the original does trains the block before the last, the final norm and the head. Everything before that
block gives the same output for a cell in every epoch: four of six blocks, and most of a step.
"""

import contextlib
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

logger = logging.getLogger(__name__)

# share of the free memory or disk that a cache may take
MEMORY_SHARE = 0.25
DISK_SHARE = 0.5


class FrozenLayerCache:
    """
    Keeps the output of an encoder's frozen first layers, and stands in for them.

    A cell is known by a hash of its tokens (bins, genes, modalities) and of the frozen weights; everything is forgotten
    when the weights change. Results are those without the cache. Layers count as frozen up to the first that has a
    weight to train. Cells beyond `max_bytes` are computed every time: in epochs over the same cells, whatever is thrown
    out to make room would be asked for next. With a folder cells are kept there, in a file each, and not in memory.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertForCellClassification
    >>> from scbert.training.initial_model import freeze_for_finetuning
    >>> model = ScBertForCellClassification(ScBertConfig(hidden_size=16, max_position_embeddings=51))
    >>> freeze_for_finetuning(model)
    >>> cache = FrozenLayerCache(model.scbert).attach()
    >>> ids = torch.randint(0, 6, (2, 51))
    >>> _ = model(ids), model(ids)
    >>> cache.n_layers, cache.hits, cache.misses
    (4, 2, 2)
    """

    def __init__(self, encoder: nn.Module, max_bytes: float = float("inf"), folder: str | Path | None = None):
        self.encoder = encoder
        self.n_layers = frozen_layers(encoder)
        self.max_bytes = max_bytes
        self.folder = None if folder is None else Path(folder)
        self.hits = self.misses = self.used = 0
        # in memory the states by key, on disk their shapes and types
        self._kept: dict = {}
        self._versions = self._weights = None

    def attach(self) -> "FrozenLayerCache":
        """Stand in for the frozen layers from now on."""
        self.encoder.prefix = self
        return self

    def detach(self) -> None:
        """Give the encoder its layers back, and forget what was kept."""
        self.encoder.prefix = None
        self.clear()

    def clear(self) -> None:
        """Forget what was kept."""
        if self.folder is not None:
            for key in self._kept:
                (self.folder / key).unlink(missing_ok=True)
        self._kept.clear()
        self.used = 0

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """
        Hidden states after the frozen layers, ``[batch, length, hidden]``, and how many layers these are.

        Inputs are as `ScBertModel.forward` takes them; the states are zero at padding, which nothing reads.
        """
        self._check_weights()
        # ids may be given once for all cells
        genes, modalities = (x if x is None else x.expand(input_ids.shape) for x in (gene_ids, modality_ids))
        inputs = [input_ids, attention_mask, genes, modalities]
        keys = [self._key([None if x is None else x[row] for x in inputs]) for row in range(len(input_ids))]
        states = [self._take(key) for key in keys]
        missing = [row for row, state in enumerate(states) if state is None]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = self._compute(*[None if x is None else x[missing] for x in inputs])
            for row, hidden in zip(missing, computed, strict=True):
                states[row] = hidden if attention_mask is None else hidden[attention_mask[row].bool()]
                self._keep(keys[row], states[row])
        return self._join(states, attention_mask, input_ids), self.n_layers

    def _take(self, key: str) -> torch.Tensor | None:
        found = self._kept.get(key)
        if found is None or self.folder is None:
            return found
        shape, dtype = found
        return torch.from_numpy(np.fromfile(self.folder / key, dtype=np.uint8)).view(dtype).view(shape)

    def _keep(self, key: str, state: torch.Tensor) -> None:
        if self.used + state.nbytes > self.max_bytes:
            return
        if self.folder is None:
            self._kept[key] = state.to("cpu", copy=True)
        else:
            try:
                (self.folder / key).write_bytes(_bytes(state))
            except OSError as error:
                logger.warning("No more outputs of frozen layers are kept on disk: %s.", error)
                (self.folder / key).unlink(missing_ok=True)
                self.max_bytes = self.used
                return
            self._kept[key] = state.shape, state.dtype
        self.used += state.nbytes

    def _check_weights(self) -> None:
        """Forget everything once a frozen weight has changed; in-place writes show in its version counter."""
        parts = [self.encoder.embeddings, *self.encoder.layers[: self.n_layers]]
        tensors = [tensor for part in parts for tensor in part.state_dict(keep_vars=True).values()]
        device = tensors[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        versions = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors] + [dtype]
        if versions == self._versions:
            return
        digest = hashlib.blake2b(str(dtype).encode())
        for tensor in tensors:
            digest.update(_bytes(tensor))
        if digest.digest() != self._weights:
            self.clear()
        self._versions, self._weights = versions, digest.digest()

    def _key(self, inputs: list[torch.Tensor | None]) -> str:
        """Hash of one cell's tokens, pads left out, under the weights."""
        mask = inputs[1]
        digest = hashlib.blake2b(self._weights, digest_size=20)
        for tokens in (inputs[0], *inputs[2:]):
            tokens = tokens if tokens is None or mask is None else tokens[mask.bool()]
            digest.update(b"-" if tokens is None else _bytes(tokens))
        return digest.hexdigest()

    def _compute(self, input_ids, attention_mask, gene_ids, modality_ids) -> torch.Tensor:
        hidden = self.encoder.embeddings(input_ids, gene_ids, modality_ids)
        for layer in self.encoder.layers[: self.n_layers]:
            hidden = layer(hidden, attention_mask)
        return hidden

    def _join(self, states, attention_mask, input_ids) -> torch.Tensor:
        dtype = self.encoder.embeddings.expression_embeddings.weight.dtype
        if attention_mask is None:
            return torch.stack([state.to(input_ids.device, dtype) for state in states])
        hidden = torch.zeros(*input_ids.shape, states[0].shape[-1], dtype=dtype, device=input_ids.device)
        for row, state in enumerate(states):
            hidden[row, attention_mask[row].bool()] = state.to(input_ids.device, dtype)
        return hidden


def frozen_layers(encoder: nn.Module) -> int:
    """
    First layers of an encoder whose output for a cell never changes.

    None, where the embeddings are trained, dropout makes outputs random, or two residual streams run side by side.
    """
    if encoder.config.reversible or any(weight.requires_grad for weight in encoder.embeddings.parameters()):
        return 0
    if encoder.config.hidden_dropout_prob or encoder.config.attention_probs_dropout_prob:
        return 0
    trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in encoder.layers]
    return trained.index(True) if True in trained else len(trained)


@contextlib.contextmanager
def cached_frozen_layers(
    encoder: nn.Module, storage: str, n_cells: int, folder: str | Path
) -> Iterator[FrozenLayerCache | None]:
    """
    Keep what the frozen first layers of an encoder put out, where there is room for it, until the block ends.

    The storage ``"auto"`` takes memory if all cells fit a quarter of what is free, the disk (the folder) if they fit
    half of that, and as much as fits in memory otherwise. None where nothing is frozen or it is ``"off"``.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertModel
    >>> encoder = ScBertModel(ScBertConfig(hidden_size=16, max_position_embeddings=51))
    >>> with cached_frozen_layers(encoder, "auto", 10, "checkpoints") as cache:
    ...     print(cache)
    None
    """
    if storage == "off" or not frozen_layers(encoder):
        yield None
        return
    config, itemsize = encoder.config, encoder.embeddings.expression_embeddings.weight.dtype.itemsize
    needed = n_cells * config.max_position_embeddings * config.hidden_size * itemsize
    Path(folder).mkdir(parents=True, exist_ok=True)
    room = {
        "memory": int(psutil.virtual_memory().available * MEMORY_SHARE),
        "disk": int(shutil.disk_usage(folder).free * DISK_SHARE),
    }
    if storage == "auto":
        storage = next((place for place in room if needed <= room[place]), "memory")
    with tempfile.TemporaryDirectory(prefix="frozen-", dir=folder) as files:
        cache = FrozenLayerCache(encoder, room[storage], files if storage == "disk" else None).attach()
        logger.info(
            "The output of %d frozen layers is kept in %s: up to %.1f GB for %d cells, %.1f GB at most.",
            *(cache.n_layers, storage, needed / 1e9, n_cells, room[storage] / 1e9),
        )
        try:
            yield cache
        finally:
            cache.detach()


def _version(tensor: torch.Tensor) -> int:
    # tensors made in inference mode are never written to in place, and have no counter
    return 0 if tensor.is_inference() else tensor._version


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
