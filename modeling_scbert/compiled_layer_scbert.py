"""
A FAVOR+ block compiled for this machine's processor: the same function as `run_chunked`, with the steps between the
matrix products fused and every thread working on chunks of its own.

`compiled_blocks` builds the operators of compiled_layer_scbert.cpp (a C++ compiler with OpenMP is needed, and ten
seconds once), compares them with the portable steps, and keeps them only if they agree. Blocks that are not plain
(adapters, hooks, active dropout, biases of queries) stay with the portable steps.
"""

import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

from .backends_scbert import VARIABLE
from .chunked_layer_scbert import run_chunked
from .favor_chunks_scbert import chunk_positions
from .published_layer_scbert import WEIGHTS, what_was_added

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("compiled_layer_scbert.cpp", "compiled_layer_scbert.h", "compiled_passes_scbert.h")
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    # lets maxima and roundings become vector instructions
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
# compilers that do not know a processor by name leave half of its registers aside
WIDE_VECTORS = "-mprefer-vector-width=512"
# of outputs and gradients, relative to their largest entry; the order of float32 sums explains a tenth of it
MAX_ERROR = 1e-4

# what building takes, in seconds, and the share of the portable blocks' time that compiled ones spare
SECONDS_TO_BUILD = 10.0
SECONDS_TO_CHECK = 0.5
SHARE_SPARED = 0.3


@dataclass(frozen=True)
class CompileReport:
    """What came of compiling blocks."""

    # `layer_forward` and `layer_backward`; None where they are not to be used
    operators: object | None = None
    # largest difference from the portable steps, of outputs and gradients; None where nothing was built
    error: float | None = None
    # why they are not in use, where they are not
    reason: str = ""

    def __str__(self) -> str:
        if self.operators is None:
            return f"Compiled blocks are not in use, the portable ones serve. {self.reason}"
        return (
            f"Blocks compiled for this machine are in use, with a relative difference of {self.error:.0e} from the "
            f"portable ones ({VARIABLE}=-compiled forbids them)."
        )


def seconds_to_pay() -> float:
    """Seconds of work that have to be ahead if compiling, or loading what was compiled before, is to pay."""
    return (SECONDS_TO_CHECK if _is_built() else SECONDS_TO_BUILD + SECONDS_TO_CHECK) / SHARE_SPARED


@functools.cache
def _is_built() -> bool:
    try:
        return _library().exists()
    except OSError:
        return False


@functools.cache
def compiled_blocks(layer_class: type[nn.Module], config_class: type) -> CompileReport:
    """
    The operators compiled for this machine: built at the first call, kept on disk, checked once in a process; logged.

    They are kept in the folder ``compiled`` of ``$SCBERT_CACHE``, or else of ``scbert`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``; the compiler is ``$CXX`` or ``c++``. The classes are `ScBertLayer` and `ScBertConfig`, for a block to
    compare on.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> report = compiled_blocks(ScBertLayer, ScBertConfig)
    >>> report.operators is None or report.error < MAX_ERROR
    True
    """
    try:
        operators = _load()
        error = _difference_from_portable(operators, layer_class(config_class(), 0))
        reason = "" if error <= MAX_ERROR else f"Their relative error is {error:.0e} on this machine."
        report = CompileReport(None if reason else operators, error, reason)
    except (OSError, RuntimeError, subprocess.SubprocessError) as failure:
        report = CompileReport(reason=_explanation(failure))
    logger.info("%s", report)
    return report


def _explanation(error: Exception, limit: int = 600) -> str:
    """What failed and what mends it, in few lines."""
    remedy = "A C++ compiler with OpenMP is needed: install g++, or name one in CXX."
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found. {remedy}"
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} ended with code {error.returncode}. {remedy} {error.stderr.strip()[:limit]}".strip()
    return str(error).strip()[:limit]


def _load():
    """The operators, built before or now."""
    library = _library()
    operators = getattr(torch.ops, library.stem)
    if hasattr(operators, "layer_backward"):
        return operators
    if library.exists():
        try:
            torch.ops.load_library(library)
            return operators
        except OSError:
            # cut short by a full disk, or of a torch that is gone
            library.unlink()
    _build(library)
    torch.ops.load_library(library)
    return operators


def _library() -> Path:
    """Where the operators are, or are to be; each version of the sources has a namespace of its own."""
    return _cache_folder() / f"scbert_compiled_{_fingerprint()}.so"


def _cache_folder() -> Path:
    """Where built operators are kept; nobody else may write there, for they are loaded as code."""
    folder = os.environ.get("SCBERT_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scbert"
    folder = Path(folder) / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise OSError(
            f"{folder} belongs to or can be written by others. Set SCBERT_CACHE to a folder of your own."
        )
    return folder


def _fingerprint() -> str:
    """Changes with the sources, torch, the compiler and the processor."""
    parts = [(FOLDER / name).read_bytes() for name in SOURCES]
    parts += [text.encode() for text in (torch.__version__, *_compiler(), *FLAGS, _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _processor() -> str:
    """Name and abilities: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _build(library: Path) -> None:
    """Compile to a temporary name and move it into place: a killed build leaves nothing that would be loaded."""
    root = Path(torch.__file__).parent
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    defined = {
        "TORCH_EXTENSION_NAME": library.stem,
        "_GLIBCXX_USE_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
    }
    flags = [*FLAGS, *(f"-D{key}={value}" for key, value in defined.items())]
    flags += [WIDE_VECTORS] if "avx512" in _processor() else []
    logger.info("Compiling %s, once for this machine ...", SOURCES[0])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*_compiler(), *flags, *include, str(FOLDER / SOURCES[0]), "-o", str(built), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, library)


def _difference_from_portable(operators, layer: nn.Module) -> float:
    """Largest relative difference of a small block's output and gradients, some positions masked."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        layer = layer.float()
        hidden_states = torch.randn(2, 150, layer.attention.config.hidden_size, dtype=torch.float32)
        hidden_states.requires_grad_()
        mask = torch.rand(2, 150) < 0.7
        inputs = [hidden_states, *(attrgetter(name)(layer) for name in WEIGHTS)]
        compiled = partial(_by_operators, operators)
        outputs = [function(layer, hidden_states, mask) for function in (compiled, run_chunked)]
        grad = torch.randn(outputs[0].shape, dtype=torch.float32)
        pairs = zip(*((x.detach(), *torch.autograd.grad(x, inputs, grad)) for x in outputs), strict=True)
        return max(((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs)


def compiled_supports(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Why the compiled operators cannot run a FAVOR+ block, if they cannot."""
    reason = _what_is_not_plain(layer, hidden_states)
    if reason is None:
        report = _report(layer)
        reason = None if report.operators else report.reason
    return reason


def _report(layer: nn.Module) -> CompileReport:
    return compiled_blocks(type(layer), type(layer.attention.config))


def _what_is_not_plain(layer: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """Of a block and its input: a CPU, float32, and the published layer without anything added are served."""
    if not _is_plain_tensor(hidden_states):
        return "the hidden states are not float32 on a CPU"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is to another dtype than bfloat16"
    reason = what_was_added(layer)
    if reason is not None:
        return reason
    if not all(_is_plain_tensor(attrgetter(name)(layer)) for name in WEIGHTS):
        return "its weights are not float32 on a CPU"
    return None


def _is_plain_tensor(x: torch.Tensor | None) -> bool:
    """Float32 values in this process's memory."""
    plain = type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and x.device.type == "cpu" and x.dtype == torch.float32


def run_compiled(layer, hidden_states, attention_mask=None, queries=None) -> torch.Tensor:
    """
    A block's output by the compiled operators, see `run_block` of blocks_scbert.py; differentiable in its input and
    weights.

    For the backward it keeps the input, the table of the keys and the residual stream between the branches.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> layer, hidden_states = ScBertLayer(ScBertConfig(hidden_size=32), 0), torch.randn(1, 50, 32)
    >>> if compiled_supports(layer, hidden_states) is None:
    ...     assert run_compiled(layer, hidden_states).shape == hidden_states.shape
    """
    return _by_operators(_report(layer).operators, layer, hidden_states, attention_mask, queries)


def _by_operators(operators, layer, hidden_states, attention_mask=None, queries=None):
    weights = [attrgetter(name)(layer) for name in WEIGHTS]
    keep = None if attention_mask is None else attention_mask.bool()
    # asked here: inside of an autograd function it is off
    settings = (torch.is_grad_enabled(), *_settings(layer))
    queries = None if queries is hidden_states else queries
    return _CompiledLayer.apply(operators, settings, keep, hidden_states, queries, *weights)


def _settings(layer) -> tuple:
    config, projection = layer.attention.config, layer.attention.projection_matrix
    chunk_size = chunk_positions(config.num_attention_heads, len(projection), projection.device)
    if not os.environ.get("SCBERT_CHUNK_SIZE"):
        # every thread has a chunk of its own in the cache that they share, with buffers of half the features' size
        chunk_size = max(64, chunk_size * 2 // 3 // torch.get_num_threads() // 64 * 64)
    in_bfloat16 = torch.is_autocast_enabled("cpu")
    numbers = (config.num_attention_heads, config.kernel_epsilon, layer.attention_norm.eps, chunk_size)
    return projection, *numbers, in_bfloat16


class _CompiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, settings, keep, hidden_states, queries, *weights):
        output, *saved = operators.layer_forward(queries, hidden_states, keep, weights, *settings)
        ctx.operators, ctx.settings, ctx.n_saved = operators, settings[2:], len(saved)
        ctx.save_for_backward(hidden_states, queries, keep, settings[1], *saved, *weights)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, queries, keep, projection, *rest = ctx.saved_tensors
        saved, weights = rest[: ctx.n_saved], rest[ctx.n_saved :]
        wanted = ctx.needs_input_grad[5:]
        state = (queries, hidden_states, keep, weights, saved, any(wanted), projection)
        query_grad, hidden_grad, *found = ctx.operators.layer_backward(grad, *state, *ctx.settings)
        shares = [share if want else None for share, want in zip(found or wanted, wanted, strict=True)]
        return None, None, None, hidden_grad, None if queries is None else query_grad, *shares
