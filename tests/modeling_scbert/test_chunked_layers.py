"""Whole blocks in chunks, for inference and for training, against the plain block."""

import contextlib

import pytest
import torch

from scbert import ScBertConfig, ScBertForMaskedExpression, ScBertModel
from scbert.modeling_scbert import chunked_training_scbert, layers_scbert
from scbert.modeling_scbert.chunked_inference_scbert import layer_in_chunks
from scbert.modeling_scbert.chunked_training_scbert import train_in_chunks
from scbert.modeling_scbert.cpu_matmul_scbert import restore_matmul, use_onednn
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


def plain(layer, hidden_states, attention_mask):
    residual = hidden_states + layer.attend(hidden_states, attention_mask)
    return residual + layer.feed_forward(residual)


def batch(cells, length, masked, dtype=torch.float64):
    generator = torch.Generator().manual_seed(cells)
    hidden = torch.randn(cells, length, 12, generator=generator, dtype=dtype)
    lengths = torch.randint(1, length + 1, (cells, 1), generator=generator)
    return hidden, (torch.arange(length) < lengths).long() if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cells, length, chunk_size", SHAPES)
def test_inference_is_the_plain_block(layer, cells, length, chunk_size, masked):
    hidden, mask = batch(cells, length, masked)
    found = layer_in_chunks(layer, hidden, mask, chunk_size)
    torch.testing.assert_close(found, plain(layer, hidden, mask).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cells, length, chunk_size", SHAPES)
def test_training_has_the_plain_block_s_gradients(layer, cells, length, chunk_size, masked):
    hidden, mask = batch(cells, length, masked)
    hidden.requires_grad_()
    layer.ffn_norm.requires_grad_(False)
    inputs = [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]
    grad = torch.randn(hidden.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(plain(layer, hidden, mask), inputs, grad)
    found = torch.autograd.grad(train_in_chunks(layer, hidden, mask, chunk_size), inputs, grad)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_output_at_some_positions_is_that_of_the_plain_block(layer, masked):
    hidden, mask = batch(3, 70, masked)
    hidden.requires_grad_()
    positions = torch.tensor([[0, 5, 69], [2, 2, 1], [40, 3, 68]])
    inputs = [hidden, *layer.parameters()]
    wanted = rows_at(positions, plain(layer, hidden, mask))
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    wanted_grads = torch.autograd.grad(wanted, inputs, grad)
    plainly = layer(hidden, mask, positions=positions)
    in_chunks = train_in_chunks(layer, hidden, mask, 16, rows_at(positions, hidden))
    for found in (plainly, in_chunks):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(found, inputs, grad), wanted_grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden, mask, positions=positions), wanted, rtol=1e-10, atol=1e-10)


def test_frozen_block_passes_its_gradient_on(layer):
    hidden, _ = batch(1, 50, False)
    layer.requires_grad_(False)
    hidden.requires_grad_()
    (wanted,) = torch.autograd.grad(plain(layer, hidden, None).sum(), hidden)
    (found,) = torch.autograd.grad(train_in_chunks(layer, hidden, None, 16).sum(), hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_reaches_the_recomputation(layer, trained):
    layer = layer.float()
    hidden, mask = batch(2, 60, True, torch.float32)
    exact = plain(layer, hidden, mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = (train_in_chunks if trained else layer_in_chunks)(layer, hidden, mask, 16)
        again = plain(layer, hidden, mask)
    torch.testing.assert_close(found, again, rtol=2e-2, atol=2e-2)
    assert 0 < (found - exact).abs().max() < 2e-2
    if trained:
        weights = list(layer.parameters())
        wanted = torch.autograd.grad(exact.square().sum(), weights)
        for mine, theirs in zip(torch.autograd.grad(found.square().sum(), weights), wanted, strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < 3e-2


@contextlib.contextmanager
def counted(monkeypatch, name):
    calls = []
    original = getattr(layers_scbert, name)
    monkeypatch.setattr(layers_scbert, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    yield calls


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


def test_checkpointed_and_large_blocks_are_trained_in_chunks(monkeypatch):
    torch.manual_seed(0)
    model = ScBertForMaskedExpression(small_config()).train()
    ids = torch.randint(0, 6, (2, 130))
    with counted(monkeypatch, "train_in_chunks") as calls:
        wanted = gradients(model, ids)
        assert not calls
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = gradients(model, ids)
        assert len(calls) == 2
        assert model.scbert.layers[0].gradient_checkpointing
        model.gradient_checkpointing_disable()
        monkeypatch.setattr(chunked_training_scbert, "KEPT_BYTES", 0)
        large = gradients(model, ids)
        assert len(calls) == 4
    for other in (checkpointed, large):
        for mine, theirs in zip(other, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_what_needs_no_gradient_runs_in_chunks(monkeypatch):
    model = ScBertForMaskedExpression(small_config()).train()
    ids = torch.randint(0, 6, (2, 130))
    for weight in (*model.scbert.embeddings.parameters(), *model.scbert.layers[0].parameters()):
        weight.requires_grad_(False)
    with counted(monkeypatch, "layer_in_chunks") as calls:
        model(ids)
        assert [call[0] for call in calls] == [model.scbert.layers[0]]
        calls.clear()
        model.eval()(ids, output_attentions=True)
        assert not calls
        with torch.no_grad():
            model(ids, output_hidden_states=True)
        assert len(calls) == 2


def test_dropout_is_left_to_the_plain_block(monkeypatch):
    model = ScBertForMaskedExpression(small_config(hidden_dropout_prob=0.5)).train()
    monkeypatch.setattr(chunked_training_scbert, "KEPT_BYTES", 0)
    with counted(monkeypatch, "train_in_chunks") as calls:
        gradients(model, torch.randint(0, 6, (1, 130)))
        assert not calls


def test_onednn_is_kept_only_where_it_is_exact():
    try:
        assert not use_onednn(max_error=0.0).enabled
        report = use_onednn()
        if report.enabled:
            left, right = torch.randn(600, 64), torch.randn(64, 266)
            exact = left.double() @ right.double()
            assert ((left @ right - exact).abs().max() / exact.abs().max()).item() < 1e-5
            assert "kept" in str(report)
    finally:
        restore_matmul()
