"""
FAVOR+ attention, the operation: one function, and the backends that compute it.

- ``naive``: the formulas of favor_scbert.py, features of the whole sequence in memory; the reference of the others;
- ``chunked``: chunks of positions that stay in cache, on every device, a pass over keys and one over queries;
- ``triton``: the same two passes as kernels for CUDA, from the installed package.

The last two are one custom operator, and its backward another: autocast, checkpointing, ``torch.compile`` and
``torch.export`` see a single operation. What a backend's forward keeps for its backward is its own affair, a list of
tensors. Stabilisers are constants to the gradient, as in the reference: in exact arithmetic they cancel, but for
epsilon.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .backends_scbert import Backend, from_package, is_wanted, log_once, select
from .favor_chunked_scbert import chunked_backward, chunked_forward, chunked_state
from .favor_scbert import favor_attention_naive

# the checkpoint's own copy of this file, loaded as remote code, must not take over the installed one's operators
_NAMESPACE = "scbert" if __name__.startswith("scbert.") else __name__.replace(".", "_").replace("-", "_")


def favor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> torch.Tensor:
    """
    FAVOR+ attention by the fastest backend that serves; differentiable in query, key and value.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, length, d]`` of one dtype; queries may have another length than keys, values another width.
        Half precisions are accumulated in float32, float64 is computed in float64.
    projection_matrix
        Random features ``[m, d]``; no gradient flows to it.
    attention_mask
        ``[batch, key length]``, true (nonzero) where a key may be attended to. Masked keys contribute nothing to
        values, normaliser, stabiliser or epsilon terms; a cell without any key gets zeros.
    epsilon
        The kernel's additive constant.

    Returns
    -------
    ``[batch, heads, query length, value width]`` in the dtype of ``value``; of the fast backends with the memory layout
    ``[batch, length, heads, width]``, so that joining the heads afterwards copies nothing.

    Examples
    --------
    >>> q = k = v = torch.randn(2, 4, 100, 16)
    >>> favor_attention(q, k, v, torch.randn(44, 16)).shape
    torch.Size([2, 4, 100, 16])
    """
    return _selected(query, key, value, projection_matrix, attention_mask, epsilon)


# what chooses is no part of a traced graph: the choice is made while tracing, and stays
@torch.compiler.allow_in_graph
def _selected(query, key, value, projection_matrix, attention_mask, epsilon):
    name = select(FAVOR, query, value, projection_matrix)
    return FAVOR[name].run(query, key, value, projection_matrix, attention_mask, epsilon)


def _by_operator(name, query, key, value, projection_matrix, attention_mask, epsilon):
    keep = None if attention_mask is None else attention_mask.bool()
    output, *_ = _favor_forward(query, key, value, projection_matrix, keep, epsilon, name)
    return output.transpose(1, 2)


# ---- Triton, as long as it compiles and launches --------------------------------------------------------------------

# dtypes, devices and head sizes for which a kernel did not compile or launch: chunks serve them from then on
_disabled: set[tuple] = set()


def _triton():
    return from_package("favor_triton_scbert")


def _triton_supports(query, value, projection_matrix) -> str | None:
    if _triton() is None:
        reason = "the packages scbert and triton, which it needs, are not both installed"
    else:
        reason = _triton().triton_supports(query, value, projection_matrix)
    if reason and query.is_cuda:
        log_once(logging.WARNING, f"FAVOR+ runs without the Triton kernels, several times slower: {reason}.")
    return reason


def _unless_disabled(function: Callable, tensors: list[torch.Tensor]):
    """Result of a function that launches kernels, or None once it has failed to for such tensors."""
    # not their lengths: what does not compile or fit does so for none, and cells differ in length
    key = tuple((x.dtype, x.device, x.shape[-1]) for x in tensors)
    if key in _disabled:
        return None
    try:
        return function()
    except _triton().FATAL_ERRORS:
        raise
    except _triton().LAUNCH_ERRORS as error:
        _disabled.add(key)
        message = (
            f"A Triton kernel does not run here ({error}): FAVOR+ goes on in chunks, several times slower."
        )
        log_once(logging.WARNING, message)


def _triton_forward(query, key, value, projection_matrix, attention_mask, epsilon):
    given = (query, key, value, projection_matrix, attention_mask)
    found = _unless_disabled(lambda: _triton().triton_forward(*given, epsilon), [query, key, value])
    if found is None:
        # a traced graph counts on the state: it gets one, and the backward does not read it
        return chunked_forward(*given, epsilon)[0], *_triton().triton_state(query, value, projection_matrix)
    return found


def _triton_backward(grad, query, key, value, projection_matrix, attention_mask, output, state, epsilon):
    given = (query, key, value, projection_matrix, attention_mask)
    found = _unless_disabled(
        lambda: _triton().triton_backward(grad, *given, output, *state, epsilon), [query, key, value]
    )
    if found is None:
        output, *state = chunked_forward(*given, epsilon)
        return chunked_backward(grad, *given, output, state, epsilon)
    return found


# ---- the operator ---------------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """Forward to ``output, *state``; backward from ``output, state``; ``state(...)`` like that, uninitialised."""

    forward: Callable
    backward: Callable
    state: Callable


_OPERATORS = {
    "triton": _Steps(_triton_forward, _triton_backward, lambda *given: _triton().triton_state(*given)),
    "chunked": _Steps(chunked_forward, chunked_backward, chunked_state),
}


# written out: torch 2.6 reads no list[torch.Tensor]
_GIVEN = "Tensor query, Tensor key, Tensor value, Tensor projection_matrix, Tensor? attention_mask"
_FORWARD = f"({_GIVEN}, float epsilon, str backend) -> Tensor[]"
_BACKWARD = f"(Tensor grad, {_GIVEN}, Tensor output, Tensor[] state, float epsilon, str backend) -> Tensor[]"


@torch.library.custom_op(f"{_NAMESPACE}::favor_attention", mutates_args=(), schema=_FORWARD)
def _favor_forward(query, key, value, projection_matrix, attention_mask, epsilon, backend):
    """Output [B, Lq, H, dv], and what the backend keeps for its backward."""
    steps = _OPERATORS[backend]
    return list(steps.forward(query, key, value, projection_matrix, attention_mask, epsilon))


@_favor_forward.register_fake
def _(query, key, value, projection_matrix, attention_mask, epsilon, backend):
    output = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    return [output, *_OPERATORS[backend].state(query, value, projection_matrix)]


@torch.library.custom_op(f"{_NAMESPACE}::favor_attention_backward", mutates_args=(), schema=_BACKWARD)
def _favor_backward(
    grad, query, key, value, projection_matrix, attention_mask, output, state, epsilon, backend
):
    """Gradients of query, key and value, each stored as [B, L, H, d]."""
    given = (query, key, value, projection_matrix, attention_mask)
    return list(_OPERATORS[backend].backward(grad, *given, output, state, epsilon))


@_favor_backward.register_fake
def _(grad, query, key, value, *args):
    return [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]


def _setup_context(ctx, inputs, output):
    *tensors, epsilon, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.epsilon, ctx.backend = epsilon, backend
    # nobody uses the state, so nobody has a gradient for it
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grads):
    if grads[0] is None:
        return (None,) * 7
    query, key, value, projection_matrix, attention_mask, output, *state = ctx.saved_tensors
    given = (query, key, value, projection_matrix, attention_mask)
    found = _favor_backward(grads[0], *given, output, state, ctx.epsilon, ctx.backend)
    return *(x.transpose(1, 2) for x in found), None, None, None, None


_favor_forward.register_autograd(_autograd_backward, setup_context=_setup_context)

FAVOR = {
    "triton": Backend(_triton_supports, partial(_by_operator, "triton")),
    "chunked": Backend(lambda *_: None, partial(_by_operator, "chunked")),
    "naive": Backend(lambda *_: None, favor_attention_naive),
}


def other_attention_asked(name: str) -> str | None:
    """Why a block that computes attention by ``name`` does not serve: another way to do it was asked for."""
    asked = [other for other in FAVOR if is_wanted(other)]
    return f"attention by {' or '.join(asked)} is asked for" if asked and name not in asked else None
