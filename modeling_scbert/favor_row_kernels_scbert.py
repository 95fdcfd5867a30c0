"""Triton kernels of FAVOR+ attention that give one row per position, see favor_table_kernels_scbert.py."""

import triton
import triton.language as tl

from .favor_table_kernels_scbert import half_square, load_features, load_kept, load_rows, part_of, store_rows


@triton.jit
def load_total(
    start, row, FEATURES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A row's sum over features, which `table_kernel` leaves tile by tile."""
    TILES: tl.constexpr = (FEATURES + BLOCK_M - 1) // BLOCK_M
    total = tl.zeros([BLOCK], tl.float32)
    columns = tl.arange(0, BLOCK)
    for tile in tl.static_range(TILES):
        total += tl.load(start + (row * TILES + tile) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    return total


@triton.jit(do_not_specialize=["heads", "length", "parts"])
def apply_kernel(
    X,
    x_strides,
    Y,
    y_strides,
    KEEP,
    KEY_MAX,
    W,
    TABLE,
    COLUMN,
    TOTALS,
    COLUMN_TOTALS,
    MEAN,
    OUT,
    out_strides,
    CENTRED,
    SHIFT,
    INVERSE,
    ROW_SUM,
    heads,
    length,
    parts,
    unit,
    scale,
    epsilon,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILES: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    CENTRED_ONLY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Sums over the features of one part of the positions.

    Of queries: the output, with and without the mean of the values, and for the backward the shift that makes features
    those over the normaliser, and the inverse of the latter. Of keys: the values' gradient, and for the keys' the sum
    over features of what `gradient_kernel` takes together.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cell, head = row // heads, row % heads
    X += cell * x_strides[0] + head * x_strides[1]
    OUT += cell * out_strides[0] + head * out_strides[1]
    TABLE += row * FEATURES * DV
    COLUMN += row * FEATURES * 16
    widths = tl.arange(0, BLOCK_DV)
    ws = ()
    tables = ()
    columns = ()
    if RESIDENT:
        first = 0
        for i in tl.static_range(len(TILES)):
            rows = first + tl.arange(0, tl.constexpr(TILES[i]))
            ws += (load_features(W, first, TILES[i], FEATURES, D, BLOCK_D),)
            tables += (load_kept(TABLE, DV, rows, DV, BLOCK_DV, rows < FEATURES),)
            columns += (load_kept(COLUMN, 16, rows, 16, 16, rows < FEATURES),)
            first += TILES[i]
    # epsilon is a rank-one correction: the sums over features of the table
    total = epsilon * load_total(TOTALS, row, FEATURES, DV, BLOCK_DV, BLOCK_M)
    if KEYS:
        Y += cell * y_strides[0] + head * y_strides[1]
        key_max = tl.load(KEY_MAX + cell)
    else:
        CENTRED += (cell * length * heads + head) * DV
        column_total = epsilon * tl.sum(load_total(COLUMN_TOTALS, row, FEATURES, 1, 16, BLOCK_M), 0)
        mean = tl.load(MEAN + row * DV + widths, mask=widths < DV, other=0.0)
    begin, stop = part_of(length, part, parts, BLOCK_N)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        inside = positions < stop
        clamped = tl.minimum(positions, stop - 1)
        if HAS_MASK:
            used = tl.load(KEEP + cell * length + clamped) != 0
            x = load_kept(X, x_strides[2], clamped, D, BLOCK_D, used)
        else:
            x = load_rows(X, x_strides[2], clamped, D, BLOCK_D)
        square = half_square(x, scale)
        if KEYS:
            shift = square + key_max
            if HAS_MASK:
                shift = tl.where(used, shift, float("inf"))
        else:
            shift = tl.full([BLOCK_N], float("-inf"), tl.float32)
        out = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        column = tl.zeros([BLOCK_N], tl.float32)
        if RESIDENT:
            logs = ()
            for i in tl.static_range(len(TILES)):
                logs += (tl.dot(x, tl.trans(ws[i]), input_precision=PRECISION),)
                if not KEYS:
                    shift = tl.maximum(shift, tl.max(logs[i], 1) * unit)
            for i in tl.static_range(len(TILES)):
                features = tl.exp2(logs[i] * unit - shift[:, None]).to(x.dtype)
                out = tl.dot(features, tables[i], acc=out, input_precision=PRECISION)
                # a matrix product: as a row that every thread holds, the column would fill the registers
                column += tl.sum(tl.dot(features, columns[i], input_precision=PRECISION), 1)
        else:
            for first in tl.range(0, FEATURES, TILES[0], num_stages=STAGES):
                rows = first + tl.arange(0, tl.constexpr(TILES[0]))
                w = load_features(W, first, TILES[0], FEATURES, D, BLOCK_D)
                table = load_kept(TABLE, DV, rows, DV, BLOCK_DV, rows < FEATURES)
                pair = load_kept(COLUMN, 16, rows, 16, 16, rows < FEATURES)
                tile_logs = tl.dot(x, tl.trans(w), input_precision=PRECISION)
                if not KEYS:
                    higher = tl.maximum(shift, tl.max(tile_logs, 1) * unit)
                    rescale = tl.exp2(shift - higher)
                    out *= rescale[:, None]
                    column *= rescale
                    shift = higher
                features = tl.exp2(tile_logs * unit - shift[:, None]).to(x.dtype)
                out = tl.dot(features, table, acc=out, input_precision=PRECISION)
                column += tl.sum(features.to(tl.float32) * tl.sum(pair.to(tl.float32), 1)[None, :], 1)
        if KEYS:
            if HAS_MASK:
                y = load_kept(Y, y_strides[2], clamped, DV, BLOCK_DV, used)
                share = tl.where(used, 1.0, 0.0)[:, None] * total[None, :]
            else:
                y = load_rows(Y, y_strides[2], clamped, DV, BLOCK_DV)
                share = total[None, :]
            row_sum = column + tl.sum(out * y.to(tl.float32), 1)
            tl.store(ROW_SUM + row * length + positions, row_sum, mask=inside)
            store_rows(OUT, out_strides[2], positions, out + share, DV, BLOCK_DV, inside)
        else:
            factor = tl.exp2(-square)
            normaliser = column * factor + column_total
            # a cell without any key gets zeros
            normaliser = tl.where(normaliser == 0, 1.0, normaliser)
            inverse = 1.0 / normaliser
            out = out * (factor * inverse)[:, None] + total[None, :] * inverse[:, None]
            store_rows(CENTRED, heads * DV, positions, out, DV, BLOCK_DV, inside)
            if not CENTRED_ONLY:
                store_rows(OUT, out_strides[2], positions, out + mean[None, :], DV, BLOCK_DV, inside)
            tl.store(SHIFT + row * length + positions, shift + square + tl.log2(normaliser), mask=inside)
            tl.store(INVERSE + row * length + positions, inverse, mask=inside)


@triton.jit
def gradient_step(x_grad, x, y, weight, shift, unit, w, table, column, PRECISION: tl.constexpr):
    """The gradient of x with a tile of features' share."""
    logs = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    features = tl.exp2(logs * unit - shift[:, None])
    grad = tl.dot(y, tl.trans(table), input_precision=PRECISION)
    grad = tl.dot(weight, tl.trans(column), acc=grad, input_precision=PRECISION) * features
    return tl.dot(grad.to(w.dtype), w, acc=x_grad, input_precision=PRECISION)


@triton.jit(do_not_specialize=["heads", "length", "parts"])
def gradient_kernel(
    X,
    x_strides,
    Y,
    y_strides,
    KEEP,
    KEY_MAX,
    SHIFT,
    INVERSE,
    CENTRED,
    WEIGHT,
    ROW_SUM,
    W,
    TABLE,
    COLUMN,
    TOTALS,
    COLUMN_TOTALS,
    X_GRAD,
    grad_strides,
    heads,
    length,
    parts,
    unit,
    scale,
    epsilon,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILES: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Gradient of one part of the positions: of queries x, with the output's gradient as y, or of keys x and values y.

    Of queries it also writes the normaliser's gradient, as WEIGHT.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cell, head = row // heads, row % heads
    X += cell * x_strides[0] + head * x_strides[1]
    Y += cell * y_strides[0] + head * y_strides[1]
    X_GRAD += cell * grad_strides[0] + head * grad_strides[1]
    TABLE += row * FEATURES * DV
    COLUMN += row * FEATURES * 16
    ws = ()
    tables = ()
    columns = ()
    if RESIDENT:
        first = 0
        for i in tl.static_range(len(TILES)):
            rows = first + tl.arange(0, tl.constexpr(TILES[i]))
            ws += (load_features(W, first, TILES[i], FEATURES, D, BLOCK_D),)
            tables += (load_kept(TABLE, DV, rows, DV, BLOCK_DV, rows < FEATURES),)
            columns += (load_kept(COLUMN, 16, rows, 16, 16, rows < FEATURES),)
            first += TILES[i]
    if KEYS:
        key_max = tl.load(KEY_MAX + cell)
    else:
        CENTRED += (cell * length * heads + head) * DV
        total = epsilon * load_total(TOTALS, row, FEATURES, DV, BLOCK_DV, BLOCK_M)
        column_total = epsilon * tl.sum(load_total(COLUMN_TOTALS, row, FEATURES, 1, 16, BLOCK_M), 0)
    begin, stop = part_of(length, part, parts, BLOCK_N)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        inside = positions < stop
        clamped = tl.minimum(positions, stop - 1)
        if HAS_MASK:
            used = tl.load(KEEP + cell * length + clamped) != 0
            x = load_kept(X, x_strides[2], clamped, D, BLOCK_D, used)
            y = load_kept(Y, y_strides[2], clamped, DV, BLOCK_DV, used)
        else:
            x = load_rows(X, x_strides[2], clamped, D, BLOCK_D)
            y = load_rows(Y, y_strides[2], clamped, DV, BLOCK_DV)
        if KEYS:
            shift = half_square(x, scale) + key_max
            if HAS_MASK:
                shift = tl.where(used, shift, float("inf"))
            row_sum = tl.load(ROW_SUM + row * length + clamped)
            weight = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(y.dtype)
        else:
            shift = tl.load(SHIFT + row * length + clamped)
            inverse = tl.load(INVERSE + row * length + clamped)
            centred = load_rows(CENTRED, heads * DV, clamped, DV, BLOCK_DV)
            grad = y.to(tl.float32)
            normaliser_grad = -tl.sum(centred.to(tl.float32) * grad, 1)
            tl.store(WEIGHT + row * length + positions, normaliser_grad, mask=inside)
            # but for epsilon, what the features' gradients add up to is nothing
            row_sum = -inverse * (tl.sum(grad * total[None, :], 1) + normaliser_grad * column_total)
            weight = tl.broadcast_to(normaliser_grad[:, None], [BLOCK_N, 16]).to(y.dtype)
        x_grad = x.to(tl.float32) * (row_sum * (-2 * scale / unit))[:, None]
        if RESIDENT:
            for i in tl.static_range(len(TILES)):
                x_grad = gradient_step(
                    x_grad, x, y, weight, shift, unit, ws[i], tables[i], columns[i], PRECISION
                )
        else:
            for first in tl.range(0, FEATURES, TILES[0], num_stages=STAGES):
                rows = first + tl.arange(0, tl.constexpr(TILES[0]))
                w = load_features(W, first, TILES[0], FEATURES, D, BLOCK_D)
                table = load_kept(TABLE, DV, rows, DV, BLOCK_DV, rows < FEATURES)
                pair = load_kept(COLUMN, 16, rows, 16, 16, rows < FEATURES)
                x_grad = gradient_step(x_grad, x, y, weight, shift, unit, w, table, pair, PRECISION)
        # the change of base ends here
        store_rows(
            X_GRAD, grad_strides[2], positions, x_grad * (unit * 0.6931471805599453), D, BLOCK_D, inside
        )
