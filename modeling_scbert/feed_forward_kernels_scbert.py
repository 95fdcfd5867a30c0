"""
Triton kernels of what surrounds attention in a block: layer norms and the feed-forward network, forward and backward.

Between the rows of the residual stream that a program reads and those that it writes, nothing leaves the chip. Rows of
C numbers come in pieces of powers of two, 200 as 128 + 64 + 16, so that matrix products compute little beyond them.
"""

import triton
import triton.language as tl

from .favor_table_kernels_scbert import load_kept, store_rows


@triton.jit
def load_vector(start, first, SIZE: tl.constexpr, C: tl.constexpr):
    """Part of a vector of C numbers as a row, in float32."""
    columns = first + tl.arange(0, SIZE)
    return tl.load(start + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gelu(x):
    """x Phi(x) and its derivative, by the error function of Abramowitz and Stegun (7.1.26), 1.5e-7 off at most."""
    u = tl.abs(x) * 0.7071067811865476
    # the square of a reciprocal root is cheaper than a division
    t = tl.rsqrt(1.0 + 0.3275911 * u)
    t = t * t
    bell = tl.exp2(u * u * -1.4426950408889634)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * tail * bell
    slope = tl.where(x > 0, 1.0 - tail, tail) + x * bell * 0.3989422804014327
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, slope


@triton.jit
def add_branch(x, A, BIAS, rows, cells, first, SIZE: tl.constexpr, C: tl.constexpr, keep):
    """The residual stream after attention, whose bias is a cell's own: it holds the mean of the values."""
    branch = load_kept(A, C, rows, C, SIZE, keep, first).to(tl.float32)
    return x.to(tl.float32) + branch + load_kept(BIAS, C, cells, C, SIZE, keep, first)


@triton.jit(do_not_specialize=["length", "tokens"])
def norm_kernel(
    X,
    A,
    BIAS,
    GAMMA,
    BETA,
    NORMED,
    RESIDUAL,
    length,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
):
    """Layer norm of rows; with a branch, of rows to which it is added, which are written as well."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < tokens
    x = load_kept(X, C, rows, C, BLOCK_C, keep).to(tl.float32)
    if HAS_BRANCH:
        x = add_branch(x, A, BIAS, rows, rows // length, 0, BLOCK_C, C, keep)
        store_rows(RESIDUAL, C, rows, x, C, BLOCK_C, keep)
    inside = (tl.arange(0, BLOCK_C) < C)[None, :]
    x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)
    normed = x * rstd[:, None] * load_vector(GAMMA, 0, BLOCK_C, C) + load_vector(BETA, 0, BLOCK_C, C)
    store_rows(NORMED, C, rows, normed, C, BLOCK_C, keep)


@triton.jit(do_not_specialize=["tokens"])
def norm_gradient_kernel(
    X,
    NORMED_GRAD,
    RESIDUAL_GRAD,
    GAMMA,
    X_GRAD,
    GAMMA_GRAD,
    BETA_GRAD,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Gradient of a layer norm's input, with that of the residual stream where there is one; sums for its weights."""
    program = tl.program_id(0).to(tl.int64)
    inside = (tl.arange(0, BLOCK_C) < C)[None, :]
    gamma = load_vector(GAMMA, 0, BLOCK_C, C)
    gamma_grad = tl.zeros([BLOCK_C], tl.float32)
    beta_grad = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(program * BLOCK_N, tokens, tl.num_programs(0) * BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        keep = rows < tokens
        x = load_kept(X, C, rows, C, BLOCK_C, keep).to(tl.float32)
        grad = load_kept(NORMED_GRAD, C, rows, C, BLOCK_C, keep).to(tl.float32)
        x = tl.where(inside, x - (tl.sum(x, 1) / C)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
        x *= rstd
        gamma_grad += tl.sum(grad * x, 0)
        beta_grad += tl.sum(grad, 0)
        grad *= gamma
        mean, slope = (tl.sum(grad, 1) / C)[:, None], (tl.sum(grad * x, 1) / C)[:, None]
        grad = (grad - mean - x * slope) * rstd
        if HAS_RESIDUAL:
            grad += load_kept(RESIDUAL_GRAD, C, rows, C, BLOCK_C, keep).to(tl.float32)
        store_rows(X_GRAD, C, rows, grad, C, BLOCK_C, keep)
    columns = tl.arange(0, BLOCK_C)
    tl.store(GAMMA_GRAD + program * C + columns, gamma_grad, mask=columns < C)
    tl.store(BETA_GRAD + program * C + columns, beta_grad, mask=columns < C)


@triton.jit(do_not_specialize=["length", "tokens"])
def feed_forward_kernel(
    X,
    A,
    BIAS,
    GAMMA,
    BETA,
    W1,
    B1,
    W2,
    B2,
    OUT,
    length,
    tokens,
    eps,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the residual stream and attention's branch to the block's output; W1 and W2 are both [inner, C]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < tokens
    xs = ()
    total = tl.zeros([BLOCK_N], tl.float32)
    first = 0
    for i in tl.static_range(len(PIECES)):
        x = load_kept(X, C, rows, C, PIECES[i], keep, first)
        xs += (add_branch(x, A, BIAS, rows, rows // length, first, PIECES[i], C, keep),)
        total += tl.sum(xs[i], 1)
        first += PIECES[i]
    mean = (total / C)[:, None]
    squares = tl.zeros([BLOCK_N], tl.float32)
    first = 0
    for i in tl.static_range(len(PIECES)):
        inside = (first + tl.arange(0, tl.constexpr(PIECES[i])) < C)[None, :]
        x = tl.where(inside, xs[i] - mean, 0.0)
        squares += tl.sum(x * x, 1)
        first += PIECES[i]
    rstd = tl.rsqrt(squares / C + eps)[:, None]
    normed = ()
    outs = ()
    first = 0
    for i in tl.static_range(len(PIECES)):
        n = (xs[i] - mean) * rstd * load_vector(GAMMA, first, PIECES[i], C) + load_vector(
            BETA, first, PIECES[i], C
        )
        normed += (n.to(W1.dtype.element_ty),)
        outs += (xs[i] + load_vector(B2, first, PIECES[i], C),)
        first += PIECES[i]
    for start in tl.range(0, INNER, BLOCK_I, num_stages=STAGES):
        inner = start + tl.arange(0, BLOCK_I)
        hidden = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        first = 0
        for i in tl.static_range(len(PIECES)):
            w1 = load_kept(W1, C, inner, C, PIECES[i], inner < INNER, first)
            hidden = tl.dot(normed[i], tl.trans(w1), acc=hidden, input_precision=PRECISION)
            first += PIECES[i]
        active, _ = gelu(hidden + load_vector(B1, start, BLOCK_I, INNER))
        active = active.to(W2.dtype.element_ty)
        new_outs = ()
        first = 0
        for i in tl.static_range(len(PIECES)):
            w2 = load_kept(W2, C, inner, C, PIECES[i], inner < INNER, first)
            new_outs += (tl.dot(active, w2, acc=outs[i], input_precision=PRECISION),)
            first += PIECES[i]
        outs = new_outs
    first = 0
    for i in tl.static_range(len(PIECES)):
        store_rows(OUT, C, rows, outs[i], C, PIECES[i], keep, first)
        first += PIECES[i]


@triton.jit(do_not_specialize=["tokens"])
def hidden_gradient_kernel(
    NORMED,
    OUT_GRAD,
    W1,
    B1,
    W2,
    ACTIVE,
    HIDDEN_GRAD,
    tokens,
    C: tl.constexpr,
    PIECES: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the network's hidden layer was, and the gradient before its activation: all that its weights' need."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = rows < tokens
    normed = ()
    grads = ()
    first = 0
    for i in tl.static_range(len(PIECES)):
        normed += (load_kept(NORMED, C, rows, C, PIECES[i], keep, first),)
        grads += (load_kept(OUT_GRAD, C, rows, C, PIECES[i], keep, first),)
        first += PIECES[i]
    for start in tl.range(0, INNER, BLOCK_I, num_stages=STAGES):
        inner = start + tl.arange(0, BLOCK_I)
        hidden = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        grad = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        first = 0
        for i in tl.static_range(len(PIECES)):
            w1 = load_kept(W1, C, inner, C, PIECES[i], inner < INNER, first)
            hidden = tl.dot(normed[i], tl.trans(w1), acc=hidden, input_precision=PRECISION)
            w2 = load_kept(W2, C, inner, C, PIECES[i], inner < INNER, first)
            grad = tl.dot(grads[i], tl.trans(w2), acc=grad, input_precision=PRECISION)
            first += PIECES[i]
        active, slope = gelu(hidden + load_vector(B1, start, BLOCK_I, INNER))
        store_rows(ACTIVE, INNER, rows, active, INNER, BLOCK_I, keep, start)
        store_rows(HIDDEN_GRAD, INNER, rows, grad * slope, INNER, BLOCK_I, keep, start)
