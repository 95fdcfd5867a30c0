"""
A FAVOR+ block compiled for this machine's processor, on request: the same function as `layer_in_chunks` and
`train_in_chunks`, with the steps between the matrix products fused and every thread working on chunks of its own.

`use_compiled_layers` builds the operators of compiled_layer_scbert.cpp (it takes a C++ compiler with OpenMP, and ten
seconds once), compares them with the portable steps, and keeps them only if they agree. Blocks that are not plain
(adapters, hooks, dropout, biases of queries) stay with the portable steps.
"""

import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
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
NAMESPACE = "scbert_compiled"
WEIGHTS = (
    *("attention_norm.weight", "attention_norm.bias"),
    *("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight"),
    *("attention.o_proj.weight", "attention.o_proj.bias"),
    *("ffn_norm.weight", "ffn_norm.bias"),
    *("intermediate.weight", "intermediate.bias", "output.weight", "output.bias"),
)

_enabled = False


@dataclass
class CompileReport:
    """
    What came of asking for compiled blocks.

    Attributes
    ----------
    enabled
        Plain FAVOR+ blocks in float32, or under bfloat16 autocast, are now run by the compiled operators.
    reason
        Why not, where not.
    """

    enabled: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.enabled:
            return "compiled blocks: in use."
        return f"compiled blocks: not in use, the portable ones serve. {self.reason}"


def use_compiled_layers() -> CompileReport:
    """
    Run FAVOR+ blocks on the CPU by operators compiled for this machine; built at the first call, then kept on disk.

    Together with `use_onednn` this is the fastest way to annotate and to train on a CPU. The folder of built operators
    is ``$SCBERT_CACHE``, or ``scbert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

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
    global _enabled
    try:
        _load()
        _enabled = True
        report = CompileReport(True)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _enabled = False
        report = CompileReport(False, _first_lines(error))
    logger.info("%s", report)
    return report


def restore_layers() -> None:
    """Undo `use_compiled_layers`."""
    global _enabled
    _enabled = False


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return text.strip()[:limit]


def _load() -> None:
    """Load the operators, built before or now."""
    if hasattr(getattr(torch.ops, NAMESPACE), "layer_backward"):
        return
    library = _cache_folder() / f"layers_{_fingerprint()}.so"
    if not library.exists():
        _build(library)
    torch.ops.load_library(library)


def _cache_folder() -> Path:
    """Where built operators are kept; nobody else may write there, for they are loaded as code."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("SCBERT_CACHE") or base / "scbert")
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
    parts += [text.encode() for text in (torch.__version__, _compiler(), *FLAGS, _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


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
    flags = [*FLAGS, f"-DTORCH_EXTENSION_NAME={NAMESPACE}"]
    flags += [WIDE_VECTORS] if "avx512" in _processor() else []
    logger.info("Compiling %s, once for this machine ...", SOURCES[0])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [_compiler(), *flags, *include, str(FOLDER / SOURCES[0]), "-o", str(built), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, library)


def compiled_serves(layer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether the compiled operators may run a FAVOR+ block: asked for, on a CPU, in float32, nothing added to it."""
    if not _enabled or hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    if type(layer.activation) is not GELUActivation or layer.attention.q_proj.bias is not None:
        return False
    return all(_is_plain(layer.get_submodule(name.rpartition(".")[0])) for name in WEIGHTS)


def _is_plain(module: nn.Module) -> bool:
    """No adapter in its place, no hook that expects to be called, weights in float32."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return (
        type(module) in (nn.Linear, nn.LayerNorm) and not any(hooks) and module.weight.dtype == torch.float32
    )


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
    weights = [layer.get_parameter(name) for name in WEIGHTS]
    keep = None if attention_mask is None else attention_mask.bool()
    # asked here: inside of an autograd function it is off
    settings = (torch.is_grad_enabled(), *_settings(layer, chunk_size))
    return _CompiledLayer.apply(settings, keep, hidden_states, queries, *weights)


def _settings(layer, chunk_size) -> tuple:
    config, projection = layer.attention.config, layer.attention.projection_matrix
    positions = chunk_positions(config.num_attention_heads, len(projection), projection.device)
    # every thread has a chunk of its own in the cache that they share
    chunk_size = chunk_size or max(64, positions // torch.get_num_threads() // 64 * 64)
    norm_eps = layer.attention_norm.eps
    half = torch.is_autocast_enabled("cpu")
    return projection, config.num_attention_heads, config.kernel_epsilon, norm_eps, chunk_size, half


class _CompiledLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, keep, hidden_states, queries, *weights):
        operator = getattr(torch.ops, NAMESPACE).layer_forward
        output, *saved = operator(queries, hidden_states, keep, weights, *settings)
        ctx.save_for_backward(hidden_states, queries, keep, *saved, *weights)
        ctx.settings, ctx.n_saved = settings[1:], len(saved)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden_states, queries, keep, *rest = ctx.saved_tensors
        saved, weights = rest[: ctx.n_saved], rest[ctx.n_saved :]
        wanted = ctx.needs_input_grad[4:]
        operator = getattr(torch.ops, NAMESPACE).layer_backward
        state = (queries, hidden_states, keep, weights, saved, any(wanted))
        query_grad, hidden_grad, *found = operator(grad, *state, *ctx.settings)
        shares = [share if want else None for share, want in zip(found or wanted, wanted, strict=True)]
        return None, None, hidden_grad, None if queries is None else query_grad, *shares
