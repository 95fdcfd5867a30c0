"""LSH attention against its dense reference, exact attention, and the promises of its docstring."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel

from scbert import ScBertConfig, ScBertModel
from scbert.interpretation.received_attention import gene_attention
from scbert.modeling_scbert import lsh_scbert
from scbert.modeling_scbert.lsh_scbert import (
    draw_rotations,
    lsh_attention,
    lsh_attention_received,
    lsh_probs_naive,
    shared_query_key_probs,
)

CHUNK = 16


def draw(batch=2, heads=3, length=101, dim=8, rounds=3, buckets=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query_key, value = (torch.randn(batch, heads, length, dim, generator=generator) for _ in range(2))
    return query_key, value, draw_rotations(heads, dim, rounds, buckets, generator)


def mask_after(batch, length, *lengths):
    return (torch.arange(length) < torch.tensor(lengths).view(batch, 1)).long()


@pytest.mark.parametrize("length", [7, 16, 17, 101])
@pytest.mark.parametrize("rounds", [1, 3])
def test_equals_dense_reference(length, rounds):
    query_key, value, rotations = draw(length=length, rounds=rounds)
    mask = mask_after(2, length, length, length - 5)
    keep = mask.bool()[:, None, :, None]
    inputs = [x.clone().requires_grad_() for x in (query_key, value)]
    fast = lsh_attention(*inputs, rotations, mask, CHUNK)
    slow = lsh_probs_naive(inputs[0], rotations, mask, CHUNK) @ inputs[1]
    torch.testing.assert_close(fast * keep, slow * keep, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(fast) * keep
    for ours, theirs in zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (fast, slow))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_received_is_the_column_sum():
    query_key, _, rotations = draw()
    mask = mask_after(2, 101, 101, 60)
    dense = lsh_probs_naive(query_key, rotations, mask, CHUNK) * mask[:, None, :, None]
    received = lsh_attention_received(query_key, rotations, mask, CHUNK)
    torch.testing.assert_close(received, dense.sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(received.sum(-1), mask.sum(-1, keepdim=True).float().expand(2, 3))


def test_converges_to_exact_attention_as_hashes_grow():
    query_key, value, _ = draw(batch=1, heads=2, length=96)
    exact = shared_query_key_probs(query_key, torch.ones(1, 96)) @ value
    errors = []
    for rounds in (1, 4, 16, 64):
        rotations = draw_rotations(2, 8, rounds, 4, torch.Generator().manual_seed(1))
        errors.append(
            ((lsh_attention(query_key, value, rotations, None, CHUNK) - exact).norm() / exact.norm()).item()
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2 and errors[-1] < 0.02


def test_one_chunk_is_exact_however_far_it_is_padded():
    query_key, value, rotations = draw(length=50, buckets=8)
    mask = mask_after(2, 50, CHUNK, CHUNK - 3)
    exact = shared_query_key_probs(query_key, mask) @ value
    found = lsh_attention(query_key, value, rotations, mask, CHUNK)
    for cell, length in enumerate(mask.sum(-1)):
        torch.testing.assert_close(found[cell, :, :length], exact[cell, :, :length])


def test_padding_batch_and_cell_order_change_nothing():
    query_key, value, rotations = draw(batch=3, length=75)
    together = lsh_attention(query_key, value, rotations, None, CHUNK)
    padded = [torch.cat([x, torch.full_like(x[:, :, :40], 9.0)], dim=2) for x in (query_key, value)]
    padded = lsh_attention(*padded, rotations, mask_after(3, 115, 75, 75, 75), CHUNK)[:, :, :75]
    torch.testing.assert_close(padded, together, rtol=1e-5, atol=1e-6)
    for cell in range(3):
        alone = lsh_attention(query_key[[cell]], value[[cell]], rotations, None, CHUNK)
        torch.testing.assert_close(alone[0], together[cell], rtol=1e-5, atol=1e-6)
    flipped = lsh_attention(query_key.flip(0), value.flip(0), rotations, None, CHUNK)
    torch.testing.assert_close(flipped.flip(0), together, rtol=1e-5, atol=1e-6)


def test_padding_on_any_side_changes_nothing():
    query_key, value, rotations = draw(batch=1, length=75)
    front = [torch.cat([torch.full_like(x[:, :, :9], 5.0), x], dim=2) for x in (query_key, value)]
    mask = (torch.arange(84) >= 9).long()[None]
    found = lsh_attention(*front, rotations, mask, CHUNK)[:, :, 9:]
    torch.testing.assert_close(
        found, lsh_attention(query_key, value, rotations, None, CHUNK), rtol=1e-5, atol=1e-6
    )


def test_commutes_with_a_permutation_of_genes():
    query_key, value, rotations = draw(batch=1)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(3))
    permuted = lsh_attention(query_key[:, :, order], value[:, :, order], rotations, None, CHUNK)
    found = lsh_attention(query_key, value, rotations, None, CHUNK)
    torch.testing.assert_close(permuted, found[:, :, order], rtol=1e-5, atol=1e-6)


def test_masked_positions_get_no_gradient():
    query_key, value, rotations = draw(length=60)
    mask = mask_after(2, 60, 60, 33)
    query_key.requires_grad_(), value.requires_grad_()
    out = lsh_attention(query_key, value, rotations, mask, CHUNK) * mask[:, None, :, None]
    out.square().sum().backward()
    for x in (query_key, value):
        assert torch.isfinite(x.grad).all()
        assert x.grad[1, :, 33:].abs().max() == 0
        assert x.grad[1, :, :33].abs().min(-1).values.max() > 0


def test_sees_itself_only_where_alone():
    query_key, _, rotations = draw(batch=1, heads=2, length=120, buckets=64, rounds=1)
    probs = lsh_probs_naive(query_key, rotations, None, CHUNK)
    itself = probs.diagonal(dim1=-2, dim2=-1)
    assert ((itself == 0) | (itself == 1)).all()
    assert 0 < itself.sum() < itself.numel()
    value = torch.randn_like(query_key)
    found = lsh_attention(query_key, value, rotations, None, CHUNK)
    torch.testing.assert_close(found[itself == 1], value[itself == 1])


def test_a_cell_without_any_token_is_finite():
    query_key, value, rotations = draw(length=60)
    out = lsh_attention(query_key, value, rotations, mask_after(2, 60, 60, 0), CHUNK)
    assert torch.isfinite(out).all()


def test_bounded_slices_change_nothing(monkeypatch):
    query_key, value, rotations = draw()
    whole = lsh_attention(query_key, value, rotations, None, CHUNK)
    monkeypatch.setitem(lsh_scbert.SCORE_BUDGET, "cpu", 1)
    torch.testing.assert_close(lsh_attention(query_key, value, rotations, None, CHUNK), whole)


def test_half_precision_stays_close():
    query_key, value, rotations = draw(length=200)
    half = lsh_attention(query_key.bfloat16(), value.bfloat16(), rotations, None, CHUNK)
    full = lsh_attention(query_key.bfloat16().float(), value.bfloat16().float(), rotations, None, CHUNK)
    assert half.dtype == torch.bfloat16
    assert ((half.float() - full).norm() / full.norm()) < 0.01


def test_odd_buckets_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="even"):
        ScBertConfig(attention_type="lsh", lsh_num_buckets=5)


def tiny_config(**settings):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, intermediate_size=32)
    hashing = dict(attention_type="lsh", lsh_num_buckets=8, lsh_chunk_length=CHUNK)
    return ScBertConfig(max_position_embeddings=81, **sizes, **hashing, **settings)


def test_model_hashes_by_its_seed_in_evaluation():
    cells = torch.randint(0, 6, (2, 81))
    torch.manual_seed(0)
    model = ScBertModel(tiny_config()).eval()
    torch.testing.assert_close(model(cells)[0], model(cells)[0], rtol=0, atol=0)
    other = ScBertModel(tiny_config(seed=1)).eval()
    assert not torch.equal(other.layers[0].attention.hash_rotations, model.layers[0].attention.hash_rotations)
    first, second = (layer.attention.hash_rotations for layer in model.layers)
    assert not torch.equal(first, second)
    half = AutoModel.from_config(tiny_config(), dtype=torch.bfloat16)
    assert torch.equal(half.layers[0].attention.hash_rotations, first)


def test_model_hashes_anew_in_training_under_torchs_seed():
    cells = torch.randint(0, 6, (1, 81))
    model = ScBertModel(tiny_config(initializer_range=0.5)).train()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(cells).last_hidden_state)
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


def test_model_round_trip_and_attentions(tmp_path):
    cells = torch.randint(0, 6, (2, 81))
    model = ScBertModel(tiny_config(position_embedding_type="sinusoidal")).eval()
    model.save_pretrained(tmp_path)
    again = ScBertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(cells)[0], model(cells)[0], rtol=0, atol=0)
    half = ScBertModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.layers[0].attention.hash_rotations.dtype == torch.float32
    outputs = model(cells, output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 81, 81)] * 2
    torch.testing.assert_close(outputs.last_hidden_state, model(cells)[0])
    expected = torch.stack(outputs.attentions).mean(dim=(0, 2)).sum(dim=1)
    torch.testing.assert_close(gene_attention(model, cells), expected, rtol=1e-4, atol=1e-4)
