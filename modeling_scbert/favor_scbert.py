"""
FAVOR+ attention (Choromanski et al., ICLR 2021), non-causal softmax kernel, as scBERT uses it.

With x' = x * d^(-1/4), rows w of a random projection [m, d], and one stabiliser per cell:

    phi_q(x) = m^(-1/2) * (exp(w.x' - |x'|^2/2 - max over features of w.x') + eps)
    phi_k(x) = m^(-1/2) * (exp(w.x' - |x'|^2/2 - max over features, positions and heads of w.x') + eps)
    out      = phi_q (phi_k^T v) / (phi_q . sum phi_k)

The original takes the key maximum over the whole batch; taken per cell it is equal at batch size 1, and a cell's
output no longer depends on its batch mates. The stabilisers are constants to the gradient, here and in every backend.
"""

import torch

# above this length a full attention matrix is refused: it would take length^2 * heads numbers a layer
MAX_ATTENTION_MATRIX_LENGTH = 4096


def draw_projection(num_features: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """
    Draw the random projection of one layer, float32 ``[num_features, head_dim]``.

    Orthogonal blocks of ``head_dim`` rows, the last one truncated, whose rows have the norms of Gaussian rows. The
    generator is of the CPU: equal seeds give equal features on every device and rank.

    Examples
    --------
    >>> draw_projection(266, 64, torch.Generator().manual_seed(0)).shape
    torch.Size([266, 64])
    """
    num_blocks = -(-num_features // head_dim)
    # whatever dtype and device new tensors have by default
    drawn = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    gaussians = torch.randn(num_blocks, head_dim, head_dim, **drawn)
    rotations, triangles = torch.linalg.qr(gaussians)
    # lapack leaves the signs to chance of its own; without them the directions are not uniform (Mezzadri 2007), and
    # the kernel stays off by 6% at d = 8 however many features are drawn
    rotations = rotations * triangles.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = rotations.mT.reshape(-1, head_dim)[:num_features]
    norms = torch.randn(num_features, head_dim, **drawn).norm(dim=1)
    return norms[:, None] * directions


def _log_features(x: torch.Tensor, projection_matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w.x' [..., length, m] and |x'|^2/2 [..., length, 1]; the stabiliser is a maximum of the first alone."""
    x = x * x.shape[-1] ** -0.25
    return x @ projection_matrix.T, x.square().sum(-1, keepdim=True) / 2


def favor_feature_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Random features of queries and keys, written straight from the formulas above.

    ``phi_q [batch, heads, query length, m]`` and ``phi_k [batch, heads, key length, m]``, at least float32; the latter
    is exactly zero at masked keys. Arguments are as in `favor_attention` of favor_engine_scbert.py.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    projection_matrix = projection_matrix.to(dtype)
    dash_q, diag_q = _log_features(query.to(dtype), projection_matrix)
    dash_k, diag_k = _log_features(key.to(dtype), projection_matrix)
    scale = projection_matrix.shape[0] ** -0.5

    phi_q = scale * ((dash_q - diag_q - dash_q.amax(-1, keepdim=True).detach()).exp() + epsilon)
    if attention_mask is None:
        return phi_q, scale * (
            (dash_k - diag_k - dash_k.amax((1, 2, 3), keepdim=True).detach()).exp() + epsilon
        )

    keep = attention_mask.bool()[:, None, :, None]
    lowest = torch.finfo(dtype).min
    key_max = dash_k.masked_fill(~keep, lowest).amax((1, 2, 3), keepdim=True).detach()
    # masked keys are lowered before exp, not only zeroed after it: inf * 0 would be nan
    phi_k = scale * ((dash_k - diag_k - key_max).masked_fill(~keep, lowest).exp() + epsilon)
    return phi_q, phi_k * keep


def favor_attention_naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> torch.Tensor:
    """
    FAVOR+ with the features of the whole sequence in memory: the reference every backend is tested against.

    Shapes as in `favor_attention` of favor_engine_scbert.py.
    """
    with torch.autocast(query.device.type, enabled=False):
        phi_q, phi_k = favor_feature_maps(query, key, projection_matrix, attention_mask, epsilon)
        context = phi_k.mT @ value.to(phi_k.dtype)
        normaliser = phi_q @ phi_k.sum(dim=2).unsqueeze(-1)
        # a cell without any key gets zeros
        return (phi_q @ context / normaliser.masked_fill(normaliser == 0, 1)).to(value.dtype)


def refuse_large_matrix(length: int) -> None:
    """Raise ValueError for a sequence too long for its attention matrix."""
    if length > MAX_ATTENTION_MATRIX_LENGTH:
        raise ValueError(
            f"output_attentions would build a {length} x {length} matrix per head and layer; at most "
            f"{MAX_ATTENTION_MATRIX_LENGTH} tokens are allowed. scbert.interpretation.gene_attention gives the "
            "attention each gene receives without that matrix."
        )


def favor_attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> torch.Tensor:
    """Full attention matrix ``[batch, heads, queries, keys]`` that FAVOR+ implies; for short sequences only."""
    refuse_large_matrix(key.shape[2])
    phi_q, phi_k = favor_feature_maps(query, key, projection_matrix, attention_mask, epsilon)
    weights = phi_q @ phi_k.mT
    total = weights.sum(-1, keepdim=True)
    # a cell without any key gives no attention
    return weights / total.masked_fill(total == 0, 1)


def favor_attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> torch.Tensor:
    """
    Attention each key receives over the queries ``[batch, heads, length]``: column sums of the matrix, in O(length m).

    Column j is ``sum_i phi_q(i) / D_i . phi_k(j)`` with ``D_i = phi_q(i) . sum phi_k``. Masked positions neither
    give nor receive.
    """
    phi_q, phi_k = favor_feature_maps(query, key, projection_matrix, attention_mask, epsilon)
    total = phi_q @ phi_k.sum(dim=2).unsqueeze(-1)
    # a cell without any key gives no attention
    weights = phi_q / total.masked_fill(total == 0, 1)
    if attention_mask is not None:
        weights = weights * attention_mask.to(weights.dtype)[:, None, :, None]
    return (phi_k @ weights.sum(dim=2).unsqueeze(-1)).squeeze(-1)
