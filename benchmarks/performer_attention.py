"""
FAVOR+ in the separate operations of the public Performer library of early 2021, as a stand-in for the original.

Written anew from the formulas and from what that library (lucidrains/performer-pytorch, MIT) computes: one tensor of
[batch, heads, length, m] for every operation, maxima that autograd follows, one maximum of the keys for the whole
batch. `favor_attention_naive` is the readable reference; this is what it costs when nobody has looked at the cost.
"""

import torch


def performer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    projection_matrix: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    epsilon: float = 1e-4,
) -> torch.Tensor:
    """
    FAVOR+ attention, for timing.

    Parameters
    ----------
    query, key, value
        ``[batch, heads, length, d]``.
    projection_matrix
        ``[m, d]``.
    attention_mask
        Must be None: the original has no padding.
    epsilon
        The kernel's constant.

    Returns
    -------
    ``[batch, heads, length, d]``.

    Examples
    --------
    >>> x = torch.randn(1, 2, 10, 8)
    >>> performer_attention(x, x, x, torch.randn(16, 8)).shape
    torch.Size([1, 2, 10, 8])
    """
    if attention_mask is not None:
        raise ValueError(
            "The stand-in for the original knows no padding: give it cells of equal length, unmasked."
        )
    phi_q = _features(query, projection_matrix, epsilon, lambda logs: logs.max(-1, keepdim=True).values)
    phi_k = _features(key, projection_matrix, epsilon, torch.max)
    inverse = 1.0 / torch.einsum("...nm,...m->...n", phi_q, phi_k.sum(-2))
    context = torch.einsum("...nm,...ne->...me", phi_k, value)
    return torch.einsum("...me,...nm,...n->...ne", context, phi_q, inverse)


def _features(x, projection_matrix, epsilon, stabiliser) -> torch.Tensor:
    dim_scale = x.shape[-1] ** -0.25
    per_head = projection_matrix.expand(*x.shape[:2], *projection_matrix.shape)
    logs = torch.einsum("...nd,...md->...nm", dim_scale * x, per_head)
    half_square = ((x**2).sum(-1) / 2.0 * dim_scale**2).unsqueeze(-1)
    return projection_matrix.shape[0] ** -0.5 * (torch.exp(logs - half_square - stabiliser(logs)) + epsilon)
