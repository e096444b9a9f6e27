"""Tiles by shape: performance-only, so any choice is right. The numbers were measured on an H100."""

from __future__ import annotations

import jax.numpy as jnp

from tbik_jax.kernels.matmul.hopper import spill
from tbik_jax.kernels.matmul.hopper.large import ROWS, Problem, Tiles, out_width
from tbik_jax.kernels.matmul.hopper.small import SmallTiles, Tile

#: Shared memory of a block, less what the barriers take, in the two kernels.
_SHARED, _SHARED_LARGE = 232_448 - 6 * 1024, 232_448 - 3 * 1024
#: Rows up to which the weight is what counts.
SMALL_ROWS = 128


def large_tiles(problem: Problem, blocks: int) -> Tiles:
    """The width whose last wave wastes least.

    A tile of c columns takes the time of c + 27: its rows are loaded for however few columns.
    """
    adds = problem.program.storages > 0
    widths = (208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32) if adds else (256, 224, *range(208, 31, -16))
    if not problem.b.k_major:  # TMA then wants whole swizzled rows of columns
        widths = tuple(columns for columns in widths if columns % 64 == 0)
    rows = -(-problem.m // (2 * ROWS)) * problem.batch

    def cost(columns: int) -> float:
        tiles = rows * -(-problem.n // columns)
        return -(-tiles // blocks) * (columns + 27)

    if problem.program.storages > 2 and problem.k < 1024:
        widths = tuple(columns for columns in widths if columns <= 160)
    fits = [tiles for tiles in (_with_stages(problem, columns) for columns in widths) if tiles is not None]
    return min(fits, key=lambda tiles: cost(tiles.columns))


def _with_stages(problem: Problem, columns: int) -> Tiles | None:
    """As many stages as help; where the sums that wait are kept is what was faster on an H100 (docs/hopper.md)."""
    waits, rows = max(0, problem.program.storages - 1), -(-problem.m // (2 * ROWS))
    # Narrow pieces leave room: for two at once of a tile without sums that wait, for the sums elsewhere.
    out_bytes, out_slots = (32, 1) if waits and columns % 64 else (64, 2) if columns >= 224 else (128, 1)
    if waits == 0 and problem.program.leaves > 1 and columns % 64:
        out_slots = 2
    out = 2 * ROWS * out_slots * out_width(columns, problem.n, problem.out_dtype, out_bytes)
    out *= jnp.dtype(problem.out_dtype).itemsize
    stage = (2 * ROWS + columns) * 64 * 2
    stages = min(4 if columns > 128 else 6, (_SHARED_LARGE - out) // stage)
    if stages < 2:
        return None
    leaving = {"out_bytes": out_bytes, "out_slots": out_slots}
    if waits == 0:
        # One warpgroup adds a leaf while the other multiplies. Short leaves of narrow tiles gain nothing.
        turns = problem.program.leaves > 1 and (columns > 128 or problem.k >= 1024)
        return Tiles(columns, stages, turns=turns, **leaving)
    # Four stages, then as much of the sums as fits. The rest waits in device memory; two blocks then share the columns that
    # they read, which keeps them together in the L2 cache.
    stages = min(4, stages)
    access = 2 * 4 * spill.WORDS
    near = min(waits * spill.accesses(ROWS, columns), (_SHARED_LARGE - out - stages * stage) // access)
    pairs = rows % 2 == 0 and columns > 160
    return Tiles(columns, stages, near=near, cluster=2 if pairs else 1, turns=not pairs, **leaving)


def small_tiles(problem: Problem, blocks: int) -> SmallTiles | None:
    """Blocks for one wave at most, with all of shared memory; several per multiprocessor where there are more.

    None where `large` does better, or nothing fits: many leaves of many rows.
    """
    leaves = problem.program.leaves
    if problem.m > 64 and leaves > 1:
        return None  # the sums of so many rows are better in the registers of the other kernel
    swapped, straight = ((True, 64),), ((False, 64), (False, 32), (False, 16))
    if leaves > 1 or problem.m <= 32:
        forms: tuple[tuple[bool, int], ...] = swapped
    else:  # of many rows the results of swapped operands leave in too small pieces
        forms = straight if problem.m >= 64 else swapped + straight
    best = None
    for swap, columns in forms:
        across = -(-problem.n // columns)
        split = max(s for s in (1, 2, 4, 8) if leaves % s == 0 and (s == 1 or across * s <= blocks))
        tile = Tile(problem.m, columns, swap)
        waiting = (leaves // split) * tile.words * 4
        resident = min(2, max(1, -(-across * split // blocks)))
        room = _SHARED // resident - waiting
        depth = 256 if problem.m <= 32 and resident == 1 else 128 if problem.m <= 32 else 64
        stage = (columns + (tile.tokens if swap else ROWS * tile.left_tiles)) * depth * 2
        stages = min(16, room // stage)
        if stages < 2:
            continue
        # Every block reads its rows: what enters a multiprocessor bounds it.
        enters = -(-across * split // blocks) * (columns + tile.tokens)
        if best is None or enters < best[0]:
            best = enters, SmallTiles(columns, swap, depth, stages, split)
    return best[1] if best else None
