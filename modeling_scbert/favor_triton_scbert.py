"""
FAVOR+ attention on CUDA: launches the kernels of favor_kernels_scbert.py and its backward.

Same function, same saved tensors as the portable engine, which it stands in for on CUDA (and under Triton's
interpreter, ``TRITON_INTERPRET=1``, where the kernels are tested on a CPU). Float32 is computed in float32 (three
tensor-float products each), bfloat16 in bfloat16 with float32 sums.
"""

import math
import os

import torch

from .favor_gradient_kernels_scbert import context_gradient_kernel, key_gradient_kernel, query_gradient_kernel
from .favor_kernels_scbert import key_kernel, query_kernel

try:
    import triton
    from triton.runtime.errors import TritonError
except ImportError:
    triton = None

# widths beyond this do not fit the registers of the kernels
MAX_WIDTH = 128
# features and positions of a tile, and how it is compiled
TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
# what Triton raises where a kernel does not compile or launch, beside the errors of the system and of the driver
LAUNCH_ERRORS = () if triton is None else (TritonError,)


def triton_supports(query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor) -> str | None:
    """Why the kernels cannot take these tensors, if they cannot."""
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on no CUDA device"
    if triton is None:
        return "Triton is not installed"
    if query.dtype == torch.float64:
        return "float64 is none of its dtypes"
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return f"heads are wider than {MAX_WIDTH}"
    if 0 in query.shape or 0 in value.shape:
        return "the batch is empty"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def triton_state(
    query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor
) -> list[torch.Tensor]:
    """What the forward keeps for the backward beside the output, uninitialised."""
    cells, heads, length, _ = query.shape
    new = torch.empty(0, dtype=torch.float32, device=query.device).new_empty
    table = new(cells * heads, len(projection_matrix), value.shape[-1] + 1)
    return [table, new(cells), new(cells, heads, length), new(cells, heads, length)]


class _Launch:
    """Arguments the kernels share."""

    def __init__(self, query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor):
        # float16 has too narrow a range for gradients divided by the normaliser: it is computed in float32
        self.dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32
        if self.dtype == torch.bfloat16 and not query.is_cuda:
            # the interpreter cannot multiply bfloat16
            self.dtype = torch.float16
        self.batch, self.heads, _, self.dim = query.shape
        self.rows, self.features, self.width = (
            self.batch * self.heads,
            len(projection_matrix),
            value.shape[-1],
        )
        # |x'|^2 / 2 = scale |x|^2 to base 2
        self.scale = math.log2(math.e) / 2 * self.dim**-0.5
        matrix = projection_matrix.float() * (self.dim**-0.25 * math.log2(math.e))
        self.matrix = matrix.to(self.dtype).contiguous()
        low = self.dtype != torch.float32
        self.low = (matrix - self.matrix.float()).to(self.dtype).contiguous() if low else self.matrix
        self.device = query.device
        self.constants = {
            "FEATURES": self.features,
            "D": self.dim,
            "DV": self.width,
            "BLOCK_D": max(16, triton.next_power_of_2(self.dim)),
            "BLOCK_DV": max(16, triton.next_power_of_2(self.width)),
            "HAS_LOW": low,
            "PRECISION": "tf32x3" if query.is_cuda else "ieee",
            **TILES,
        }

    def rows_of(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """``[batch, heads, length, d]`` in the kernels' dtype with contiguous rows, and its other strides."""
        x = x.to(self.dtype)
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x, x.stride()[:3]

    def new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def parts(self, length: int) -> int:
        """Parts of the sequence that are summed apart: enough programs for the device, no more than blocks."""
        processors = 1
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        programs = self.rows * triton.cdiv(self.features, TILES["BLOCK_M"])
        return max(1, min(triton.cdiv(4 * processors, programs), triton.cdiv(length, TILES["BLOCK_N"])))

    def sum_grid(self, parts: int) -> tuple[int, int, int]:
        """Grid of the passes that sum over positions."""
        return triton.cdiv(self.features, TILES["BLOCK_M"]), parts, self.rows

    def row_grid(self, length: int) -> tuple[int, int]:
        """Grid of the passes that give one row per position."""
        return triton.cdiv(length, TILES["BLOCK_N"]), self.rows


def _mask_argument(attention_mask: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if attention_mask is None else attention_mask.to(torch.int8).contiguous()


def _context(launch: _Launch, key, value, attention_mask, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """Context table [batch * heads, m, dv + 1] and key maximum [batch]."""
    (key, key_strides), (value, value_strides) = launch.rows_of(key), launch.rows_of(value)
    length = key.shape[2]
    parts = launch.parts(length)
    shape = (launch.rows, parts, launch.features)
    context, normaliser, maximum = launch.new(*shape, launch.width), launch.new(*shape), launch.new(*shape)
    mask = _mask_argument(attention_mask, maximum)
    key_kernel[launch.sum_grid(parts)](
        *(key, value, mask, launch.matrix, launch.low, context, normaliser, maximum),
        *(*key_strides, *value_strides, launch.heads, length, parts, launch.scale),
        HAS_MASK=attention_mask is not None,
        **launch.constants,
    )
    highest = maximum.view(launch.batch, -1).amax(1)
    highest = torch.where(highest.isinf(), 0, highest)
    rescale = (maximum - highest.repeat_interleave(launch.heads)[:, None, None]).exp2_()
    table = launch.new(launch.rows, launch.features, launch.width + 1)
    table[..., :-1] = (context * rescale.unsqueeze(-1)).sum(1)
    table[..., -1] = (normaliser * rescale).sum(1)
    if attention_mask is None:
        sums = value.sum(2, dtype=torch.float32).flatten(0, 1)
        counts = torch.full_like(sums[:, :1], length)
    else:
        keep = attention_mask[:, None, :, None].expand(-1, launch.heads, -1, -1)
        sums = value.masked_fill(~keep, 0).sum(2, dtype=torch.float32).flatten(0, 1)
        counts = keep.sum(2, dtype=torch.float32).flatten(0, 1)
    return table.add_(torch.cat([sums, counts], 1).unsqueeze(1), alpha=epsilon), highest


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward of the engine's operator: output [B, Lq, H, dv], context table, key max, query max, normaliser."""
    launch = _Launch(query, value, projection_matrix)
    table, key_max = _context(launch, key, value, attention_mask, epsilon)
    query, strides = launch.rows_of(query)
    length = query.shape[2]
    output = value.new_empty(launch.batch, length, launch.heads, launch.width)
    query_max, denominator = (launch.new(launch.batch, launch.heads, length) for _ in range(2))
    query_kernel[launch.row_grid(length)](
        *(query, launch.matrix, launch.low, *_halves(launch, table), table.sum(1)),
        *(output, query_max, denominator, *strides, launch.heads, length, launch.scale, epsilon),
        **launch.constants,
    )
    return output, table, key_max, query_max, denominator


def _halves(launch: _Launch, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table [rows, m, dv + 1] as context in the kernels' dtype and normaliser in float32."""
    return table[..., :-1].to(launch.dtype).contiguous(), table[..., -1].contiguous()


def triton_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output: torch.Tensor,
    table: torch.Tensor,
    key_max: torch.Tensor,
    query_max: torch.Tensor,
    denominator: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of the engine's operator: gradients of query, key and value, each stored as [B, L, H, d]."""
    launch = _Launch(query, value, projection_matrix)
    grads = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
    query, query_strides = launch.rows_of(query)
    length = query.shape[2]
    joined = (grad.to(launch.dtype).contiguous(), output.to(launch.dtype))
    saved = (query_max, denominator)

    parts = launch.parts(length)
    shape = (launch.rows, parts, launch.features)
    context_grad, normaliser_grad = launch.new(*shape, launch.width), launch.new(*shape)
    sums = launch.new(launch.rows, parts, launch.width + 1)
    context_gradient_kernel[launch.sum_grid(parts)](
        *(query, *joined, launch.matrix, launch.low, *saved, context_grad, normaliser_grad, sums),
        *(*query_strides, launch.heads, length, parts, launch.scale),
        **launch.constants,
    )
    query_gradient_kernel[launch.row_grid(length)](
        *(query, *joined, launch.matrix, launch.low, *_halves(launch, table), *saved, grads[0]),
        *(*query_strides, launch.heads, length, launch.scale),
        **launch.constants,
    )
    table_grad = torch.cat([context_grad.sum(1), normaliser_grad.sum(1).unsqueeze(-1)], -1)
    table_grad.add_(sums.sum(1).unsqueeze(1), alpha=epsilon)

    (key, key_strides), (value, value_strides) = launch.rows_of(key), launch.rows_of(value)
    length = key.shape[2]
    mask = _mask_argument(attention_mask, key_max)
    key_gradient_kernel[launch.row_grid(length)](
        *(key, value, mask, launch.matrix, launch.low, key_max, *_halves(launch, table_grad)),
        *(table_grad[..., :-1].sum(1), grads[1], grads[2], *key_strides, *value_strides),
        *(launch.heads, length, launch.scale, epsilon),
        HAS_MASK=attention_mask is not None,
        **launch.constants,
    )
    return tuple(grads)
