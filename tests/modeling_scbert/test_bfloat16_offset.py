"""Values that share an offset, under bfloat16 autocast: every backend's gradients stay near those of the reference."""

import pytest
import torch

from scbert import ScBertConfig
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.layers_scbert import ScBertLayer

LENGTH = 600


@pytest.fixture
def layer():
    """The published block with a bias of the first norm that adds 4 to the values, and nothing to queries and keys."""
    torch.manual_seed(0)
    layer = ScBertLayer(ScBertConfig(num_attention_heads=2), 0)
    attention, bias = layer.attention, layer.attention_norm.bias
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.normal_(std=200**-0.5)
        bias.copy_(torch.linalg.lstsq(attention.v_proj.weight, torch.full((128, 1), 4.0)).solution.flatten())
        for projection in (attention.q_proj, attention.k_proj):
            along = projection.weight @ bias / bias.square().sum()
            projection.weight -= along[:, None] * bias
    return layer


def gradients(layer, name):
    generator = torch.Generator().manual_seed(1)
    hidden_states, grad = (torch.randn(1, LENGTH, 200, generator=generator) for _ in range(2))
    inputs = {"input": hidden_states.requires_grad_(), **dict(layer.named_parameters())}
    with favor_backend(name):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(hidden_states)
        return dict(zip(inputs, torch.autograd.grad(output, inputs.values(), grad)))


@pytest.mark.parametrize("name", ["plain", "chunked", "compiled"])
def test_gradients_are_those_of_attention_in_float32(name, layer, request):
    if name == "compiled":
        request.getfixturevalue("compiled")
    # the same projections in bfloat16, and between them the reference, in float32
    wanted, found = gradients(layer, "naive"), gradients(layer, name)
    for weight, gradient in wanted.items():
        error = (found[weight] - gradient).norm() / gradient.norm()
        assert error < 0.02, f"{weight}: {error:.1e}"
