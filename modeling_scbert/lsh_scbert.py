"""Bidirectional LSH attention with a shared query-key (Reformer, Kitaev et al., ICLR 2020).

Positions are hashed by random rotations into buckets, sorted by bucket, cut into chunks, and each chunk attends to
itself and its two neighbours, within the bucket. Several rounds are joined as one softmax over the *union* of the
pairs they found.

Why this is not ``transformers``' ``LSHSelfAttention``. That one
- attends to whatever lies in the chunk, of whichever bucket, and counts a pair found in two rounds twice, so it does
  not converge to exact attention as the number of hashes grows (here each pair's logit loses the log of its count,
  equation 6 of the paper);
- joins chunks in a ring that runs through all rounds, so padding a cell changes its output;
- reseeds torch's global generator whenever its hashing is to be repeatable, which repeats every dropout mask too;
- breaks ties inside a bucket by position, but the order of genes means nothing; here a further random direction
  does, and the layer commutes with any permutation of the genes;
- keeps all scores of all heads for the backward pass.
What is kept of it: keys are unit-length queries, logits are not scaled further, and a position attends to itself only
where it has nothing else.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .favor_scbert import refuse_large_matrix

# a position is its own best match, so it may only see itself when there is nothing else: far below every real logit,
# far above the excluded ones
SELF_BIAS = -1e5
EXCLUDED_BIAS = -1e9
# scores held at once, in elements: a few buffers that a CPU's cache holds in part, of 1 GiB on an accelerator
SCORE_BUDGET = {"cpu": 2**21, "cuda": 2**28}


class HashPlan(NamedTuple):
    """Where every position goes in every round.

    ``order`` [n, rounds, length] holds the position at each sorted place and ``undo`` the sorted place of each
    position. Two positions see each other in a round when their codes differ by at most one: codes count buckets in
    steps wider than the number of chunks, and chunks in steps of one. Masked positions have codes of their own on
    either side, so they see nothing and nothing sees them.
    """

    order: torch.Tensor
    undo: torch.Tensor
    query_code: torch.Tensor
    key_code: torch.Tensor


def draw_rotations(num_heads, head_dim, num_hashes, num_buckets, generator=None, device=None):
    """Draw the random directions of the hash, [num_heads, head_dim, num_hashes, num_buckets // 2 + 1].

    A position's bucket is the largest of ``num_buckets // 2`` projections and their negatives, so the number is even;
    the last direction orders positions in a bucket.

    Examples
    --------
    >>> draw_rotations(2, 16, 4, 8).shape
    torch.Size([2, 16, 4, 5])
    """
    shape = (num_heads, head_dim, num_hashes, num_buckets // 2 + 1)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def unit_keys(query_key):
    """Keys of a shared query-key: the queries at unit length (an all-zero query stays zero)."""
    return F.normalize(query_key.float(), dim=-1).to(query_key.dtype)


@torch.no_grad()
def plan_hashing(query_key, rotations, mask, chunk_length):
    """Hash and sort positions. query_key [n, length, d], rotations [n, d, rounds, k], mask [n, length] bool."""
    n, length, _ = query_key.shape
    rounds, half = rotations.shape[2], rotations.shape[3] - 1
    with torch.autocast(query_key.device.type, enabled=False):
        projected = unit_keys(query_key.float()) @ rotations.float().flatten(2)
    projected = projected.view(n, length, rounds, half + 1).transpose(1, 2)
    largest, smallest = projected[..., :half].max(-1), projected[..., :half].min(-1)
    buckets = torch.where(largest.values >= -smallest.values, largest.indices, smallest.indices + half)
    # cells of one chunk are attended exactly, whatever length they are padded to
    buckets = buckets.masked_fill((mask.sum(-1) <= chunk_length)[:, None, None], 0)
    # masked positions go last, so padding never moves a chunk boundary
    buckets = buckets.masked_fill(~mask[:, None], 2 * half)
    within = (torch.sigmoid(projected[..., half]) * 2**24).long()
    order = (buckets * 2**25 + within).argsort(dim=-1, stable=True)
    places = torch.arange(length, device=order.device).expand_as(order)
    undo = torch.empty_like(order).scatter_(-1, order, places)
    code = (buckets * (length // chunk_length + 3) + undo // chunk_length).int()
    return HashPlan(order, undo, code.masked_fill(~mask[:, None], -10), code.masked_fill(~mask[:, None], -20))


class _Rearrange(torch.autograd.Function):
    """Rows of x [n, 1 or rounds, length, d] in the order ``index`` [n, rounds, length]; backward by the inverse.

    A plain gather's backward adds by scattering: slower, and in no fixed order on a GPU.
    """

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        ctx.rounds = x.shape[1]
        return _rows(x, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = _rows(grad, inverse)
        return grad.sum(1, keepdim=True) if ctx.rounds == 1 else grad, None, None


def _rows(x, index):
    n, groups, length, d = x.shape
    start = torch.arange(n * groups, device=x.device).view(n, groups, 1) * length
    return x.reshape(-1, d).index_select(0, (index + start).flatten()).view(*index.shape, d)


def _with_neighbours(x, fill=0):
    """Chunks [n, rounds, chunks, c, ...] beside the chunk before and the chunk after: [n, rounds, chunks, 3c, ...]."""
    edge = torch.full_like(x[:, :, :1], fill)
    padded = torch.cat([edge, x, edge], dim=2)
    return torch.cat([padded[:, :, :-2], x, padded[:, :, 2:]], dim=3)


@torch.no_grad()
def _pair_bias(plan, chunk_length):
    """Bias of each pair in a window: minus the log of the rounds that find it; [n, rounds, chunks, c, 3c]."""
    n, rounds, length = plan.order.shape
    chunked = (n, rounds, length // chunk_length, chunk_length)
    index = plan.order.unsqueeze(2).expand(n, rounds, rounds, length)
    codes = [
        code.unsqueeze(1).expand_as(index).gather(-1, index).view(n, rounds, rounds, *chunked[2:]).unbind(2)
        for code in (plan.query_code, plan.key_code)
    ]
    found = [
        (query.unsqueeze(-1) - _with_neighbours(key, fill=-20).unsqueeze(-2)).abs_() <= 1
        for query, key in zip(*codes)
    ]
    here = torch.eye(rounds, dtype=torch.bool, device=index.device).view(1, rounds, rounds, 1, 1, 1)
    visible = found[0] if rounds == 1 else sum(here[:, :, i] & found[i] for i in range(rounds)).bool()
    bias = (
        -sum(pairs.float() for pairs in found).clamp_(min=1).log_() if rounds > 1 else visible.float().mul_(0)
    )
    bias.masked_fill_(~visible, EXCLUDED_BIAS)
    places = plan.order.view(chunked)
    itself = places.unsqueeze(-1) == _with_neighbours(places, fill=-1).unsqueeze(-2)
    return bias.masked_fill_(itself, SELF_BIAS)


def _window_scores(query_key, plan, chunk_length):
    """Biased logits of every window, float32 [n, rounds, chunks, c, 3c]."""
    n, rounds, length = plan.order.shape
    chunked = (n, rounds, length // chunk_length, chunk_length, -1)
    query = _Rearrange.apply(query_key.unsqueeze(1), plan.order, plan.undo).view(chunked)
    key = _Rearrange.apply(unit_keys(query_key).unsqueeze(1), plan.order, plan.undo).view(chunked)
    scores = query @ _with_neighbours(key).transpose(-1, -2)
    return scores.float() + _pair_bias(plan, chunk_length)


def _attend(query_key, value, rotations, mask, chunk_length, dropout):
    """LSH attention of some rows (cell x head); all [n, length, d], length a multiple of the chunk."""
    plan = plan_hashing(query_key, rotations, mask, chunk_length)
    scores = _window_scores(query_key, plan, chunk_length)
    probs = scores.softmax(-1)
    # the logsumexp of the scores, without another pass over all of them
    largest, place = scores.max(-1, keepdim=True)
    total = largest - probs.gather(-1, place).log()
    probs = F.dropout(probs, p=dropout)
    values = _Rearrange.apply(value.unsqueeze(1), plan.order, plan.undo).view(*scores.shape[:4], -1)
    found = (probs.to(value.dtype) @ _with_neighbours(values)).flatten(2, 3)
    found = _Rearrange.apply(found, plan.undo, plan.order)
    total = _Rearrange.apply(total.flatten(2, 3), plan.undo, plan.order)
    return (found.float() * total.softmax(dim=1)).sum(1).to(value.dtype)


@torch.no_grad()
def _received(query_key, rotations, mask, chunk_length):
    """Attention every position receives, summed over the unmasked queries; float32 [n, length]."""
    plan = plan_hashing(query_key, rotations, mask, chunk_length)
    scores = _window_scores(query_key, plan, chunk_length)
    total = scores.logsumexp(-1, keepdim=True)
    # a round's share of its query; a difference of logits as far down as a lone position's would be rounded
    share = _rows(total.flatten(2, 3), plan.undo).softmax(dim=1) * mask[:, None, :, None]
    share = _rows(share, plan.order).view_as(total)
    given = (torch.exp(scores - total) * share).sum(3)
    before, own, after = given.split(chunk_length, dim=-1)
    own[:, :, :-1] += before[:, :, 1:]
    own[:, :, 1:] += after[:, :, :-1]
    return _rows(own.flatten(2).unsqueeze(-1), plan.undo).sum(1).squeeze(-1)


def _per_rows(function, tensors, rotations, attention_mask, chunk_length, *args):
    """Apply a function of [n, length, d] rows over [batch, heads, length, d], a bounded number of rows at a time."""
    batch, heads, length, _ = tensors[0].shape
    extra = -length % chunk_length
    rows = [F.pad(x, (0, 0, 0, extra)).flatten(0, 1) for x in tensors]
    mask = F.pad(attention_mask.bool(), (0, extra)).repeat_interleave(heads, dim=0)
    head = torch.arange(heads, device=mask.device).repeat(batch)
    window = rotations.shape[2] * (length + extra) * 3 * chunk_length
    step = max(1, SCORE_BUDGET.get(mask.device.type, SCORE_BUDGET["cpu"]) // window)
    # a traced graph must not depend on the number of cells, so there all rows go at once
    starts = [0] if torch.compiler.is_compiling() else range(0, batch * heads, step)
    recompute = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    pieces = []
    for i in starts:
        part = slice(None) if torch.compiler.is_compiling() else slice(i, i + step)
        inputs = (*[x[part] for x in rows], rotations[head[part]], mask[part], chunk_length, *args)
        pieces.append(checkpoint(function, *inputs, use_reentrant=False) if recompute else function(*inputs))
    return torch.cat(pieces).unflatten(0, (batch, heads))[:, :, :length]


def lsh_attention(query_key, value, rotations, attention_mask=None, chunk_length=64, dropout=0.0):
    """Bidirectional multi-round LSH attention in O(length) memory, [batch, heads, length, d].

    Queries and values are of that shape, of any length; keys are the queries at unit length. ``rotations`` are those of
    :func:`draw_rotations`. Positions where the mask [batch, length] is 0 are neither hashed among the others nor
    attended; their own outputs are finite and mean nothing. A position sees those of its bucket within its chunk and
    the two beside it; cells of at most one chunk are attended exactly. Dropout is on the attention weights, drawn
    from torch's generator.

    Rows (cell x head) do not mix, so a cell's output does not depend on the others of its batch, nor on padding; but a
    position within rounding of a bucket's border may change bucket between two batch sizes. Scores are float32.

    Examples
    --------
    >>> x = torch.randn(1, 2, 100, 16)
    >>> lsh_attention(x, x, draw_rotations(2, 16, 4, 8), chunk_length=32).shape
    torch.Size([1, 2, 100, 16])
    """
    if attention_mask is None:
        attention_mask = query_key.new_ones(query_key.shape[0], query_key.shape[2])
    # a traced graph must not depend on the number of cells
    empty = not torch.compiler.is_compiling() and not len(query_key)
    if query_key.shape[2] <= chunk_length or empty:
        # one chunk is attended exactly, so there is nothing to hash
        probs = F.dropout(shared_query_key_probs(query_key, attention_mask), p=dropout)
        return probs.to(value.dtype) @ value
    return _per_rows(_attend, (query_key, value), rotations, attention_mask, chunk_length, dropout)


def lsh_attention_received(query_key, rotations, attention_mask=None, chunk_length=64):
    """Attention each position receives: column sums of the attention matrix over unmasked queries, in O(length).

    Shapes as in :func:`lsh_attention`; returns float32 [batch, heads, length], which sums to the number of unmasked
    positions.
    """
    if attention_mask is None:
        attention_mask = query_key.new_ones(query_key.shape[0], query_key.shape[2])
    if query_key.shape[2] <= chunk_length:
        probs = shared_query_key_probs(query_key, attention_mask)
        return (probs * attention_mask.to(probs.dtype)[:, None, :, None]).sum(2)
    return _per_rows(_received, (query_key,), rotations, attention_mask, chunk_length)


def shared_query_key_probs(query_key, attention_mask, visible=None):
    """Dense attention weights of a shared query-key, float32 [batch, heads, length, length].

    ``visible`` [batch, heads, length, length] bool restricts the pairs (all by default); a position sees itself only
    where nothing else is visible.
    """
    scores = (query_key @ unit_keys(query_key).transpose(-1, -2)).float()
    allowed = attention_mask.bool()[:, None, None, :] & attention_mask.bool()[:, None, :, None]
    scores = scores.masked_fill(~(allowed if visible is None else allowed & visible), EXCLUDED_BIAS)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(itself, SELF_BIAS).softmax(dim=-1)


def lsh_probs_naive(query_key, rotations, attention_mask=None, chunk_length=64):
    """Reference: the dense attention matrix of :func:`lsh_attention`, float32 [batch, heads, length, length].

    Two positions see each other when, in any round, they fall in one bucket and in the same or neighbouring chunks of
    the sorted order. O(length^2): for tests and for showing the attention of short sequences.
    """
    batch, heads, length, _ = query_key.shape
    refuse_large_matrix(length)
    if attention_mask is None:
        attention_mask = query_key.new_ones(batch, length)
    visible = torch.zeros(batch, heads, length, length, dtype=torch.bool, device=query_key.device)
    for cell in range(batch):
        mask = attention_mask[cell].bool().expand(heads, length)
        plan = plan_hashing(query_key[cell], rotations, mask, chunk_length)
        apart = plan.query_code.unsqueeze(-1) - plan.key_code.unsqueeze(-2)
        visible[cell] = (apart.abs() <= 1).any(dim=1)
    return shared_query_key_probs(query_key, attention_mask, visible)


class ScBertLshAttention(nn.Module):
    """Multi-head LSH attention; in training the hash is drawn anew at every pass, in evaluation it is a buffer."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        inner_size = config.num_attention_heads * config.head_dim
        self.qk_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size)
        self.hash_size = (
            config.num_attention_heads,
            config.head_dim,
            config.lsh_num_hashes,
            config.lsh_num_buckets,
        )
        self.register_buffer("hash_rotations", self.initial_rotations().to(self.o_proj.weight.device))

    def start_weights(self) -> None:
        """The rotations that hash; weights start as in every model of transformers."""
        init.copy_(self.hash_rotations, self.initial_rotations())

    def initial_rotations(self) -> torch.Tensor:
        """The layer's hash in evaluation; a pure function of the config, so that two inits agree."""
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 100_003 + self.layer_idx)
        return draw_rotations(*self.hash_size, generator, torch.device("cpu"))

    def _project(self, hidden_states, projection):
        return projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def received(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention each position receives over the unmasked queries, [batch, heads, length], in O(length)."""
        query_key = self._project(hidden_states, self.qk_proj)
        return lsh_attention_received(
            query_key, self.hash_rotations, attention_mask, self.config.lsh_chunk_length
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_key, value = (self._project(hidden_states, proj) for proj in (self.qk_proj, self.v_proj))
        rotations, dropout = self.hash_rotations, 0.0
        if self.training:
            rotations = draw_rotations(*self.hash_size, device=hidden_states.device)
            dropout = self.config.attention_probs_dropout_prob
        chunk_length = self.config.lsh_chunk_length
        weights = (
            lsh_probs_naive(query_key, rotations, attention_mask, chunk_length) if output_attentions else None
        )
        context = lsh_attention(query_key, value, rotations, attention_mask, chunk_length, dropout)
        return self.o_proj(context.transpose(1, 2).flatten(-2)), weights
