"""Tiles by shape: performance-only, so any choice is right. The numbers were measured on an H100, and again on an H200."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from tbik_jax.kernels.matmul.hopper import settling
from tbik_jax.kernels.matmul.hopper.large import DEPTH, ROWS, Problem, Tiles, out_width
from tbik_jax.kernels.matmul.hopper.small import SmallTiles, Tile

#: Shared memory of a multiprocessor, and what the system and the barriers of a block take of it.
_SHARED, _TAKEN = 233_472, 2 * 1024
#: Columns of a tile whose accumulator leaves registers for two sums that wait.
_WIDEST_OF_TWO = 128
#: Steps of a leaf from which on it pays to store a sum that waits during the next leaf's: it delays them.
_STEPS_TO_STORE = 16
#: Rows up to which the weight is what counts.
SMALL_ROWS = 128


def large_tiles(problem: Problem, blocks: int) -> Tiles:
    """The width whose last wave wastes least.

    A step of a tile of c columns takes the time of c + 27: its rows are loaded for however few columns. Results that leave in
    rows of 32 bytes, since nothing wider divides them, take that of 23 for each such piece, unless the leaf has a step for it.
    """
    program = problem.program
    # What waits in registers, a sum or an f32 result that leaves, takes as many as the accumulator; bf16 takes half.
    holds = program.storages > 0 or jnp.dtype(problem.out_dtype).itemsize > 2
    widths = (208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32) if holds else (256, 224, *range(208, 31, -16))
    parts = len(problem.factors)  # of a tile, side by side
    if parts > 1:
        widths = tuple(columns for columns in widths if columns % (64 * parts) == 0)
    if not problem.b.k_major:  # TMA then wants whole swizzled rows of columns
        widths = tuple(columns for columns in widths if columns % 64 == 0)
    if program.storages > 1 and problem.k < 1024:  # sums move so often that they belong in registers
        widths = tuple(columns for columns in widths if columns <= _WIDEST_OF_TWO)
    rows = -(-problem.m // (2 * ROWS)) * problem.batch

    item = jnp.dtype(problem.out_dtype).itemsize
    steps = -(-problem.k // DEPTH)  # of a leaf

    def cost(columns: int) -> float:
        tiles = rows * -(-problem.n // (columns // parts))
        width = out_width(columns // parts, problem.n, problem.out_dtype)
        pieces = columns // parts // width
        leave = 23 * pieces if width * item <= 32 and pieces > steps else 0
        return -(-tiles // blocks) * (steps * program.leaves * (columns + 27) + leave)

    fits = [tiles for tiles in (_with_stages(problem, columns) for columns in widths) if tiles is not None]
    return min(fits, key=lambda tiles: cost(tiles.columns))


def _with_stages(problem: Problem, columns: int) -> Tiles | None:
    """As many stages as help; where the sums that wait are kept is what was faster on an H100 (docs/hopper.md)."""
    program = problem.program
    sums = 2 if program.storages > 1 and columns <= _WIDEST_OF_TWO else 1
    waits, rows = max(0, program.storages - sums), -(-problem.m // (2 * ROWS))
    few = problem.m <= SMALL_ROWS  # the weight then comes from device memory, and what is on its way counts
    # Pieces as narrow as the steps of a leaf have time for: they delay a step less. With two sums in registers and all of
    # shared memory for the ring, wider ones did better.
    item = jnp.dtype(problem.out_dtype).itemsize
    out_bytes = (64 if sums == 2 and not waits else 32) * item
    out = 2 * ROWS * out_width(columns // len(problem.factors), problem.n, problem.out_dtype, out_bytes) * item
    stage = (2 * ROWS + columns) * 64 * 2
    if few or (columns <= 96 and not waits):
        most = 8
    elif columns > 128:
        most = 4
    else:
        most = 5 if waits else 6
    stages = min(most, (_SHARED - 2 * _TAKEN - out) // stage)
    if stages < 2:
        return None
    # What remains is for the sums; the others wait in device memory. Two blocks then share the columns that they read, which
    # keeps them together in the L2 cache.
    near = min(
        waits * settling.accesses(ROWS, columns), (_SHARED - 2 * _TAKEN - out - stages * stage) // (8 * settling.WORDS)
    )
    if few:
        pairs = problem.k * program.leaves >= 16384
    else:  # also where few rows meet many columns, which then come from device memory
        pairs = rows % 2 == 0 and columns > 160 and (waits > 1 or (rows <= 8 and problem.n > 16384))
    # One warpgroup adds a leaf, or gates, while the other multiplies.
    turns = problem.up is not None or (program.leaves > 1 and not few)
    return Tiles(
        columns,
        stages,
        2 if pairs else 1,
        sums=sums,
        near=near,
        out_bytes=out_bytes,
        turns=turns,
        end_pairs=turns and program.leaves > 1,
        late_sums=waits > 0 and -(-problem.k // DEPTH) >= _STEPS_TO_STORE,
    )


def small_tiles(problem: Problem, blocks: int) -> SmallTiles | None:
    """Blocks for one wave, with all of shared memory; several per multiprocessor where there are more.

    None where `large` does better, or nothing fits: many rows of many leaves, or of many columns.
    """
    leaves, m = problem.program.leaves, problem.m
    if m > 64 and leaves <= 4:
        # What enters a multiprocessor counts: two blocks of 64 rows, if all run at once.
        columns = next((c for c in (16, 24, 32, 48, 64, 80, 96) if 2 * -(-problem.n // c) <= blocks), None)
        if columns is not None:
            return _ring(problem, SmallTiles(columns, False, 128, rows=64))
    # The weight on the right: narrow blocks, as many as there are multiprocessors. Rows that are not there take room only.
    columns = next((c for c in (8, 16, 24, 32, 48, 64) if -(-problem.n // c) <= blocks), 64)
    if 32 < m <= 64 or (columns <= 32 and leaves <= (4 if m <= 32 else 1)):
        resident = 2 if -(-problem.n // columns) > blocks else 1
        found = _ring(problem, SmallTiles(columns, False, 256 if columns <= 16 and m <= 64 else 128), resident)
        if found is not None:
            return found
    if m > 64:
        return None
    # The weight on the left, 64 columns to a block; leaves over the blocks of a cluster.
    across = -(-problem.n // 64)
    split = max(s for s in (1, 2, 4, 8) if leaves % s == 0 and (s == 1 or across * s <= blocks))
    resident = min(2, max(1, -(-across * split // blocks)))
    depths = (256, 128, 64) if m <= 32 and resident == 1 else (128, 64)
    return next(
        (found for d in depths if (found := _ring(problem, SmallTiles(64, True, d, split=split), resident))), None
    )


def _ring(problem: Problem, tiles: SmallTiles, resident: int = 1) -> SmallTiles | None:
    """``tiles`` with the stages that fit where ``resident`` blocks share a multiprocessor."""
    tile = Tile(min(problem.m, tiles.rows), tiles.columns, tiles.swap)
    waiting = (problem.program.leaves // tiles.split) * tile.words * 4
    stage = (tiles.columns + (tile.tokens if tiles.swap else ROWS * tile.left_tiles)) * tiles.depth * 2
    stages = min(16, (_SHARED // resident - _TAKEN - waiting) // stage)
    return dataclasses.replace(tiles, stages=stages) if stages >= 3 else None
