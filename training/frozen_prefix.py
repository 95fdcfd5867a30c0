"""
What frozen first layers put out, computed once per cell and kept.

Fine-tuning as the original does trains the block before the last, the final norm and the head. Everything before that
block gives the same output for a cell in every epoch: four of six blocks, and most of a step.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

# share of the free memory or disk that a cache may take
MEMORY_SHARE = 0.25
DISK_SHARE = 0.5


class FrozenPrefix:
    """
    Keeps the output of an encoder's frozen first layers, and stands in for them.

    A cell is known by a hash of its tokens (bins, genes, modalities) and of the frozen weights; the store is emptied
    when the weights change. Results are the same as without the cache; in ``bfloat16`` they are rounded once.

    Parameters
    ----------
    encoder
        `ScBertModel`. Layers count as frozen up to the first that has a weight to train.
    storage
        ``"memory"`` or ``"disk"``.
    max_bytes
        What the store may take; cells beyond it are computed every time. Nothing is thrown out to make room: in epochs
        over the same cells, whatever is thrown out would be asked for next.
    folder
        Where ``"disk"`` keeps its files, one per cell; a temporary folder if left out. Emptied by `detach`.
    dtype
        What is stored; the computed dtype if left out.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertForCellClassification
    >>> from scbert.training.finetune_trainer import freeze_for_finetuning
    >>> model = ScBertForCellClassification(ScBertConfig(hidden_size=16, max_position_embeddings=51))
    >>> freeze_for_finetuning(model)
    >>> cache = FrozenPrefix(model.scbert).attach()
    >>> ids = torch.randint(0, 6, (2, 51))
    >>> _ = model(ids), model(ids)
    >>> cache.n_layers, cache.hits, cache.misses
    (4, 2, 2)
    """

    def __init__(
        self,
        encoder: nn.Module,
        storage: str = "memory",
        max_bytes: int | None = None,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ):
        # the encoder holds the cache: a reference back would keep both alive, and would be copied with the model
        self._encoder = weakref.ref(encoder)
        self.n_layers = frozen_layers(encoder)
        self.dtype = dtype
        self.hits = self.misses = 0
        max_bytes = (1 << 62) if max_bytes is None else max_bytes
        self.store = MemoryStore(max_bytes) if storage == "memory" else DiskStore(max_bytes, folder)
        self._versions = self._weights = None

    def attach(self) -> "FrozenPrefix":
        """Stand in for the frozen layers from now on."""
        self._encoder().prefix = self
        return self

    def detach(self) -> None:
        """Give the encoder its layers back, and forget what was kept."""
        if (encoder := self._encoder()) is not None:
            encoder.prefix = None
        self.store.clear()

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        modality_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """
        Hidden states after the frozen layers.

        Parameters
        ----------
        input_ids, attention_mask, gene_ids, modality_ids
            As `ScBertModel.forward` takes them.

        Returns
        -------
        hidden_states
            ``[batch, length, hidden]``; zero at padding, which nothing reads.
        n_layers
            Layers these states have passed.
        """
        self._check_weights()
        inputs = [input_ids, attention_mask, *(_per_cell(ids, input_ids) for ids in (gene_ids, modality_ids))]
        keys = [self._key([None if x is None else x[row] for x in inputs]) for row in range(len(input_ids))]
        states = [self.store.get(key) for key in keys]
        missing = [row for row, state in enumerate(states) if state is None]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = self._compute([None if x is None else x[missing] for x in inputs])
            for row, hidden in zip(missing, computed, strict=True):
                states[row] = hidden if attention_mask is None else hidden[attention_mask[row].bool()]
                if self.store.has_room(states[row].numel() * (self.dtype or hidden.dtype).itemsize):
                    self.store.put(keys[row], states[row].to("cpu", self.dtype or hidden.dtype, copy=True))
        return self._join(states, attention_mask, input_ids), self.n_layers

    def _check_weights(self) -> None:
        """Forget everything once a frozen weight has changed; in-place writes show in its version counter."""
        encoder = self._encoder()
        parts = [encoder.embeddings, *encoder.layers[: self.n_layers]]
        tensors = [tensor for part in parts for tensor in part.state_dict(keep_vars=True).values()]
        versions = [(tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        device = tensors[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        versions.append(dtype)
        if versions == self._versions:
            return
        digest = hashlib.blake2b(str(dtype).encode())
        for tensor in tensors:
            digest.update(_bytes(tensor))
        if self._weights not in (None, digest.digest()):
            self.store.clear()
        self._versions, self._weights = versions, digest.digest()

    def _key(self, inputs: list[torch.Tensor | None]) -> str:
        """Hash of one cell's tokens, pads left out, under the weights."""
        mask = inputs[1]
        digest = hashlib.blake2b(self._weights, digest_size=20)
        for tokens in (inputs[0], *inputs[2:]):
            tokens = None if tokens is None else tokens if mask is None else tokens[mask.bool()]
            digest.update(b"-" if tokens is None else _bytes(tokens))
        return digest.hexdigest()

    def _compute(self, inputs: list[torch.Tensor | None]) -> torch.Tensor:
        encoder = self._encoder()
        input_ids, attention_mask, gene_ids, modality_ids = inputs
        hidden = encoder.embeddings(input_ids, gene_ids, modality_ids)
        for layer in encoder.layers[: self.n_layers]:
            hidden = layer(hidden, attention_mask)
        return hidden

    def _join(self, states, attention_mask, input_ids) -> torch.Tensor:
        dtype = self._encoder().embeddings.expression_embeddings.weight.dtype
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


def attach_frozen_prefix(
    encoder: nn.Module, storage: str, n_cells: int, folder: str | Path | None = None
) -> FrozenPrefix | None:
    """
    Keep what the frozen first layers of an encoder put out, where there is room for it.

    Parameters
    ----------
    encoder
        `ScBertModel`.
    storage
        ``"memory"``, ``"disk"``, ``"off"``; ``"auto"`` takes memory if all cells fit a quarter of what is free, disk if
        they fit half of that, in bfloat16 where only so they fit, and as much as fits in memory otherwise.
    n_cells
        Cells that will be asked for.
    folder
        For ``"disk"``.

    Returns
    -------
    The cache, attached; None where nothing is frozen or ``storage`` is ``"off"``.

    Examples
    --------
    >>> from scbert import ScBertConfig, ScBertModel
    >>> attach_frozen_prefix(ScBertModel(ScBertConfig(hidden_size=16, max_position_embeddings=51)), "auto", 10)
    """
    if storage == "off" or not frozen_layers(encoder):
        return None
    config, itemsize = encoder.config, encoder.embeddings.expression_embeddings.weight.dtype.itemsize
    needed = n_cells * config.max_position_embeddings * config.hidden_size * itemsize
    room = {"memory": int(free_memory() * MEMORY_SHARE), "disk": int(free_disk(folder) * DISK_SHARE)}
    dtype = None
    if storage == "auto":
        fits = [place for place in ("memory", "disk") if needed <= room[place]]
        if not fits and itemsize > 2 and needed // 2 <= room["disk"]:
            fits, dtype = ["disk"], torch.bfloat16
        storage = fits[0] if fits else "memory"
    cache = FrozenPrefix(
        encoder, storage, room[storage], folder if storage == "disk" else None, dtype
    ).attach()
    logger.info(
        "The output of %d frozen layers is kept in %s: up to %.1f GB for %d cells, %.1f GB at most.",
        *(cache.n_layers, storage, needed / 1e9, n_cells, room[storage] / 1e9),
    )
    return cache


class MemoryStore:
    """Tensors by key in memory, up to ``max_bytes``."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.used = max_bytes, 0
        self._held = {}

    def has_room(self, n_bytes: int) -> bool:
        return self.used + n_bytes <= self.max_bytes

    def get(self, key: str) -> torch.Tensor | None:
        return self._held.get(key)

    def put(self, key: str, state: torch.Tensor) -> None:
        self._held[key] = state
        self.used += state.nbytes

    def clear(self) -> None:
        self._held.clear()
        self.used = 0


class DiskStore:
    """Tensors by key in files of one folder, up to ``max_bytes``; full disks only end the storing."""

    def __init__(self, max_bytes: int, folder: str | Path | None = None):
        self.max_bytes, self.used = max_bytes, 0
        self._shapes = {}
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="scbert-frozen-", dir=folder))
        self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def has_room(self, n_bytes: int) -> bool:
        return self.used + n_bytes <= self.max_bytes

    def get(self, key: str) -> torch.Tensor | None:
        if key not in self._shapes:
            return None
        shape, dtype = self._shapes[key]
        state = torch.empty(shape, dtype=dtype)
        with open(self.folder / key, "rb") as file:
            file.readinto(memoryview(state.view(torch.uint8).numpy()).cast("B"))
        return state

    def put(self, key: str, state: torch.Tensor) -> None:
        try:
            (self.folder / key).write_bytes(
                memoryview(state.contiguous().view(torch.uint8).numpy()).cast("B")
            )
        except OSError as error:
            logger.warning("No more frozen outputs are kept on disk: %s.", error)
            self.max_bytes = self.used
            with contextlib.suppress(OSError):
                (self.folder / key).unlink()
            return
        self._shapes[key] = (state.shape, state.dtype)
        self.used += state.nbytes

    def clear(self) -> None:
        for key in self._shapes:
            with contextlib.suppress(OSError):
                (self.folder / key).unlink()
        self._shapes.clear()
        self.used = 0


def free_memory() -> int:
    """Bytes of memory that are free; 4 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pages = os.sysconf_names.get("SC_AVPHYS_PAGES")
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages is not None else 4 << 30


def free_disk(folder: str | Path | None) -> int:
    """Bytes free where ``folder`` is or will be."""
    place = Path(folder or tempfile.gettempdir()).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _per_cell(ids: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor | None:
    """Ids given once for all cells, for each of them."""
    return None if ids is None else ids.expand(input_ids.shape)


def _version(tensor: torch.Tensor) -> int:
    # tensors made in inference mode are never written to in place, and have no counter
    return 0 if tensor.is_inference() else tensor._version


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
