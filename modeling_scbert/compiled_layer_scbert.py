"""
A FAVOR+ block compiled for this machine's processor, on request: the same function as `layer_in_chunks` and
`train_in_chunks`, with the steps between the matrix products fused and every thread working on chunks of its own.

`use_compiled_layers` builds the operators of compiled_layer_scbert.cpp (it takes a C++ compiler with OpenMP, and ten
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
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

from .favor_chunks_scbert import chunk_positions

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
WEIGHTS = (
    *("attention_norm.weight", "attention_norm.bias"),
    *("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    *("attention.o_proj.weight", "attention.o_proj.bias"),
    *("ffn_norm.weight", "ffn_norm.bias"),
    *("intermediate.weight", "intermediate.bias", "output.weight", "output.bias"),
)

_operators = None
_enabled = False


@dataclass
class CompileReport:
    """
    What came of asking for compiled blocks.

    Attributes
    ----------
    enabled
        Plain FAVOR+ blocks in float32, or under bfloat16 autocast, are now run by the compiled operators.
    error
        Largest difference from the portable steps, of outputs and gradients; None where nothing was built.
    reason
        Why they are not in use, where they are not.
    """

    enabled: bool
    error: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.enabled:
            return f"compiled blocks: in use, with a relative difference of {self.error:.0e} from the portable ones."
        return f"compiled blocks: not in use, the portable ones serve. {self.reason}"


def use_compiled_layers() -> CompileReport:
    """
    Run FAVOR+ blocks on the CPU by operators compiled for this machine; built at the first call, then kept on disk.

    Together with `use_onednn` this is the fastest way to annotate and to train on a CPU. What was built is kept in the
    folder ``compiled`` of ``$SCBERT_CACHE``, or else of ``scbert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; the compiler
    is ``$CXX`` or ``c++``.

    Returns
    -------
    CompileReport
        Also logged. `restore_layers` undoes it.

    Examples
    --------
    >>> report = use_compiled_layers()
    >>> report.enabled in (True, False)
    True
    >>> restore_layers()
    """
    global _enabled, _operators
    restore_layers()
    try:
        _operators = _load()
        error = _difference_from_portable(_operators)
        _enabled = error <= MAX_ERROR
        reason = "" if _enabled else f"Their relative error is {error:.0e} on this machine."
        report = CompileReport(_enabled, error, reason)
    except (OSError, RuntimeError, subprocess.SubprocessError) as failure:
        report = CompileReport(False, reason=_explanation(failure))
    logger.info("%s", report)
    return report


def restore_layers() -> None:
    """Undo `use_compiled_layers`."""
    global _enabled
    _enabled = False


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
    # one namespace for every version of the sources: another copy of this package may be loaded as well
    name = f"scbert_compiled_{_fingerprint()}"
    operators = getattr(torch.ops, name)
    if hasattr(operators, "layer_backward"):
        return operators
    library = _cache_folder() / f"{name}.so"
    if library.exists():
        try:
            torch.ops.load_library(library)
            return operators
        except OSError:
            # cut short by a full disk, or of a torch that is gone
            library.unlink()
    _build(library, name)
    torch.ops.load_library(library)
    return operators


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


def _build(library: Path, name: str) -> None:
    """Compile to a temporary name and move it into place: a killed build leaves nothing that would be loaded."""
    root = Path(torch.__file__).parent
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    defined = {"TORCH_EXTENSION_NAME": name, "_GLIBCXX_USE_CXX11_ABI": int(torch.compiled_with_cxx11_abi())}
    flags = [*FLAGS, *(f"-D{key}={value}" for key, value in defined.items())]
    flags += [WIDE_VECTORS] if "avx512" in _processor() else []
    logger.info("Compiling %s, once for this machine ...", SOURCES[0])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*_compiler(), *flags, *include, str(FOLDER / SOURCES[0]), "-o", str(built), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, library)


@functools.cache
def _difference_from_portable(operators) -> float:
    """Largest relative difference of a small block's output and gradients, some positions masked; once for each."""
    # imported here: blocks are made of these functions
    from .chunked_training_scbert import train_in_chunks
    from .configuration_scbert import ScBertConfig
    from .layers_scbert import ScBertLayer

    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        layer = ScBertLayer(ScBertConfig(), 0).float()
        layer.attention.projection_matrix.copy_(layer.attention.initial_projection())
        hidden_states = torch.randn(2, 150, layer.attention.config.hidden_size, dtype=torch.float32)
        hidden_states.requires_grad_()
        mask = torch.rand(2, 150) < 0.7
        inputs = [hidden_states, *(attrgetter(name)(layer) for name in WEIGHTS)]
        outputs = [function(layer, hidden_states, mask, 64) for function in (compiled_layer, train_in_chunks)]
        grad = torch.randn(outputs[0].shape, dtype=torch.float32)
        pairs = zip(*((x.detach(), *torch.autograd.grad(x, inputs, grad)) for x in outputs), strict=True)
        return max(((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs)


def compiled_serves(layer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether the compiled operators may run a FAVOR+ block: asked for, on a CPU, in float32, nothing added to it."""
    if not _enabled or not _is_plain_tensor(hidden_states) or _has_any_global_hook():
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    if layer.training and (layer.dropout.p > 0 or layer.attention.dropout.p > 0):
        return False
    # without epsilon, a feature that underflows is a zero normaliser
    same_norms = layer.attention_norm.eps == layer.ffn_norm.eps and layer.attention.config.kernel_epsilon > 0
    if not same_norms or type(layer.activation) is not GELUActivation or _is_changed(layer.activation):
        return False
    if layer.attention.q_proj.bias is not None:
        return False
    modules = [attrgetter(name.rpartition(".")[0])(layer) for name in WEIGHTS]
    if any(type(module) not in (nn.Linear, nn.LayerNorm) or _is_changed(module) for module in modules):
        return False
    return all(_is_plain_tensor(attrgetter(name)(layer)) for name in WEIGHTS)


def _is_plain_tensor(x: torch.Tensor | None) -> bool:
    """Float32 values in this process's memory."""
    plain = type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided
    return plain and x.device.type == "cpu" and x.dtype == torch.float32


def _is_changed(module: nn.Module) -> bool:
    """Whether a hook expects to be called, or another forward has been put in its place."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


def compiled_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    chunk_size: int | None = None,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Output of a FAVOR+ `ScBertLayer` by the compiled operators, differentiable in input and weights.

    For the backward it keeps the input, the table of the keys and the residual stream between the branches.

    Parameters
    ----------
    layer
        A block that `compiled_serves` accepts.
    hidden_states
        ``[batch, length, hidden]``, float32.
    attention_mask
        ``[batch, length]``, true where a position may be attended to.
    chunk_size
        Positions per chunk and thread; by default chosen from the cache size.
    queries
        ``[batch, n, hidden]``: rows of ``hidden_states`` at which alone the output is wanted; by default all.

    Returns
    -------
    ``[batch, length, hidden]``, or ``[batch, n, hidden]``.

    Examples
    --------
    >>> from scbert import ScBertConfig
    >>> from scbert.modeling_scbert.layers_scbert import ScBertLayer
    >>> layer, hidden_states = ScBertLayer(ScBertConfig(hidden_size=32), 0), torch.randn(1, 50, 32)
    >>> _ = layer.attention.projection_matrix.copy_(layer.attention.initial_projection())
    >>> if use_compiled_layers().enabled:
    ...     assert compiled_layer(layer, hidden_states).shape == hidden_states.shape
    >>> restore_layers()
    """
    weights = [attrgetter(name)(layer) for name in WEIGHTS]
    keep = None if attention_mask is None else attention_mask.bool()
    # asked here: inside of an autograd function it is off
    settings = (torch.is_grad_enabled(), *_settings(layer, chunk_size))
    queries = None if queries is hidden_states else queries
    return _CompiledLayer.apply(settings, keep, hidden_states, queries, *weights)


def _settings(layer, chunk_size) -> tuple:
    config, projection = layer.attention.config, layer.attention.projection_matrix
    if chunk_size is None:
        chunk_size = chunk_positions(config.num_attention_heads, len(projection), projection.device)
        if not os.environ.get("SCBERT_CHUNK_SIZE"):
            # every thread has a chunk of its own in the cache that they share, with buffers of half the features' size
            chunk_size = max(64, chunk_size * 2 // 3 // torch.get_num_threads() // 64 * 64)
    in_bfloat16 = torch.is_autocast_enabled("cpu")
    numbers = (config.num_attention_heads, config.kernel_epsilon, layer.attention_norm.eps, chunk_size)
    return projection, *numbers, in_bfloat16


class _CompiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, keep, hidden_states, queries, *weights):
        output, *saved = _operators.layer_forward(queries, hidden_states, keep, weights, *settings)
        ctx.settings, ctx.n_saved, (_, projection, *_) = settings[2:], len(saved), settings
        ctx.save_for_backward(hidden_states, queries, keep, projection, *saved, *weights)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, queries, keep, projection, *rest = ctx.saved_tensors
        saved, weights = rest[: ctx.n_saved], rest[ctx.n_saved :]
        wanted = ctx.needs_input_grad[4:]
        state = (queries, hidden_states, keep, weights, saved, any(wanted), projection)
        query_grad, hidden_grad, *found = _operators.layer_backward(grad, *state, *ctx.settings)
        shares = [share if want else None for share, want in zip(found or wanted, wanted, strict=True)]
        return None, None, hidden_grad, None if queries is None else query_grad, *shares
