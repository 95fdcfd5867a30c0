"""Triton kernels of FAVOR+ attention's backward, which recompute the features; see favor_kernels_scbert.py."""

from .favor_kernels_scbert import half_square, load_rows, row_logarithms

try:
    import triton
    import triton.language as tl
except ImportError:
    # never called then: the definitions below only have to be readable
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)


@triton.jit
def joined_gradient(
    GRAD, OUT, DENOMINATOR, base, row_stride, saved, positions, widths, DV: tl.constexpr, keep
):
    """Gradients of numerator [rows, dv] and denominator [rows]; zero in rows that are not kept."""
    grad = load_rows(GRAD, base, row_stride, positions, widths, DV, keep).to(tl.float32)
    out = load_rows(OUT, base, row_stride, positions, widths, DV, keep).to(tl.float32)
    denominator = tl.load(DENOMINATOR + saved + positions, mask=keep, other=1.0)
    return grad / denominator[:, None], -tl.sum(grad * out, 1) / denominator


@triton.jit
def context_gradient_kernel(
    Q,
    GRAD,
    OUT,
    W,
    W_LOW,
    MAXIMUM,
    DENOMINATOR,
    CONTEXT_GRAD,
    NORMALISER_GRAD,
    SUMS,
    q_batch,
    q_head,
    q_row,
    heads,
    length,
    splits,
    scale,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial gradient of context and normaliser, a tile of features over one part of the queries."""
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = features < FEATURES
    w = load_rows(W, 0, D, features, dims, D, real)
    if HAS_LOW:
        w_low = load_rows(W_LOW, 0, D, features, dims, D, real)
    context_grad = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    normaliser_grad = tl.zeros([BLOCK_M], dtype=tl.float32)
    sums = tl.zeros([BLOCK_DV], dtype=tl.float32)
    denominators = tl.zeros([BLOCK_N], dtype=tl.float32)
    span = tl.cdiv(length, splits)
    stop = tl.minimum(part * span + span, length)
    for start in range(part * span, stop, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        keep = positions < stop
        q = load_rows(Q, batch * q_batch + head * q_head, q_row, positions, dims, D, keep)
        base = (batch * length * heads + head) * DV
        numerator, denominator = joined_gradient(
            GRAD, OUT, DENOMINATOR, base, heads * DV, row * length, positions, widths, DV, keep
        )
        logs = tl.dot(w, tl.trans(q), input_precision=PRECISION)
        if HAS_LOW:
            logs = tl.dot(w_low, tl.trans(q), acc=logs, input_precision=PRECISION)
        maximum = tl.load(MAXIMUM + row * length + positions, mask=keep, other=0.0)
        exponentials = tl.exp2(logs - (maximum + half_square(q, scale))[None, :])
        context_grad = tl.dot(
            exponentials.to(q.dtype), numerator.to(q.dtype), acc=context_grad, input_precision=PRECISION
        )
        normaliser_grad += tl.sum(exponentials * denominator[None, :], 1)
        sums += tl.sum(numerator, 0)
        denominators += denominator
    out = (row * splits + part) * FEATURES + features
    tl.store(
        CONTEXT_GRAD + out[:, None] * DV + widths[None, :],
        context_grad,
        mask=real[:, None] & (widths < DV)[None, :],
    )
    tl.store(NORMALISER_GRAD + out, normaliser_grad, mask=real)
    if tile == 0:
        at = (row * splits + part) * (DV + 1)
        tl.store(SUMS + at + widths, sums, mask=widths < DV)
        tl.store(SUMS + at + DV, tl.sum(denominators, 0))


@triton.jit
def query_gradient_kernel(
    Q,
    GRAD,
    OUT,
    W,
    W_LOW,
    CONTEXT,
    NORMALISER,
    MAXIMUM,
    DENOMINATOR,
    Q_GRAD,
    q_batch,
    q_head,
    q_row,
    heads,
    length,
    scale,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of queries."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keep = positions < length
    q = load_rows(Q, batch * q_batch + head * q_head, q_row, positions, dims, D, keep)
    base = (batch * length * heads + head) * DV
    numerator, denominator = joined_gradient(
        GRAD, OUT, DENOMINATOR, base, heads * DV, row * length, positions, widths, DV, keep
    )
    shift = tl.load(MAXIMUM + row * length + positions, mask=keep, other=0.0) + half_square(q, scale)
    q_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, FEATURES, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        real = features < FEATURES
        w, logs = row_logarithms(q, W, W_LOW, features, dims, D, real, HAS_LOW, PRECISION)
        context = load_rows(CONTEXT, row * FEATURES * DV, DV, features, widths, DV, real)
        normaliser = tl.load(NORMALISER + row * FEATURES + features, mask=real, other=0.0)
        grad = tl.dot(numerator.to(q.dtype), tl.trans(context), input_precision=PRECISION)
        grad = (grad + denominator[:, None] * normaliser[None, :]) * tl.exp2(logs - shift[:, None])
        grad = tl.where(real[None, :], grad, 0.0)
        row_sum += tl.sum(grad, 1)
        q_grad = tl.dot(grad.to(w.dtype), w, acc=q_grad, input_precision=PRECISION)
    # w carries d^(-1/4) log2(e), scale carries log2(e) / (2 sqrt(d)): both lose the change of base here
    q_grad = (q_grad - q.to(tl.float32) * row_sum[:, None] * (2 * scale)) * 0.6931471805599453
    at = (batch * length + positions) * heads + head
    tl.store(
        Q_GRAD + at[:, None] * D + dims[None, :],
        q_grad.to(Q_GRAD.dtype.element_ty),
        mask=keep[:, None] & (dims < D)[None, :],
    )


@triton.jit
def key_gradient_kernel(
    K,
    V,
    MASK,
    W,
    W_LOW,
    MAXIMUM,
    CONTEXT_GRAD,
    NORMALISER_GRAD,
    SUMS,
    K_GRAD,
    V_GRAD,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    length,
    scale,
    epsilon,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of keys and values; zero where masked."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = positions < length
    keep = inside
    if HAS_MASK:
        keep = keep & (tl.load(MASK + batch * length + positions, mask=inside, other=0) != 0)
    k = load_rows(K, batch * k_batch + head * k_head, k_row, positions, dims, D, keep)
    v = load_rows(V, batch * v_batch + head * v_head, v_row, positions, widths, DV, keep)
    shift = tl.load(MAXIMUM + batch) + half_square(k, scale)
    k_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    v_grad = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, FEATURES, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        real = features < FEATURES
        w, logs = row_logarithms(k, W, W_LOW, features, dims, D, real, HAS_LOW, PRECISION)
        exponentials = tl.exp2(logs - shift[:, None])
        exponentials = tl.where(keep[:, None] & real[None, :], exponentials, 0.0)
        context_grad = load_rows(CONTEXT_GRAD, row * FEATURES * DV, DV, features, widths, DV, real)
        normaliser_grad = tl.load(NORMALISER_GRAD + row * FEATURES + features, mask=real, other=0.0)
        v_grad = tl.dot(
            exponentials.to(context_grad.dtype), context_grad, acc=v_grad, input_precision=PRECISION
        )
        grad = tl.dot(v, tl.trans(context_grad), input_precision=PRECISION)
        grad = (grad + normaliser_grad[None, :]) * exponentials
        row_sum += tl.sum(grad, 1)
        k_grad = tl.dot(grad.to(w.dtype), w, acc=k_grad, input_precision=PRECISION)
    k_grad = (k_grad - k.to(tl.float32) * row_sum[:, None] * (2 * scale)) * 0.6931471805599453
    sums = tl.load(SUMS + row * DV + widths, mask=widths < DV, other=0.0)
    v_grad = tl.where(keep[:, None], v_grad + epsilon * sums[None, :], 0.0)
    at = (batch * length + positions) * heads + head
    tl.store(
        K_GRAD + at[:, None] * D + dims[None, :],
        k_grad.to(K_GRAD.dtype.element_ty),
        mask=inside[:, None] & (dims < D)[None, :],
    )
    tl.store(
        V_GRAD + at[:, None] * DV + widths[None, :],
        v_grad.to(V_GRAD.dtype.element_ty),
        mask=inside[:, None] & (widths < DV)[None, :],
    )
