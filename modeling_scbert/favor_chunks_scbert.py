"""
Steps of FAVOR+ attention on one chunk of positions: what favor_chunked_scbert.py and chunked_layer_scbert.py loop over.

Logarithms are to base 2, with log2(e) folded into the projection, so that a feature costs one product and one
``exp2`` in place. Everything that scales a whole position (the |x'|^2/2 term, the stabiliser, the mask) is applied to
the [length, dv + 1] side instead of the [length, m] side. Epsilon enters as rank-one corrections:
``(E + eps)^T V = E^T V + eps * sum V``.
"""

import math
import os

import torch

LOG2_E = math.log2(math.e)
# features are left unshifted while their largest logarithm (base 2) stays within this bound: a float32 holds 2^126
LOG2_LIMIT = 48.0
# bytes of a chunk's features when the cache size is unknown, and on accelerators
DEFAULT_CHUNK_BYTES = 8 << 20
ACCELERATOR_CHUNK_BYTES = 256 << 20


def chunk_positions(heads: int, num_features: int, device: torch.device) -> int:
    """
    Positions per chunk such that their features, ``heads * num_features`` of 4 bytes, take a quarter of the last-level
    cache; accelerators get larger chunks.

    The environment variable ``SCBERT_CHUNK_SIZE`` overrides it.

    Examples
    --------
    >>> chunk_positions(10, 266, torch.device("cpu")) % 64
    0
    """
    if override := os.environ.get("SCBERT_CHUNK_SIZE"):
        return max(1, int(override))
    budget = ACCELERATOR_CHUNK_BYTES if device.type != "cpu" else _cache_bytes() // 4
    positions = budget // (heads * num_features * 4)
    return max(64, min(positions, 8192) // 64 * 64)


def _cache_bytes() -> int:
    """Size of the last-level cache, within reason; virtual machines often report none, or a whole socket's."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        size = 0
    return min(size, 4 * DEFAULT_CHUNK_BYTES) if size >= 1 << 20 else 4 * DEFAULT_CHUNK_BYTES


def joined_heads(x: torch.Tensor, dtype: torch.dtype, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Chunk ``[batch, heads, length, d]`` as a contiguous ``[batch * heads, length, d]``, masked to zero."""
    x = x.to(dtype)
    if keep is not None:
        x = x.masked_fill(~keep[:, None, :, None], 0)
    return x.reshape(-1, *x.shape[2:]).contiguous()


def keep_column(keep: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Mask ``[batch, length]`` as ``[batch * heads, length, 1]``."""
    return None if keep is None else keep.repeat_interleave(heads, 0).unsqueeze(-1)


def cell_groups(cells: int, length: int, chunk_size: int) -> list[slice]:
    """Cells that share a chunk: one at a time when long, several when short."""
    size = max(1, chunk_size // max(1, length))
    return [slice(start, min(start + size, cells)) for start in range(0, cells, size)]


def chunk_bounds(length: int, chunk_size: int, keep: torch.Tensor | None = None) -> list[tuple[int, int]]:
    """Chunk boundaries; with a mask, none after the last position in use."""
    if keep is not None:
        used = keep.any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 0
    return [(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class FeatureChunks:
    """
    Random features of one chunk after another, in one reused buffer; base-2 logarithms throughout.

    The projection matrix is ``[m, d]``, the dtype that of the computation: float32 or float64.
    """

    def __init__(self, projection_matrix: torch.Tensor, dtype: torch.dtype):
        self.dtype = dtype
        self.dim = projection_matrix.shape[1]
        # d x_log / dx without the change of base, [m, d]
        self.gradient_matrix = projection_matrix.to(dtype) * self.dim**-0.25
        self.matrix = (self.gradient_matrix * LOG2_E).T.contiguous()
        # what the buffer of features holds
        self.current = None
        self._buffers = {}

    def buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """Uninitialised ``[rows, columns]`` of a buffer kept under ``name`` between chunks."""
        held = self._buffers.get(name)
        if held is None or held.numel() < rows * columns:
            held = self._buffers[name] = self.matrix.new_empty(rows * columns)
        return held[: rows * columns].view(rows, columns)

    def logarithms(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of a contiguous chunk ``[n, length, d]``: ``w.x'`` in the buffer, ``[n, length, m]``, and ``|x'|^2 / 2``,
        ``[n, length, 1]``.
        """
        rows = x.shape[0] * x.shape[1]
        logs = torch.mm(
            x.view(rows, self.dim), self.matrix, out=self.buffer("features", rows, self.matrix.shape[1])
        )
        half_square = x.square().sum(-1, keepdim=True).mul_(LOG2_E / 2 * self.dim**-0.5)
        self.current = logs.view(*x.shape[:2], -1)
        return self.current, half_square

    def products(self, left: torch.Tensor, right: torch.Tensor, name: str) -> torch.Tensor:
        """Batched matrix product into the buffer ``name``."""
        shape = (*left.shape[:2], right.shape[2])
        return torch.bmm(left, right, out=self.buffer(name, shape[0] * shape[1], shape[2]).view(shape))


def per_head(per_cell: torch.Tensor, heads: int) -> torch.Tensor:
    """``[batch]`` as ``[batch * heads, 1, 1]``."""
    return per_cell.repeat_interleave(heads)[:, None, None]


class KeyContext:
    """Running ``sum_j exp2(log phi_k(j)) [v_j, 1]`` of a group of cells, under a shift that follows the maximum."""

    def __init__(self, features: FeatureChunks, cells: int, heads: int, value_width: int):
        new = features.matrix.new_zeros
        self.features, self.cells, self.heads = features, cells, heads
        self.table = new(cells * heads, features.matrix.shape[1], value_width + 1)
        self.sums = new(cells * heads, 1, value_width + 1)
        self.shift = new(cells)
        self.maximum = torch.full_like(self.shift, -torch.inf)

    def add(self, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Add a chunk: contiguous ``[cells * heads, length, d]`` and ``[..., dv]``, mask ``[..., length, 1]``."""
        logs, half_square = self.features.logarithms(key)
        row_max = logs.amax(-1, keepdim=True)
        if keep is not None:
            row_max.masked_fill_(~keep, -torch.inf)
        self._follow(row_max.view(self.cells, -1).amax(1))
        if self.shift.any():
            logs.sub_(per_head(self.shift, self.heads))
        weighted = _with_ones(value)
        if keep is not None:
            weighted[..., -1:].mul_(keep)
        self.sums += weighted.sum(1, keepdim=True)
        weighted.mul_(half_square.neg_().exp2_())
        self.table.baddbmm_(logs.exp2_().mT, weighted)

    def _follow(self, chunk_max: torch.Tensor) -> None:
        """Take the chunk's maximum in; move the shift, and what is summed so far, only where it drifts too far."""
        self.maximum = torch.maximum(self.maximum, chunk_max)
        drift = torch.where(self.maximum.isinf(), 0, self.maximum - self.shift)
        drift = torch.where(drift.abs() > LOG2_LIMIT, drift, 0)
        if drift.any():
            self.table.mul_(per_head(drift.neg().exp2_(), self.heads))
            self.shift = self.shift + drift

    def finish(self, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The context table ``[cells * heads, m, dv + 1]`` under the final stabiliser, and that, ``[cells]``."""
        self.maximum = torch.where(self.maximum.isinf(), self.shift, self.maximum)
        self.table.mul_(per_head((self.shift - self.maximum).exp2_(), self.heads))
        return self.table.add_(self.sums, alpha=epsilon), self.maximum

    def mean(self) -> torch.Tensor:
        """Mean value of each head over the keys in use, ``[cells * heads, 1, dv]``."""
        return self.sums[..., :-1] / self.sums[..., -1:].clamp_min(1)


def centre(table: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Make a context table that of the values less their mean, in place: outputs lack the mean then; returns it."""
    table[..., :-1] -= table[..., -1:] * mean
    return mean


def uncentre_gradient(table_grad: torch.Tensor, mean: torch.Tensor) -> None:
    """Make the gradient of a centred table that of the table itself, in place."""
    table_grad[..., -1:] -= (table_grad[..., :-1] * mean).sum(-1, keepdim=True)


def _with_ones(value: torch.Tensor) -> torch.Tensor:
    """``[v, 1]``: a copy with a column of ones, which carries the normaliser through the products."""
    joined = value.new_empty(*value.shape[:-1], value.shape[-1] + 1)
    joined[..., :-1] = value
    joined[..., -1] = 1
    return joined


def attend(
    features: FeatureChunks, query: torch.Tensor, table: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Query pass over one chunk, contiguous ``[cells * heads, length, d]``, with the table of `KeyContext.finish`.

    Gives ``[numerator, normaliser]`` ``[cells * heads, length, dv + 1]``, in a buffer that the next chunk reuses; the
    stabiliser ``[cells * heads, length, 1]`` to base 2; what the features are multiplied by, of the same shape. The
    features stay in ``features.current``, for `query_backward`.
    """
    logs, half_square = features.logarithms(query)
    row_max = logs.amax(-1, keepdim=True)
    scale = position_scale(logs, row_max, half_square)
    joined = features.products(logs.exp2_(), table, "joined")
    joined.mul_(scale).add_(table.sum(1, keepdim=True), alpha=epsilon)
    # a cell without keys has no normaliser: its output is zero
    normaliser = joined[..., -1:]
    normaliser.masked_fill_(normaliser == 0, 1)
    return joined, row_max, scale


def position_scale(logs: torch.Tensor, stabiliser: torch.Tensor, half_square: torch.Tensor) -> torch.Tensor:
    """What exp2(logs) must be multiplied by, per position; shifts ``logs`` in place only where they would overflow."""
    if stabiliser.abs().amax() > LOG2_LIMIT:
        logs.sub_(stabiliser)
        return half_square.neg_().exp2_()
    return half_square.add_(stabiliser).neg_().exp2_()


def query_backward(
    features: FeatureChunks,
    query: torch.Tensor,
    exponentials: torch.Tensor,
    scale: torch.Tensor,
    joined: torch.Tensor,
    table: torch.Tensor,
    table_grad: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """
    Backward of `attend` over one chunk: its gradient, in a buffer that the next chunk reuses.

    Features ``[cells * heads, length, m]`` and their scale are those of `attend`; ``joined`` is the gradient of its
    output, see `joined_gradient`, and overwritten. The chunk's gradient of the table is added to ``table_grad``.
    """
    table_grad.add_(joined.sum(1, keepdim=True), alpha=epsilon)
    joined.mul_(scale)
    table_grad.baddbmm_(exponentials.mT, joined)
    feature_grad = features.products(joined, table.mT, "feature_grad").mul_(exponentials)
    # this sum is also -eps * (joined . sum of table), but that difference loses small gradients to rounding
    return _input_gradient(features, feature_grad, feature_grad.sum(-1, keepdim=True), query)


def joined_gradient(grad: torch.Tensor, output: torch.Tensor, normaliser: torch.Tensor) -> torch.Tensor:
    """Gradient of ``[numerator, normaliser]`` from that of their quotient, the output."""
    joined = grad.new_empty(*grad.shape[:-1], grad.shape[-1] + 1)
    torch.div(grad, normaliser, out=joined[..., :-1])
    torch.sum((joined[..., :-1] * output).neg_(), -1, keepdim=True, out=joined[..., -1:])
    return joined


def key_backward(
    features: FeatureChunks,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    key_max: torch.Tensor,
    table_grad: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradients of key and value chunks, as `KeyContext.add` took them; the former in a buffer that the next chunk reuses.

    The stabiliser ``key_max`` is ``[cells * heads, 1, 1]``, the gradient of the context ``[cells * heads, m, dv + 1]``.
    """
    logs, half_square = features.logarithms(key)
    scale = position_scale(logs, key_max, half_square)
    if keep is not None:
        scale.mul_(keep)
    exponentials = logs.exp2_()
    # per position: E . d(context), of which all but the last column is the value's gradient
    joined = features.products(exponentials, table_grad, "joined").mul_(scale)
    weighted = _with_ones(value)
    row_sum = (weighted * joined).sum(-1, keepdim=True)
    feature_grad = features.products(weighted.mul_(scale), table_grad.mT, "feature_grad").mul_(exponentials)
    value_grad = joined[..., :-1] + epsilon * table_grad[..., :-1].sum(1, keepdim=True)
    if keep is not None:
        value_grad.mul_(keep)
    return _input_gradient(features, feature_grad, row_sum, key), value_grad


def _input_gradient(
    features: FeatureChunks, feature_grad: torch.Tensor, row_sum: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """From the gradient of ``w.x' - |x'|^2/2`` (and its sum over features) to the gradient of x."""
    rows = feature_grad.shape[0] * feature_grad.shape[1]
    out = features.buffer("input_grad", rows, features.dim)
    torch.mm(feature_grad.view(rows, -1), features.gradient_matrix, out=out)
    return out.view(x.shape).addcmul_(x, row_sum, value=-(features.dim**-0.5))
