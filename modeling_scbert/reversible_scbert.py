"""The reversible encoder (Gomez et al. 2017; Reformer): activations are recomputed from the output, not stored.

Two residual streams start as the embeddings; a layer computes ``y1 = x1 + attention(x2)`` and
``y2 = x2 + feed_forward(y1)``, which can be undone: ``x2 = y2 - feed_forward(y1)``, ``x1 = y1 - attention(x2)``. So the
backward pass needs the last pair only, whatever the depth, for one more forward pass of time.

The encoder ends in the mean of the streams, where Reformer concatenates them: the width stays ``hidden_size``, and the
final norm and every head are those of the other encoders. ``transformers``' reversible function is bound to its own
layers' protocol (buckets, seeds and gradients accumulated into ``.grad`` behind autograd's back), so it is not reused.
"""

from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable


class _Replay:
    """Random state and autocast settings of the forward pass, to be had again in the backward pass."""

    def __init__(self, device: torch.device):
        self.device = device
        enabled = torch.is_autocast_enabled(device.type)
        # no weight cache: casts made without gradient would be handed to a later pass that needs one
        self.autocast = {
            "device_type": device.type,
            "dtype": torch.get_autocast_dtype(device.type),
            "enabled": enabled,
            "cache_enabled": False,
        }
        self.states = []

    def record(self):
        """Remember the random state in front of the next branch."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self.states.append((torch.get_rng_state(), cuda))

    @contextmanager
    def replay(self, branch: int):
        """Run a branch once more under its own random state, with gradients."""
        cpu, cuda = self.states[branch]
        devices = [] if cuda is None else [self.device]
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(**self.autocast):
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            yield


def _branch_gradients(branch, stream, grad, parameters, replayed):
    """Value of a branch at a stream, and the gradients of the stream and of the parameters (None where unused)."""
    stream = stream.detach().requires_grad_()
    with replayed:
        value = branch(stream)
    grad_stream, *grads = torch.autograd.grad(value, (stream, *parameters), grad, allow_unused=True)
    return value.detach(), grad_stream, grads


class _ReversibleFunction(torch.autograd.Function):
    """All layers at once. ``branches`` holds, per layer, (attention, feed-forward, their trainable parameters).

    The parameters are passed as well, so that autograd itself gets their gradients: ``torch.autograd.grad`` and
    distributed hooks work as for any other module.
    """

    @staticmethod
    def forward(ctx, hidden_states, branches, *parameters):
        ctx.branches, ctx.replay = branches, _Replay(hidden_states.device)
        first = second = hidden_states
        with torch.autocast(**ctx.replay.autocast):
            for attend, feed_forward, _ in branches:
                ctx.replay.record()
                first = first + attend(second)
                ctx.replay.record()
                second = second + feed_forward(first)
        ctx.save_for_backward(first, second)
        return (first + second) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        first, second = ctx.saved_tensors
        grad_first = grad_second = grad / 2
        gradients = []
        trainable = [len(parameters) > 0 for _, _, parameters in ctx.branches]
        lowest = 0 if ctx.needs_input_grad[0] else trainable.index(True)
        for index in range(len(ctx.branches) - 1, lowest - 1, -1):
            attend, feed_forward, parameters = ctx.branches[index]
            value, grad_branch, ffn_grads = _branch_gradients(
                feed_forward, first, grad_second, parameters, ctx.replay.replay(2 * index + 1)
            )
            second, grad_first = second - value, grad_first + grad_branch
            value, grad_branch, attention_grads = _branch_gradients(
                attend, second, grad_first, parameters, ctx.replay.replay(2 * index)
            )
            first, grad_second = first - value, grad_second + grad_branch
            gradients.append([a if b is None else b for a, b in zip(attention_grads, ffn_grads)])
        in_order = [gradient for layer in reversed(gradients) for gradient in layer]
        return (grad_first + grad_second, None, *in_order)


def reversible_encode(layers, hidden_states, attention_mask=None):
    """
    Run reversible layers so that their backward pass recomputes what it needs.

    Layers have ``attend(hidden_states, attention_mask)`` and ``feed_forward(hidden_states)``, the two residual branches
    (norms included), which share no parameter. The mean of both streams comes back, [batch, length, hidden] in the
    input's dtype.

    The streams are float32 whatever the model's dtype: each layer is undone by a subtraction, and half precision
    would lose the input after a few. Memory for backward does not grow with the number of layers, save for 10 kB of
    random state each.
    """
    dtype = hidden_states.dtype

    def branches_of(layer):
        return (
            lambda stream: layer.attend(stream.to(dtype), attention_mask).float(),
            lambda stream: layer.feed_forward(stream.to(dtype)).float(),
            [parameter for parameter in layer.parameters() if parameter.requires_grad],
        )

    branches = [branches_of(layer) for layer in layers]
    parameters = [parameter for *_, owned in branches for parameter in owned]
    return _ReversibleFunction.apply(hidden_states.float(), branches, *parameters).to(dtype)
