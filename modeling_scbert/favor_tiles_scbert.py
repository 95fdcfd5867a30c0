"""
How the Triton kernels of FAVOR+ are cut: features and positions of a tile, by GPU, dtype and head size.

Chosen from what the compiler makes of the kernels (registers, spills, shared memory; tests/modeling_scbert/
test_favor_compiled.py keeps them within bounds), not from timings. Hopper keeps projection and table of half precision
at hand for all the positions a program goes over; elsewhere, and where they do not fit, tiles of them are fetched anew.
"""

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut."""

    # powers of two
    features: tuple[int, ...]
    # of a block
    positions: int
    # of a program, and of its pipelines
    warps: int
    stages: int
    # whether the tiles stand side by side, all of them; else they are fetched one after another, all of the size of the
    # first; sums over positions always hold theirs
    resident: bool = False


# widths of heads up to which the first of a pair of rows below serves; wider ones are cut smaller
NARROW = 64
# by half precision and narrow heads: tiles of the sums over positions, tiles of the kernels that give rows
GENERAL = {
    (True, True): (Tiles((128, 16), 64, 8, 2), Tiles((64,), 128, 8, 2)),
    (True, False): (Tiles((64,), 64, 8, 2), Tiles((32,), 64, 8, 2)),
    (False, True): (Tiles((32,), 32, 4, 2), Tiles((32,), 32, 4, 2)),
    (False, False): (Tiles((32,), 32, 4, 2), Tiles((16,), 16, 4, 1)),
}
HOPPER = GENERAL | {
    (True, True): (Tiles((256, 16), 64, 8, 2), Tiles((128, 128, 16), 64, 4, 2, resident=True)),
    # its matrix instruction takes 64 rows at least
    (False, True): (GENERAL[False, True][0], Tiles((32,), 64, 4, 2)),
}


def choose_tiles(capability: tuple[int, int], half: bool, width: int, features: int) -> tuple[Tiles, Tiles]:
    """
    Tiles for `sum_kernel`, and for `apply_kernel` and `gradient_kernel`, on a GPU of a capability.

    Products are of bfloat16 (``half``) or of float32; the width is the larger one of a head's keys and values.

    Examples
    --------
    >>> sums, rows = choose_tiles((9, 0), True, 64, 266)
    >>> sums.features, rows.features
    ((256, 16), (128, 128, 16))
    """
    table = HOPPER if capability[0] == 9 else GENERAL
    sums, rows = table[half, width <= NARROW]
    if rows.resident and features > sum(rows.features):
        # more would fill registers and shared memory
        rows = GENERAL[half, width <= NARROW][1]
    # a group of the sums has a row that is no feature
    return _fitted(sums, features + 1), _fitted(rows, features) if rows.resident else rows


def _fitted(tiles: Tiles, rows: int) -> Tiles:
    """The same with no more tiles than so many rows need."""
    if rows >= sum(tiles.features):
        return tiles
    return replace(tiles, features=powers_of_two(rows, tiles.features[0]))


@functools.cache
def powers_of_two(n: int, largest: int) -> tuple[int, ...]:
    """Powers of two of at least 16 that hold n rows or columns."""
    found, left = [], -(-n // 16) * 16
    while left:
        found.append(min(largest, 1 << (left.bit_length() - 1)))
        left -= found[-1]
    return tuple(found)
