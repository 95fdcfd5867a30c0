"""
FAVOR+ attention on CUDA: launches the kernels of favor_table_kernels_scbert.py and favor_row_kernels_scbert.py.

Also under Triton's interpreter, ``TRITON_INTERPRET=1``, where the kernels are tested on a CPU. Float32 is computed in
float32 (three tensor-float products each), bfloat16 in bfloat16 with float32 sums, float16, whose range is too narrow
for the gradients, in float32. Nothing waits for the GPU, so that the launches can be captured in a CUDA graph.
"""

import functools
import math
import os
import subprocess
from contextlib import nullcontext

import torch
import triton
from triton.runtime.errors import TritonError

from .favor_row_kernels_scbert import apply_kernel, gradient_kernel
from .favor_table_kernels_scbert import sum_kernel, table_kernel
from .favor_tiles_scbert import choose_tiles

# what Triton and the driver raise where a kernel does not compile or launch
LAUNCH_ERRORS = (RuntimeError, OSError, ValueError, subprocess.SubprocessError, TritonError)
# and among it what is no kernel's fault, or after which nothing can be computed on the device
FATAL_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
# dtypes that Triton's interpreter serves; it multiplies no bfloat16
INTERPRETED = (torch.float32, torch.float16)
# tuples in kernels, loops over them
MIN_TRITON = (3, 3)
# widths beyond this do not fit the registers of the kernels
MAX_WIDTH = 128
# features of a tile of `table_kernel`
BLOCK_M = 64
# programs of a launch for each multiprocessor, and blocks of positions below which a program is not worth its start
PROGRAMS, MIN_BLOCKS = 8, 8


def triton_supports(query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor) -> str | None:
    """Why the kernels cannot take these tensors, if they cannot."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not query.is_cuda and not interpreted:
        return "the tensors are on no CUDA device"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"Triton {triton.__version__} is installed, {'.'.join(map(str, MIN_TRITON))} is needed"
    if query.dtype == torch.float64:
        return "float64 is none of its dtypes"
    if not query.is_cuda and query.dtype not in INTERPRETED:
        return f"Triton's interpreter multiplies no {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MAX_WIDTH:
        return f"heads are wider than {MAX_WIDTH}"
    if query.is_cuda and capability_of(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; the interpreter passes for the oldest one that serves."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@functools.cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device(device: torch.device):
    """Launches go to the tensors' device, whichever is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_state(
    query: torch.Tensor, value: torch.Tensor, projection_matrix: torch.Tensor
) -> list[torch.Tensor]:
    """
    What the forward keeps for the backward beside the output, uninitialised.

    In the kernels' dtype: the output less the mean of the values ``[B, Lq, H, dv]``, the table of the context less
    that mean ``[B * H, m, dv]``, its column ``[B * H, m, 16]``. In float32: the sums of both over tiles of features
    ``[B * H, tiles, dv]`` and ``[B * H, tiles]``, the means ``[B * H, dv]``, the key maximum ``[B]``, and for each
    query ``[B, H, Lq]`` the shift of its features and the inverse of its normaliser.
    """
    cells, heads, length, _ = query.shape
    features, width, rows = len(projection_matrix), value.shape[-1], cells * heads
    computed = functools.partial(torch.empty, dtype=compute_dtype(query.dtype), device=query.device)
    exact = functools.partial(torch.empty, dtype=torch.float32, device=query.device)
    tiles = -(-features // BLOCK_M)
    return [
        computed(cells, length, heads, width),
        computed(rows, features, width),
        computed(rows, features, 16),
        exact(rows, tiles, width),
        exact(rows, tiles),
        exact(rows, width),
        exact(cells),
        exact(cells, heads, length),
        exact(cells, heads, length),
    ]


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    epsilon: float,
) -> tuple[torch.Tensor, ...]:
    """
    Forward of the operator: output ``[batch, query length, heads, dv]``, then the tensors of `triton_state`.

    Arguments are those of `favor_attention`, with any strides, and a mask of bool.
    """
    cells, heads, length, _ = query.shape
    output = value.new_empty(cells, length, heads, value.shape[-1])
    state = triton_state(query, value, projection_matrix)
    if 0 in query.shape or key.shape[2] == 0:
        # nothing to attend, or to attend to: nothing is launched
        for tensor in (output, *state):
            tensor.zero_()
        return output, *state
    launches = FavorLaunches(query, key, value, projection_matrix, attention_mask, epsilon)
    with on_device(query.device):
        parts = launches.sum_keys()
        launches.table(parts, state, keys=True)
        launches.apply_queries(state, output)
    return output, *state


def triton_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None,
    output: torch.Tensor,
    *rest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Backward of the operator: gradients of query, key and value, each stored as ``[batch, length, heads, d]``.

    ``output`` and ``rest`` are what the forward returned, and epsilon; ``grad`` is that of the output.
    """
    *state, epsilon = rest
    grads = tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value))
    if 0 in query.shape or key.shape[2] == 0:
        for tensor in grads:
            tensor.zero_()
        return grads
    launches = FavorLaunches(query, key, value, projection_matrix, attention_mask, epsilon)
    with on_device(query.device):
        launches.backward(launches.rows_of(grad.transpose(1, 2)), state, grads)
    return grads


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels multiply for tensors of a dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class FavorLaunches:
    """The launches of a call, and the arguments they share."""

    def __init__(self, query, key, value, projection_matrix, attention_mask, epsilon):
        self.cells, self.heads, self.query_length, dim = query.shape
        self.key_length, width, features = key.shape[2], value.shape[-1], len(projection_matrix)
        self.device, self.dtype, self.epsilon = query.device, compute_dtype(query.dtype), epsilon
        self.query, self.key, self.value = (self.rows_of(x) for x in (query, key, value))
        self.keep = None if attention_mask is None else attention_mask.contiguous().view(torch.uint8)
        self.projection = projection_matrix.to(self.dtype).contiguous()
        # w.x' and |x'|^2 / 2 to base 2 are w.x and |x|^2 times these
        self.unit, self.scale = math.log2(math.e) * dim**-0.25, math.log2(math.e) / 2 * dim**-0.5
        half = self.dtype == torch.bfloat16
        self.sums, self.rows = choose_tiles(capability_of(self.device), half, max(dim, width), features)
        self.group = sum(self.sums.features)
        self.groups = triton.cdiv(features, self.group - 1)
        self.sizes = {
            "FEATURES": features,
            "D": dim,
            "DV": width,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "BLOCK_DV": max(16, triton.next_power_of_2(width)),
            "PRECISION": "tf32x3" if query.is_cuda else "ieee",
        }

    def rows_of(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, length, d]`` in the kernels' dtype; rows are contiguous, and near enough for 32 bits."""
        x = x.to(self.dtype)
        return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()

    def new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def parts(self, length: int, positions: int, groups: int = 1) -> int:
        """Parts of a sequence for programs of their own: enough for the device, none too short."""
        wanted = triton.cdiv(PROGRAMS * processors_of(self.device), self.cells * self.heads * groups)
        return max(1, min(wanted, length // (positions * MIN_BLOCKS)))

    def sum_keys(self) -> tuple[torch.Tensor, ...]:
        """Sums over keys and values, see `_sum`."""
        return self._sum(self.key, self.value, self.key_length, self.keep)

    def _sum(
        self, x, y, length, keep=None, shift=None, weight=None, inverse=None
    ) -> tuple[torch.Tensor, ...]:
        """Sums, columns, maxima and bounds by part of the positions; of queries where there is a shift, or of keys."""
        keys = shift is None
        parts = self.parts(length, self.sums.positions, self.groups)
        rows, features = self.cells * self.heads, self.sizes["FEATURES"]
        sums = self.new(rows, parts, features + 1, self.sizes["DV"])
        columns, maxima = self.new(rows, parts, features + 1), self.new(rows, parts, self.groups)
        bounds = self.new(self.groups)
        # what a kernel does not read is stood in for by what it is sure to get
        keep, shift, weight, inverse = (bounds if x is None else x for x in (keep, shift, weight, inverse))
        sum_kernel[self.groups, parts, rows](
            *(x, x.stride()[:3], y, y.stride()[:3], keep, shift, weight, inverse, self.projection),
            *(sums, columns, maxima, bounds, self.heads, length, parts, self.unit, self.scale),
            TILES=self.sums.features,
            GROUP=self.group,
            BLOCK_N=self.sums.positions,
            STAGES=self.sums.stages,
            KEYS=keys,
            HAS_MASK=keep is not bounds,
            num_warps=self.sums.warps,
            **self.sizes,
        )
        return sums, columns, maxima, bounds

    def table(self, parts: tuple[torch.Tensor, ...], state: list[torch.Tensor], keys: bool) -> None:
        """The context and what belongs to it from sums over keys, or their gradient from sums over queries."""
        _, table, column, totals, column_totals, mean, key_max, *_ = state
        sums, columns, maxima, bounds = parts
        table_kernel[totals.shape[1], self.cells * self.heads](
            *(sums, columns, maxima, bounds, mean, table, column, totals, column_totals, key_max, self.heads),
            *(sums.shape[1], sums.shape[1] * self.groups * self.heads, self.epsilon),
            BLOCK_M=BLOCK_M,
            GROUP=self.group,
            KEYS=keys,
            **{name: self.sizes[name] for name in ("FEATURES", "DV", "BLOCK_DV")},
        )

    def apply_queries(self, state: list[torch.Tensor], output: torch.Tensor | None = None) -> None:
        """The rest of the state, the output less the values' mean first of all, and if it is wanted the output."""
        centred, *table, mean, key_max, shift, inverse = state
        out = (centred if output is None else output).transpose(1, 2)
        self._launch_rows(
            apply_kernel,
            self.query_length,
            *(self.query, self.query.stride()[:3], self.query, self.query.stride()[:3], mean, key_max),
            *(self.projection, *table, mean, out, out.stride()[:3], centred, shift, inverse, mean),
            keys=False,
            CENTRED_ONLY=output is None,
        )

    def backward(
        self, grad: torch.Tensor, state: list[torch.Tensor], grads: tuple[torch.Tensor, ...]
    ) -> None:
        """Gradients of queries, keys and values from that of the output ``[batch, heads, length, dv]``."""
        centred, *table, mean, key_max, shift, inverse = state
        query_grad, key_grad, value_grad = (x.transpose(1, 2) for x in grads)
        weight = torch.empty_like(shift)
        self._launch_rows(
            gradient_kernel,
            self.query_length,
            *(self.query, self.query.stride()[:3], grad, grad.stride()[:3], mean, key_max, shift, inverse),
            *(centred, weight, mean, self.projection, *table, query_grad, query_grad.stride()[:3]),
            keys=False,
        )
        sums = self._sum(self.query, grad, self.query_length, None, shift, weight, inverse)
        table = [torch.empty_like(x) for x in table]
        self.table(sums, [centred, *table, mean, key_max], keys=False)
        row_sum = self.new(self.cells, self.heads, self.key_length)
        keep = mean if self.keep is None else self.keep
        pair = (self.key, self.key.stride()[:3], self.value, self.value.stride()[:3], keep, key_max)
        self._launch_rows(
            apply_kernel,
            self.key_length,
            *(*pair, self.projection, *table, mean, value_grad, value_grad.stride()[:3]),
            *(mean, mean, mean, row_sum),
            keys=True,
            CENTRED_ONLY=False,
        )
        self._launch_rows(
            gradient_kernel,
            self.key_length,
            *(*pair, mean, mean, mean, mean, row_sum, self.projection, *table),
            *(key_grad, key_grad.stride()[:3]),
            keys=True,
        )

    def _launch_rows(self, kernel, length: int, *arguments, keys: bool, **constants) -> None:
        parts = self.parts(length, self.rows.positions)
        kernel[parts, self.cells * self.heads](
            *(*arguments, self.heads, length, parts, self.unit, self.scale, self.epsilon),
            TILES=self.rows.features,
            RESIDENT=self.rows.resident,
            BLOCK_N=self.rows.positions,
            STAGES=self.rows.stages,
            BLOCK_M=BLOCK_M,
            KEYS=keys,
            HAS_MASK=keys and self.keep is not None,
            num_warps=self.rows.warps,
            **self.sizes,
            **constants,
        )
