"""
Triton kernels of FAVOR+ attention, forward and backward; favor_triton_scbert.py launches them.

With the features ``F(x)_m = exp2(unit w_m . x - shift)`` of a position, everything is made of three sums:

- `sum_kernel`, over positions: a table ``sum_i F(x_i)_m [y_i, u_i]``, of keys and values the context, of queries and
  the output's gradient the context's gradient;
- `apply_kernel` of favor_row_kernels_scbert.py, over features: ``sum_m F(x_i)_m [c_m, n_m]``, of queries the output, of
  keys the values' gradient;
- `gradient_kernel` there: the gradient of ``sum_m F(x_i)_m (y_i . c_m + u_i n_m)`` by x, of queries and of keys.

Logarithms are to base 2: ``unit = d^(-1/4) log2(e)``, and |x'|^2 / 2 is ``scale |x|^2``. The features of a block of
positions live in registers only, in tiles of powers of two: 266 are 256 + 16. The column n of a table stands in the
first of 16 columns of a matrix of its own, in half precision as the sum of the first two, so that matrix products can
take it.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(start, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix whose columns are contiguous; zero beyond its width."""
    columns = tl.arange(0, BLOCK)
    pointers = start + rows[:, None] * stride + columns[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_kept(start, stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, keep, first=0):
    """The same from a first column on, and zero where a row is not kept."""
    columns = first + tl.arange(0, BLOCK)
    pointers = start + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=keep[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(start, stride, rows, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, keep, first=0):
    """Write the rows that are kept, from a first column on."""
    columns = first + tl.arange(0, BLOCK)
    pointers = start + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, values.to(start.dtype.element_ty), mask=keep[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_features(
    W, first, SIZE: tl.constexpr, FEATURES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A tile of the projection; rows beyond the last feature repeat it, which moves no maximum."""
    return load_rows(W, D, tl.minimum(first + tl.arange(0, SIZE), FEATURES - 1), D, BLOCK_D)


@triton.jit
def half_square(x, scale):
    """|x'|^2 / 2 to base 2, [rows]."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1) * scale


@triton.jit
def halves(column, dtype: tl.constexpr):
    """A column as the sum of the first two of 16, so that a matrix product in half precision takes it exactly."""
    high = column.to(dtype).to(tl.float32)
    place = tl.arange(0, 16)[None, :]
    return tl.where(place == 0, high[:, None], tl.where(place == 1, (column - high)[:, None], 0.0)).to(dtype)


@triton.jit
def part_of(length, part, parts, BLOCK_N: tl.constexpr):
    """First position and end of a part of a sequence, in whole blocks."""
    span = tl.cdiv(tl.cdiv(length, BLOCK_N), parts) * BLOCK_N
    return part * span, tl.minimum(part * span + span, length)


@triton.jit(do_not_specialize=["heads", "length", "parts"])
def sum_kernel(
    X,
    x_strides,
    Y,
    y_strides,
    KEEP,
    SHIFT,
    WEIGHT,
    INVERSE,
    W,
    SUMS,
    COLUMNS,
    MAXIMA,
    BOUNDS,
    heads,
    length,
    parts,
    unit,
    scale,
    FEATURES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Sums over one part of the positions, for a group of features.

    The last row of a group is no feature: there F is one for keys, and the inverse of the normaliser for queries, so
    that its sums are those of values and counts, and what epsilon makes of the context's gradient.
    """
    group, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    cell, head = row // heads, row % heads
    X += cell * x_strides[0] + head * x_strides[1]
    Y += cell * y_strides[0] + head * y_strides[1]
    first = group * (GROUP - 1)
    ws = ()
    sums = ()
    columns = ()
    maxima = ()
    bound = 0.0
    local = 0
    for i in tl.static_range(len(TILES)):
        ws += (load_features(W, first + local, TILES[i], FEATURES, D, BLOCK_D),)
        sums += (tl.zeros([tl.constexpr(TILES[i]), BLOCK_DV], tl.float32),)
        columns += (tl.zeros([tl.constexpr(TILES[i]), 16], tl.float32),)
        maxima += (tl.full([tl.constexpr(TILES[i])], float("-inf"), tl.float32),)
        # w.x - |x|^2 / 2 <= |w|^2 / 2: one shift for all positions keeps the exponentials in range
        bound = tl.maximum(bound, tl.max(half_square(ws[i], unit * unit / (4 * scale)), 0) - 60.0)
        local += TILES[i]
    begin, stop = part_of(length, part, parts, BLOCK_N)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        keep = positions < stop
        # positions beyond the end repeat the last one, which moves no maximum
        positions = tl.minimum(positions, stop - 1)
        if HAS_MASK:
            used = tl.load(KEEP + cell * length + positions) != 0
            keep = keep & used
            x = load_kept(X, x_strides[2], positions, D, BLOCK_D, used)
            y = load_kept(Y, y_strides[2], positions, DV, BLOCK_DV, used)
        else:
            x = load_rows(X, x_strides[2], positions, D, BLOCK_D)
            y = load_rows(Y, y_strides[2], positions, DV, BLOCK_DV)
        if KEYS:
            shift = half_square(x, scale) + bound
            last = tl.full([BLOCK_N], 1.0, tl.float32)
            weight = last
        else:
            shift = tl.load(SHIFT + row * length + positions)
            last = tl.load(INVERSE + row * length + positions)
            weight = tl.load(WEIGHT + row * length + positions)
        shift = tl.where(keep, shift, float("inf"))
        last = tl.where(keep, last, 0.0)
        weights = halves(weight, y.dtype)
        new_sums = ()
        new_columns = ()
        new_maxima = ()
        for i in tl.static_range(len(TILES)):
            logs = tl.dot(ws[i], tl.trans(x), input_precision=PRECISION)
            features = tl.exp2(logs * unit - shift[None, :])
            if i == len(TILES) - 1:
                is_last = tl.arange(0, tl.constexpr(TILES[i])) == TILES[i] - 1
                features = tl.where(is_last[:, None], last[None, :], features)
            if KEYS:
                if HAS_MASK:
                    logs = tl.where(used[None, :], logs, float("-inf"))
                new_maxima += (tl.maximum(maxima[i], tl.max(logs, 1)),)
            else:
                new_maxima += (maxima[i],)
            # rounded alike for both sums, so that what all values share cancels in `table_kernel`
            features = features.to(y.dtype)
            new_columns += (tl.dot(features, weights, acc=columns[i], input_precision=PRECISION),)
            new_sums += (tl.dot(features, y, acc=sums[i], input_precision=PRECISION),)
        sums = new_sums
        columns = new_columns
        maxima = new_maxima
    at = (row * parts + part) * (FEATURES + 1)
    maximum = float("-inf")
    local = 0
    for i in tl.static_range(len(TILES)):
        rows = local + tl.arange(0, tl.constexpr(TILES[i]))
        is_last = rows == GROUP - 1
        wanted = tl.where(is_last, group == 0, first + rows < FEATURES)
        rows = tl.where(is_last, FEATURES, first + rows)
        store_rows(SUMS + at * DV, DV, rows, sums[i], DV, BLOCK_DV, wanted)
        tl.store(COLUMNS + at + rows, tl.sum(columns[i], 1), mask=wanted)
        if KEYS:
            maximum = tl.maximum(maximum, tl.max(maxima[i], 0))
        local += TILES[i]
    if KEYS:
        tl.store(MAXIMA + (row * parts + part) * tl.num_programs(0) + group, maximum * unit)
        if (part == 0) & (row == 0):
            tl.store(BOUNDS + group, bound)


@triton.jit(do_not_specialize=["heads", "parts", "maxima"])
def table_kernel(
    SUMS,
    COLUMNS,
    MAXIMA,
    BOUNDS,
    MEAN,
    TABLE,
    COLUMN,
    TOTALS,
    COLUMN_TOTALS,
    KEY_MAX,
    heads,
    parts,
    maxima,
    epsilon,
    FEATURES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
):
    """
    A tile of features of a table, from the parts that were summed apart.

    Values count from their mean. Attention weighs all keys nearly alike, so that what the values share is most of a row
    of the context; without it, half precision rounds what tells the rows apart.
    """
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = rows < FEATURES
    widths = tl.arange(0, BLOCK_DV)
    inside = widths < DV
    at = row * parts * (FEATURES + 1)
    table = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    column = tl.zeros([BLOCK_M], tl.float32)
    last = tl.zeros([BLOCK_DV], tl.float32)
    last_column = 0.0
    for _ in tl.range(0, parts):
        table += load_kept(SUMS + at * DV, DV, rows, DV, BLOCK_DV, real)
        column += tl.load(COLUMNS + at + rows, mask=real, other=0.0)
        last += tl.load(SUMS + (at + FEATURES) * DV + widths, mask=inside, other=0.0)
        last_column += tl.load(COLUMNS + at + FEATURES)
        at += FEATURES + 1
    if KEYS:
        # the stabiliser of keys is the maximum over all heads of a cell
        cell = row // heads
        highest = tl.full([128], float("-inf"), tl.float32)
        for start in tl.range(0, maxima, 128):
            places = start + tl.arange(0, 128)
            found = tl.load(MAXIMA + cell * maxima + places, mask=places < maxima, other=float("-inf"))
            highest = tl.maximum(highest, found)
        key_max = tl.max(highest, 0)
        # no key at all
        key_max = tl.where(key_max == float("-inf"), 0.0, key_max)
        if (row % heads == 0) & (tile == 0):
            tl.store(KEY_MAX + cell, key_max)
        bounds = tl.load(BOUNDS + rows // (GROUP - 1), mask=real, other=0.0)
        factor = tl.exp2(tl.minimum(bounds - key_max, 126.0))
        table *= factor[:, None]
        column *= factor
    if KEYS:
        mean = last / tl.maximum(last_column, 1.0)
        if tile == 0:
            tl.store(MEAN + row * DV + widths, mean, mask=inside)
        # epsilon adds to every row what all values share, which the mean takes away again
        table = table - column[:, None] * mean[None, :]
        column = tl.where(real, column + epsilon * last_column, 0.0)
    else:
        mean = tl.load(MEAN + row * DV + widths, mask=inside, other=0.0)
        table = tl.where(real[:, None], table + epsilon * last[None, :], 0.0)
        table = table.to(TABLE.dtype.element_ty).to(tl.float32)
        column = tl.where(real, column + epsilon * last_column, 0.0) - tl.sum(table * mean[None, :], 1)
    store_rows(TABLE + row * FEATURES * DV, DV, rows, table, DV, BLOCK_DV, real)
    store_rows(COLUMN + row * FEATURES * 16, 16, rows, halves(column, COLUMN.dtype.element_ty), 16, 16, real)
    at = row * tl.num_programs(0) + tile
    tl.store(TOTALS + at * DV + widths, tl.sum(table, 0), mask=inside)
    tl.store(COLUMN_TOTALS + at, tl.sum(column, 0))
