"""
Triton kernels of FAVOR+ attention: key pass and query pass. favor_triton_scbert.py launches them; their backward is in
favor_gradient_kernels_scbert.py.

The random features of a tile live in registers only. Logarithms are to base 2 with log2(e) folded into the projection
``W [m, d]``; in half precision the projection is the sum of two halves (``W + W_LOW``), so that only q and k carry
their own rounding. Passes that sum over positions keep features in rows, [features, positions], and split the positions
over programs; passes that give one row per position loop over tiles of features. 266 features are five tiles of 64.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    # never called then: the definitions below only have to be readable
    from types import SimpleNamespace

    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)


@triton.jit
def load_rows(start, base, row_stride, rows, columns, width: tl.constexpr, keep):
    """[rows, columns] of a matrix whose columns are contiguous; zero where a row is not kept."""
    return tl.load(
        start + base + rows[:, None] * row_stride + columns[None, :],
        mask=keep[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def half_square(x, scale):
    """|x'|^2 / 2 to base 2, [rows]."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1) * scale


@triton.jit
def row_logarithms(
    x, W, W_LOW, features, dims, D: tl.constexpr, real, HAS_LOW: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of the projection, and log2 of its features of x before the stabiliser, [rows, features]."""
    w = load_rows(W, 0, D, features, dims, D, real)
    logs = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    if HAS_LOW:
        w_low = load_rows(W_LOW, 0, D, features, dims, D, real)
        logs = tl.dot(x, tl.trans(w_low), acc=logs, input_precision=PRECISION)
    return w, logs


@triton.jit
def key_kernel(
    K,
    V,
    MASK,
    W,
    W_LOW,
    CONTEXT,
    NORMALISER,
    MAXIMUM,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
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
    HAS_MASK: tl.constexpr,
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sum_j exp2(log phi_k(j) - maximum) [v_j, 1] of a tile of features over one part of the positions."""
    tile, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, head = row // heads, row % heads
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = features < FEATURES
    w = load_rows(W, 0, D, features, dims, D, real)
    if HAS_LOW:
        w_low = load_rows(W_LOW, 0, D, features, dims, D, real)
    context = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    normaliser = tl.zeros([BLOCK_M], dtype=tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    span = tl.cdiv(length, splits)
    stop = tl.minimum(part * span + span, length)
    for start in range(part * span, stop, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        keep = positions < stop
        if HAS_MASK:
            keep = keep & (tl.load(MASK + batch * length + positions, mask=keep, other=0) != 0)
        k = load_rows(K, batch * k_batch + head * k_head, k_row, positions, dims, D, keep)
        v = load_rows(V, batch * v_batch + head * v_head, v_row, positions, widths, DV, keep)
        logs = tl.dot(w, tl.trans(k), input_precision=PRECISION)
        if HAS_LOW:
            logs = tl.dot(w_low, tl.trans(k), acc=logs, input_precision=PRECISION)
        logs = tl.where(keep[None, :], logs, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logs, 1))
        # no key seen yet: any finite shift does
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(maximum - shift)
        exponentials = tl.exp2(logs - shift[:, None] - half_square(k, scale)[None, :])
        context = context * rescale[:, None]
        context = tl.dot(exponentials.to(v.dtype), v, acc=context, input_precision=PRECISION)
        normaliser = normaliser * rescale + tl.sum(exponentials, 1)
        maximum = higher
    out = (row * splits + part) * FEATURES + features
    tl.store(
        CONTEXT + out[:, None] * DV + widths[None, :], context, mask=real[:, None] & (widths < DV)[None, :]
    )
    tl.store(NORMALISER + out, normaliser, mask=real)
    tl.store(MAXIMUM + out, maximum, mask=real)


@triton.jit
def query_kernel(
    Q,
    W,
    W_LOW,
    CONTEXT,
    NORMALISER,
    SUMS,
    OUT,
    MAXIMUM,
    DENOMINATOR,
    q_batch,
    q_head,
    q_row,
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
    HAS_LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, stabiliser and denominator of a block of queries; the row maximum runs over the tiles of features."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    positions = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims, widths = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keep = positions < length
    q = load_rows(Q, batch * q_batch + head * q_head, q_row, positions, dims, D, keep)
    out = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    denominator = tl.zeros([BLOCK_N], dtype=tl.float32)
    maximum = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    for first in range(0, FEATURES, BLOCK_M):
        features = first + tl.arange(0, BLOCK_M)
        real = features < FEATURES
        _, logs = row_logarithms(q, W, W_LOW, features, dims, D, real, HAS_LOW, PRECISION)
        logs = tl.where(real[None, :], logs, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logs, 1))
        rescale = tl.exp2(maximum - higher)
        exponentials = tl.exp2(logs - higher[:, None])
        context = load_rows(CONTEXT, row * FEATURES * DV, DV, features, widths, DV, real)
        normaliser = tl.load(NORMALISER + row * FEATURES + features, mask=real, other=0.0)
        out = out * rescale[:, None]
        out = tl.dot(exponentials.to(context.dtype), context, acc=out, input_precision=PRECISION)
        denominator = denominator * rescale + tl.sum(exponentials * normaliser[None, :], 1)
        maximum = higher
    # epsilon is a rank-one correction: the sums over features of context and normaliser
    sums = tl.load(SUMS + row * (DV + 1) + widths, mask=widths < DV, other=0.0)
    factor = tl.exp2(-half_square(q, scale))
    denominator = denominator * factor + epsilon * tl.load(SUMS + row * (DV + 1) + DV)
    denominator = tl.where(denominator == 0, 1.0, denominator)
    out = (out * factor[:, None] + epsilon * sums[None, :]) / denominator[:, None]
    at = (batch * length + positions) * heads + head
    tl.store(
        OUT + at[:, None] * DV + widths[None, :],
        out.to(OUT.dtype.element_ty),
        mask=keep[:, None] & (widths < DV)[None, :],
    )
    tl.store(MAXIMUM + row * length + positions, maximum, mask=keep)
    tl.store(DENOMINATOR + row * length + positions, denominator, mask=keep)
