"""FAVOR+ against a float64 reference written from the formula, cell by cell and head by head."""

import math

import pytest
import torch

from scbert.modeling_scbert.favor_engine_scbert import favor_attention
from scbert.modeling_scbert.favor_scbert import (
    draw_projection,
    favor_attention_naive,
    favor_attention_received,
    favor_attention_weights,
)


def formula(query, key, value, projection, attention_mask=None, epsilon=1e-4):
    """The module docstring's three lines, in float64 and in loops; also returns the attention matrices."""
    query, key, value, projection = (t.double() for t in (query, key, value, projection))
    batch, heads, _, d = query.shape
    m = len(projection)
    outputs, matrices = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64), []
    for b in range(batch):
        kept = (
            range(key.shape[2]) if attention_mask is None else attention_mask[b].nonzero().flatten().tolist()
        )

        def exponents(x):
            x = x / math.sqrt(math.sqrt(d))
            products = torch.stack([w @ x for w in projection])
            return products - x @ x / 2, products.max()

        keys = {(h, j): exponents(key[b, h, j]) for h in range(heads) for j in kept}
        highest = max(largest for _, largest in keys.values())
        for h in range(heads):
            phi_k = {j: ((keys[h, j][0] - highest).exp() + epsilon) / math.sqrt(m) for j in kept}
            for i in range(query.shape[2]):
                e, largest = exponents(query[b, h, i])
                phi_q = ((e - largest).exp() + epsilon) / math.sqrt(m)
                weights = torch.stack([phi_q @ phi_k[j] for j in kept])
                weights = weights / weights.sum()
                outputs[b, h, i] = sum(w * value[b, h, j] for w, j in zip(weights, kept, strict=True))
                row = torch.zeros(key.shape[2], dtype=torch.float64)
                row[list(kept)] = weights
                matrices.append(row)
    return outputs, torch.stack(matrices).view(batch, heads, query.shape[2], -1)


def inputs(seed, batch=2, heads=3, queries=7, keys=9, d=8, m=19, width=5):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, heads, n, w, generator=generator)
        for n, w in ((queries, d), (keys, d), (keys, width))
    )
    return 2 * q, 2 * k, v, draw_projection(m, d, generator)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention", [favor_attention, favor_attention_naive])
def test_attention_equals_the_formula(attention, seed, masked):
    query, key, value, projection = inputs(seed)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    wanted, _ = formula(query, key, value, projection, mask)
    got = attention(query, key, value, projection, mask)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_weights_and_column_sums_equal_the_formula(masked):
    query, key, value, projection = inputs(0, queries=9)
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[9], [4]]) if masked else None
    _, matrices = formula(query, key, value, projection, mask)
    got = favor_attention_weights(query, key, projection, mask)
    torch.testing.assert_close(got.double(), matrices, rtol=1e-5, atol=1e-6)
    if masked:
        matrices = matrices * mask[:, None, :, None]
    received = favor_attention_received(query, key, projection, mask)
    torch.testing.assert_close(received.double(), matrices.sum(2), rtol=1e-5, atol=1e-6)


def test_epsilon_matters():
    query, key, value, projection = inputs(0)
    small, large = (favor_attention_naive(query, key, value, projection, epsilon=e) for e in (1e-4, 1e-2))
    assert (small - large).abs().max() > 1e-3


def test_masked_keys_contribute_exactly_nothing():
    query, key, value, projection = inputs(0)
    mask = torch.arange(9).expand(2, -1) < 6
    wanted = favor_attention(query, key, value, projection, mask)
    key[:, :, 6:] = 1e4
    value[:, :, 6:] = -1e6
    assert torch.equal(favor_attention(query, key, value, projection, mask), wanted)


def test_projection_rows_are_orthogonal_within_a_block_and_have_gaussian_norms():
    matrix = draw_projection(300, 64, torch.Generator().manual_seed(1))
    gram = matrix[:64] @ matrix[:64].T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-3)
    assert matrix.norm(dim=1).square().mean() == pytest.approx(64, rel=0.05)
    assert torch.equal(matrix, draw_projection(300, 64, torch.Generator().manual_seed(1)))


def test_projection_directions_are_uniform():
    # without the sign correction of the QR decomposition, entries of the first block's rows lean to one side
    blocks = torch.stack([draw_projection(4, 4, torch.Generator().manual_seed(s)) for s in range(2000)])
    assert blocks.mean(0).abs().max() < 0.12
    assert (blocks.diagonal(dim1=1, dim2=2) > 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_long_attention_matrices_are_refused():
    query = torch.zeros(1, 1, 5000, 4)
    with pytest.raises(ValueError, match="gene_attention"):
        favor_attention_weights(query, query, torch.zeros(3, 4))
