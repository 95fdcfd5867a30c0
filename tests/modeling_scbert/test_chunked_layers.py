"""Whole blocks in chunks, for inference and for training, against the plain block."""

import pytest
import torch

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertModel
from scbert.modeling_scbert.backends_scbert import favor_backend
from scbert.modeling_scbert.blocks_scbert import KEPT_BYTES, choose_block, run_plain
from scbert.modeling_scbert.chunked_layer_scbert import run_chunked
from scbert.modeling_scbert.positions_scbert import rows_at

SHAPES = [(1, 130, 32), (3, 70, 64), (5, 9, 64)]


def small_config(**options):
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "head_dim": 6, "num_random_features": 17}
    return ScBertConfig(
        **sizes, intermediate_size=20, num_hidden_layers=2, max_position_embeddings=130, **options
    )


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return ScBertModel(small_config(qkv_bias=True)).layers[0].double().train()


def batch(cells, length, masked, dtype=torch.float64):
    generator = torch.Generator().manual_seed(cells)
    hidden = torch.randn(cells, length, 12, generator=generator, dtype=dtype)
    lengths = torch.randint(1, length + 1, (cells, 1), generator=generator)
    return hidden, (torch.arange(length) < lengths).long() if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cells, length, chunk_size", SHAPES)
def test_inference_is_the_plain_block(layer, cells, length, chunk_size, masked, monkeypatch):
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", str(chunk_size))
    hidden, mask = batch(cells, length, masked)
    with torch.no_grad():
        found = run_chunked(layer, hidden, mask)
    torch.testing.assert_close(found, run_plain(layer, hidden, mask).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cells, length, chunk_size", SHAPES)
def test_training_has_the_plain_block_s_gradients(layer, cells, length, chunk_size, masked, monkeypatch):
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", str(chunk_size))
    hidden, mask = batch(cells, length, masked)
    hidden.requires_grad_()
    layer.ffn_norm.requires_grad_(False)
    inputs = [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]
    grad = torch.randn(hidden.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(run_plain(layer, hidden, mask), inputs, grad)
    found = torch.autograd.grad(run_chunked(layer, hidden, mask), inputs, grad)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_output_at_some_positions_is_that_of_the_plain_block(layer, masked, monkeypatch):
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", "16")
    hidden, mask = batch(3, 70, masked)
    hidden.requires_grad_()
    positions = torch.tensor([[0, 5, 69], [2, 2, 1], [40, 3, 68]])
    inputs = [hidden, *layer.parameters()]
    wanted = rows_at(positions, run_plain(layer, hidden, mask))
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    wanted_grads = torch.autograd.grad(wanted, inputs, grad)
    plainly = layer(hidden, mask, positions=positions)
    in_chunks = run_chunked(layer, hidden, mask, rows_at(positions, hidden))
    for found in (plainly, in_chunks):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(found, inputs, grad), wanted_grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, mask, positions=positions), wanted, rtol=1e-10, atol=1e-10)


def test_frozen_block_passes_its_gradient_on(layer, monkeypatch):
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", "16")
    hidden, _ = batch(1, 50, False)
    layer.requires_grad_(False)
    hidden.requires_grad_()
    (wanted,) = torch.autograd.grad(run_plain(layer, hidden, None).sum(), hidden)
    (found,) = torch.autograd.grad(run_chunked(layer, hidden).sum(), hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_reaches_the_recomputation(layer, trained, monkeypatch):
    monkeypatch.setenv("SCBERT_CHUNK_SIZE", "16")
    layer = layer.float()
    hidden, mask = batch(2, 60, True, torch.float32)
    exact = run_plain(layer, hidden, mask)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        found = run_chunked(layer, hidden, mask)
        again = run_plain(layer, hidden, mask)
    torch.testing.assert_close(found, again, rtol=2e-2, atol=2e-2)
    assert 0 < (found - exact).abs().max() < 2e-2
    if trained:
        weights = list(layer.parameters())
        wanted = torch.autograd.grad(exact.square().sum(), weights)
        for mine, theirs in zip(torch.autograd.grad(found.square().sum(), weights), wanted, strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < 3e-2


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


def blocks_of(model, length=130, cells=2):
    """Backends that its blocks choose for hidden states of their own that need a gradient."""
    hidden = torch.empty(cells, length, model.config.hidden_size, requires_grad=torch.is_grad_enabled())
    return [choose_block(layer, hidden) for layer in model.scbert.layers]


def test_checkpointed_blocks_and_blocks_in_chunks_have_the_plain_gradients():
    torch.manual_seed(0)
    model = ScBertForMaskedExpression(small_config()).train()
    ids = torch.randint(0, 6, (2, 130))
    with favor_backend("plain"):
        wanted = gradients(model, ids)
    with favor_backend("chunked"):
        chunked = gradients(model, ids)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        both = gradients(model, ids)
        assert model.scbert.layers[0].gradient_checkpointing
    checkpointed = gradients(model, ids)
    for other in (checkpointed, chunked, both):
        for mine, theirs in zip(other, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_small_blocks_are_checkpointed_as_transformers_does_it_and_large_ones_recompute_themselves():
    model = ScBertForMaskedExpression(small_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.scbert.layers:
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, f=checkpoint: calls.append(a) or f(*a)
    gradients(model, torch.randint(0, 6, (2, 130)))
    assert len(calls) == 2
    with favor_backend("chunked"):
        gradients(model, torch.randint(0, 6, (2, 130)))
    assert len(calls) == 2


def test_training_keeps_what_is_small_and_recomputes_what_is_large():
    model = ScBertForMaskedExpression(small_config()).train()
    assert blocks_of(model) == ["plain"] * 2
    cells = KEPT_BYTES // (130 * 12 * 4)
    assert blocks_of(model, cells=cells) == ["plain"] * 2
    assert blocks_of(model, cells=cells + 1) == ["chunked"] * 2


def test_what_needs_no_gradient_runs_in_chunks():
    model = ScBertForMaskedExpression(small_config()).train()
    model.scbert.layers[0].requires_grad_(False)
    hidden = torch.empty(2, 130, 12)
    assert [choose_block(layer, hidden) for layer in model.scbert.layers] == ["chunked", "plain"]
    with torch.no_grad():
        assert blocks_of(model) == ["chunked"] * 2
        assert choose_block(model.scbert.layers[0], hidden, output_attentions=True) == "plain"


def test_an_adapter_s_dropout_is_not_drawn_anew_in_the_backward(layer):
    """Which would give gradients of another function than the one whose loss was taken."""
    layer.attention.v_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.attention.v_proj)
    hidden = torch.randn(1, 60, 12, dtype=torch.float64)
    with favor_backend("chunked"):
        with pytest.raises(ValueError, match="dropout is active"):
            choose_block(layer, hidden)
        assert choose_block(layer.requires_grad_(False), hidden) == "chunked"


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_left_to_the_plain_block(dropout):
    model = ScBertForMaskedExpression(small_config(**{dropout: 0.5})).train()
    assert blocks_of(model, cells=4000) == ["plain"] * 2
    with favor_backend("chunked"), pytest.raises(ValueError, match="dropout is active"):
        blocks_of(model)


def test_attention_that_is_asked_for_is_that_of_the_block():
    model = ScBertForMaskedExpression(small_config())
    with torch.no_grad(), favor_backend("naive"):
        assert blocks_of(model) == ["plain"] * 2


def test_other_attention_types_are_plain():
    for kind in ("softmax", "lsh"):
        model = ScBertForMaskedExpression(small_config(attention_type=kind, reversible=False))
        with torch.no_grad(), favor_backend("chunked"):
            assert blocks_of(model) == ["plain"] * 2


class WholeNumbers(torch.nn.Module):
    """A linear map of whole numbers and a scale, as quantised models have: its weight's dtype is no dtype of states."""

    def __init__(self, linear):
        super().__init__()
        self.scale, self.bias = linear.weight.abs().max().item() / 127, linear.bias
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x) * self.scale, self.bias)


def test_quantised_weights(layer):
    layer.attention.o_proj = WholeNumbers(layer.attention.o_proj)
    hidden, mask = batch(2, 30, masked=True)
    with torch.no_grad():
        found = run_chunked(layer, hidden, mask)
    torch.testing.assert_close(found, run_plain(layer, hidden, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation():
    model, ids = ScBertForMaskedExpression(small_config()).eval(), torch.randint(0, 6, (2, 20))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    torch.testing.assert_close(quantised(ids).logits, model(ids).logits, rtol=0.1, atol=0.1)
