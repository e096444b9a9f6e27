"""Attention of few queries per sequence: the work is to read the cache once.

A warpgroup loads blocks of keys and values in a ring; another makes the states of splits, for all queries and query heads of
a KV head at once: they sit in the first of the 64 rows that the tensor cores take. Where there are pairs of sequence and KV
head for all multiprocessors, a thread block walks all splits of its pair and merges as it goes. Else splits are spread over
all multiprocessors, and a second kernel merges the states of a row, one lane per element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from tbik_jax.kernels.attention.hopper import formula
from tbik_jax.kernels.attention.hopper.cache import Cache, swizzled
from tbik_jax.kernels.attention.hopper.formula import BLOCK, BLOCKS_A_SPLIT, ROWS, SPLIT, TILE
from tbik_jax.kernels.hopper.compat import load_whole
from tbik_jax.kernels.operands import unsliced

Array = jax.Array
Ref = Any

#: Queries times query heads of a KV head that fit in the tensor cores' tile.
MOST_ROWS = 64
_LANES = 128
_Q_SLOTS = 2


@dataclass(frozen=True)
class DecodeTiles:
    """Performance-only settings; no bit depends on any of them.

    Attributes:
        slots: Blocks of keys or values on their way; 0: 96 KiB of them. More, up to what fits, made one sequence of 32k up to 6 %
            slower on an H200, and more sequences no faster.
        unroll: Splits that are merged without a branch between.
        chunk: Splits whose states the merge brings at once.
        blocks: At most so many thread blocks; 0: one per multiprocessor.
        whole: A thread block takes all splits of a pair. None: where that keeps most multiprocessors at work.
    """

    slots: int = 0
    unroll: int = 8
    chunk: int = 64
    blocks: int = 0
    whole: bool | None = None


def attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv_head_of: Array | None,
    table: Array | None,
    *,
    c: float,
    cache: Cache,
    tiles: DecodeTiles,
    multiprocessors: int,
) -> Array:
    """``[B, T, heads, D]``."""
    batch, queries, heads, dim = q.shape
    groups = k.shape[1] if kv_head_of is None else heads  # a query head with a KV head of its own choice is a group
    group = heads // groups
    used = queries * group
    rows = -(-used // 8) * 8
    q = q.reshape(batch, queries, groups, group, dim).swapaxes(1, 2).reshape(batch, groups, used, dim)
    if used > 8:  # TMA wants whole tiles of 8 rows, or part of one
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - used), (0, 0)))
    positions = positions.astype(jnp.int32)
    extra = [x.astype(jnp.int32) for x in (kv_head_of, table) if x is not None]
    # The first and the last position. Of a single query both are the array as it is: nothing runs before the kernel.
    bounds = positions
    if queries > 1:
        bounds = jnp.stack([positions.min(axis=1), positions.max(axis=1)], axis=1)
        of_rows = jnp.repeat(positions, group, axis=1)
        extra.append(jnp.pad(of_rows, ((0, 0), (0, MOST_ROWS - used))))
    splits, pairs = -(-cache.size // SPLIT), batch * groups
    most = tiles.blocks or multiprocessors
    whole = tiles.whole if tiles.whole is not None else splits == 1 or _is_busy(pairs, most)
    if whole:
        out_type: list[Any] = [jax.ShapeDtypeStruct((pairs, used, dim), q.dtype)]
    else:
        out_type = [
            jax.ShapeDtypeStruct((pairs, splits, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((pairs, splits, 2, rows), jnp.float32),
        ]
    options = {"has_heads": kv_head_of is not None, "has_table": table is not None, "has_rows": queries > 1}
    found = plgpu.kernel(
        functools.partial(_walk, c=c, cache=cache, slots=tiles.slots or _slots(dim, q.dtype), whole=whole, **options),
        out_type=out_type,
        grid=(min(most, pairs if whole else pairs * splits),),
        kernel_name="attention_decode",
        grid_names=("grid",),
        num_threads=2,
        thread_name="wg",
        compiler_params=formula.PARAMS,
    )(*unsliced(q, k, v, bounds, *extra))
    y = found[0] if whole else _merged(*found, bounds, used, q.dtype, tiles)
    return y.reshape(batch, groups, queries, group, dim).swapaxes(1, 2).reshape(batch, queries, heads, dim)


def _slots(dim: int, dtype: Any) -> int:
    return (96 << 10) // (BLOCK * dim * jnp.dtype(dtype).itemsize)


def _is_busy(pairs: int, multiprocessors: int) -> bool:
    """Whether most multiprocessors work most of the time if each walks whole pairs."""
    return 4 * pairs >= 3 * multiprocessors * -(-pairs // multiprocessors)


def _walk(*refs: Ref, c, cache, slots, whole, has_heads, has_table, has_rows):
    """The states of all splits; if ``whole``, merged, and the results."""
    q_gmem, k_gmem, v_gmem, bounds_gmem, *rest = refs
    heads_gmem: Ref = rest.pop(0) if has_heads else None
    table_gmem: Ref = rest.pop(0) if has_table else None
    rows_gmem: Ref = rest.pop(0) if has_rows else None
    batches, groups, rows, dim = q_gmem.shape
    dtype, rows = q_gmem.dtype, -(-rows // 8) * 8
    splits = -(-cache.size // SPLIT)
    runs = 1 if whole else splits  # a thread block takes a run of splits at a time
    items = batches * groups * runs
    grid = lax.axis_size("grid")
    i32 = jnp.int32

    @functools.partial(
        pl.run_scoped,
        collective_axes="wg",
        q_smem=plgpu.SMEM((_Q_SLOTS, 64, dim), dtype, transforms=swizzled(dtype)),
        kv_smem=plgpu.SMEM((slots, BLOCK, dim), dtype, transforms=swizzled(dtype)),
        full=plgpu.Barrier(num_arrivals=cache.copies, num_barriers=slots),
        free=plgpu.Barrier(num_barriers=slots),
        q_full=plgpu.Barrier(num_barriers=_Q_SLOTS),
        q_free=plgpu.Barrier(num_barriers=_Q_SLOTS),
    )
    def _(q_smem, kv_smem, full, free, q_full, q_free):
        wg, cta = lax.axis_index("wg"), lax.axis_index("grid")

        def unpack(i):
            # Neighbouring thread blocks read neighbouring heads of the same positions.
            item = cta + i * grid
            of, run = lax.rem(item, i32(groups)), lax.rem(lax.div(item, i32(groups)), i32(runs))
            batch = lax.div(item, i32(groups * runs))

            def inside(blocks):
                return blocks if whole else jnp.clip(blocks - run * BLOCKS_A_SPLIT, 0, BLOCKS_A_SPLIT)

            seen = inside(lax.div(bounds_gmem[batch, 0] + 1, i32(BLOCK)))  # by all queries
            blocks = inside(lax.div(bounds_gmem[batch, bounds_gmem.shape[1] - 1], i32(BLOCK)) + 1)
            return batch, of, run, seen, blocks

        def each_item(body):
            """``body(item, blocks so far, items so far)`` for items that see anything."""

            def one(i, carry):
                done, number = carry
                blocks = unpack(i)[-1]

                @pl.when(blocks > 0)
                def _():
                    body(unpack(i), done, number)

                return done + blocks, number + (blocks > 0).astype(i32)

            mine = lax.div(i32(items - 1) - cta, i32(grid)) + 1
            lax.fori_loop(0, mine, one, (i32(0), i32(0)))

        @pl.when(wg == 1)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def item(at, done, number):
                batch, of, run, _, blocks = at
                kv_head = heads_gmem[of] if has_heads else of
                q_slot = lax.rem(number, i32(_Q_SLOTS))

                @pl.when(number >= _Q_SLOTS)
                def _():
                    plgpu.barrier_wait(q_free.at[q_slot])

                # A start that is not known when compiled: rows behind the last head are filled with zeros.
                heads = q_gmem.at[batch, of, pl.ds(cta * 0, rows)]
                plgpu.copy_gmem_to_smem(heads, q_smem.at[q_slot, pl.ds(0, rows)], q_full.at[q_slot])

                def block(j, _):
                    places = cache.places(table_gmem, batch, run * BLOCKS_A_SPLIT + j)
                    for half, ref in enumerate((k_gmem, v_gmem)):
                        count = 2 * (done + j) + half
                        slot = lax.rem(count, i32(slots))

                        @pl.when(count >= slots)
                        def _(slot=slot):
                            plgpu.barrier_wait(free.at[slot])

                        cache.load(ref, places, kv_head, kv_smem.at[slot], full.at[slot])
                    return _

                lax.fori_loop(0, blocks, block, None)

            each_item(item)

        @pl.when(wg == 0)
        def _compute():
            plgpu.set_max_registers(232, action="increase")

            def spread(row):
                return formula.over(row, (64, dim))

            def item(at, done, number):
                batch, of, run, seen, blocks = at
                q_slot = lax.rem(number, i32(_Q_SLOTS))
                plgpu.barrier_wait(q_full.at[q_slot])

                def block(j, state, mask):
                    count = 2 * (done + j)
                    k_slot, v_slot = lax.rem(count, i32(slots)), lax.rem(count + 1, i32(slots))
                    plgpu.barrier_wait(full.at[k_slot])

                    def scores(ref):
                        plgpu.wgmma(ref, q_smem.at[q_slot], plgpu.transpose_ref(kv_smem.at[k_slot], (1, 0)))
                        return ref[...]

                    qk = pl.run_scoped(scores, plgpu.ACC((64, BLOCK), jnp.float32))
                    plgpu.barrier_arrive(free.at[k_slot])
                    if mask:
                        keys = plgpu.broadcasted_iota(i32, qk.shape, 1, layout=TILE)
                        before = run * SPLIT + j * BLOCK
                        if has_rows:
                            last = load_whole(rows_gmem.at[batch], layout=ROWS, optimized=False) - before
                            last = formula.over(last, qk.shape)
                        else:
                            last = bounds_gmem[batch, 0] - before
                        qk = formula.hidden(qk, keys <= last)
                    p, (acc, m, total) = formula.weigh(qk, state, c)
                    plgpu.barrier_wait(full.at[v_slot])
                    acc = formula.add_values(acc, p.astype(dtype), kv_smem.at[v_slot])
                    plgpu.barrier_arrive(free.at[v_slot])
                    return acc, m, total

                def split(low, high):
                    middle = jnp.clip(seen, low, high)
                    state = formula.empty(64, dim)
                    state = lax.fori_loop(low, middle, functools.partial(block, mask=False), state)
                    return lax.fori_loop(middle, high, functools.partial(block, mask=True), state)

                row = batch * groups + of
                if whole:

                    def merge(number, done):
                        low = number * BLOCKS_A_SPLIT
                        return formula.merge(
                            done, split(low, jnp.minimum(low + BLOCKS_A_SPLIT, blocks)), spread, TILE, ROWS
                        )

                    last = lax.div(blocks + (BLOCKS_A_SPLIT - 1), i32(BLOCKS_A_SPLIT))
                    state = lax.fori_loop(0, last, merge, formula.empty(64, dim))
                    plgpu.barrier_arrive(q_free.at[q_slot])
                    _store(rest[0].at[row], formula.finish(state, spread, TILE, dtype), rest[0].shape[1])
                else:
                    acc, *of_rows = split(i32(0), blocks)
                    plgpu.barrier_arrive(q_free.at[q_slot])
                    acc_gmem, ml_gmem = rest
                    _store(acc_gmem.at[row, run], acc, rows)
                    _store_rows(ml_gmem.at[row, run], of_rows, rows)

            each_item(item)


def _first_row_and_column() -> tuple[Any, Any]:
    """Of this thread in a tile as wgmma leaves it; it also has the row 8 below, and every eighth column from there in pairs."""
    i32 = ir.IntegerType.get_signless(32)

    def constant(value: int) -> Any:
        return mgpu.utils.c(value, i32)

    thread = arith.remui(mgpu.utils.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    row = arith.addi(arith.muli(arith.divui(thread, constant(32)), constant(16)), arith.divui(lane, constant(4)))
    return row, arith.muli(arith.remui(lane, constant(4)), constant(2))


def _in_rows(rows: int, store: Callable[[int, Any, Any], None]) -> None:
    """``store(half, row, column)`` for each of a thread's two rows that is among the first ``rows``."""
    first, column = _first_row_and_column()
    for half in range(2):
        row = arith.addi(first, mgpu.utils.c(8 * half, first.type))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.slt, row, mgpu.utils.c(rows, row.type))):
            store(half, row, column)


def _store(gmem: Ref, value: Array, rows: int) -> None:
    """The first rows of a tile, straight from registers: ``gmem [rows, D]``."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def write(ctx: Any, ref: Any, value: Any) -> None:
        utils, (_, dim) = mgpu.utils, value.shape
        to, element = utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
        pairs = list(value.registers.flat)  # of two neighbouring columns; in turns of a row and of the row 8 below

        def store(half: int, row: Any, column: Any) -> None:
            mine = utils.getelementptr(to, [arith.addi(arith.muli(row, utils.c(dim, row.type)), column)], element)
            for j, pair in enumerate(pairs[half::2]):
                llvm.store(pair, utils.getelementptr(mine, [8 * j], element), alignment=2 * utils.bytewidth(element))

        _in_rows(rows, store)

    write(gmem, value)


def _store_rows(gmem: Ref, values: Sequence[Array], rows: int) -> None:
    """Numbers of the first rows: ``gmem [len(values), rows]`` f32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ROWS for _ in values)))
    def write(ctx: Any, ref: Any, *values: Any) -> None:
        utils, f32 = mgpu.utils, ir.F32Type.get()

        def store(half: int, row: Any, column: Any) -> None:
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, column, utils.c(0, column.type))):
                for i, x in enumerate(values):
                    to = utils.getelementptr(utils.memref_ptr(ref), [arith.addi(row, utils.c(i * rows, row.type))], f32)
                    llvm.store(list(x.registers.flat)[half], to)

        _in_rows(rows, store)

    write(gmem, *values)


def _merged(acc: Array, ml: Array, bounds: Array, used: int, dtype: Any, tiles: DecodeTiles) -> Array:
    """``acc [pairs, splits, rows, D]``, ``ml [pairs, splits, 2, rows]`` -> ``[pairs, used * D]``; pairs of batch and group.

    All rows take the splits of the last query: those that a row does not see are states of no keys.
    """
    pairs, splits, rows, dim = acc.shape
    chunk = min(tiles.chunk, splits, _LANES)
    pieces = -(-used * dim // _LANES)  # rows, or pairs of them
    out = plgpu.kernel(
        functools.partial(_merge, dim=dim, chunk=chunk, unroll=tiles.unroll, groups=pairs // bounds.shape[0]),
        out_type=jax.ShapeDtypeStruct((pairs, pieces * _LANES), dtype),
        grid=(pairs, pieces),
        kernel_name="attention_merge",
        grid_names=("pair", "piece"),
        compiler_params=formula.PARAMS,
    )(*unsliced(acc.reshape(pairs, splits, rows * dim), ml, bounds))
    return out[:, : used * dim]


def _merge(acc_gmem, ml_gmem, bounds_gmem, out_gmem, *, dim, chunk, unroll, groups):
    lanes = plgpu.Layout.WG_STRIDED((_LANES,), 1)
    rows = ml_gmem.shape[3]
    in_piece = max(1, _LANES // dim)  # rows
    i32 = jnp.int32

    @functools.partial(
        pl.run_scoped,
        acc_smem=plgpu.SMEM((chunk, _LANES), jnp.float32),
        ml_smem=plgpu.SMEM((chunk, 2, rows), jnp.float32),
        weight_smem=plgpu.SMEM((in_piece, 3, _LANES), jnp.float32),
        ready=plgpu.Barrier(num_arrivals=2),
    )
    def _(acc_smem, ml_smem, weight_smem, ready):
        pair, piece = lax.axis_index("pair"), lax.axis_index("piece")
        first_row = lax.div(piece * _LANES, i32(dim))
        lane = plgpu.broadcasted_iota(i32, (_LANES,), 0, layout=lanes)

        def everywhere(value):
            return plgpu.layout_cast(jnp.full((_LANES,), value, jnp.float32), lanes)

        def of_rows(value):
            """``value(r)`` of the piece's row r, on the lanes of that row."""
            y = everywhere(value(0))
            for r in range(1, in_piece):
                y = jnp.where(lane < r * dim, y, everywhere(value(r)))
            return y

        def fetch(start):
            values = acc_gmem.at[pair, pl.ds(start, chunk), pl.ds(piece * _LANES, _LANES)]
            plgpu.copy_gmem_to_smem(values, acc_smem, ready)
            plgpu.copy_gmem_to_smem(ml_gmem.at[pair, pl.ds(start, chunk)], ml_smem, ready)

        def weigh(r, largest):
            """Lane i has the weights of the merge with split i. No weight waits for another: the largest score of the first
            splits is the same whatever the order."""
            before, own = everywhere(largest), everywhere(-jnp.inf)
            for split in range(chunk):
                value = everywhere(ml_smem[split, 0, first_row + r])
                before = jnp.where(lane > split, jnp.maximum(before, value), before)
                own = jnp.where(lane == split, value, own)
            for i, x in enumerate(formula.weights(before, own)):
                weight_smem.at[r, i][...] = x

        fetch(pair * 0)  # before anything is known of the position
        last = bounds_gmem[lax.div(pair, i32(groups)), bounds_gmem.shape[1] - 1]
        splits = lax.div(last, i32(SPLIT)) + 1

        def part(number, state):
            acc, total, largest = state
            start = number * chunk

            @pl.when(number > 0)
            def _():
                plgpu.commit_smem()  # all threads have read what is there
                fetch(start)

            plgpu.barrier_wait(ready)
            here = jnp.minimum(splits - start, chunk)
            for r in range(in_piece):
                weigh(r, largest[r])
            plgpu.commit_smem()

            def one(split, state):
                acc, total = state
                w1, w2 = (of_rows(lambda r, i=i: weight_smem[r, i, split]) for i in range(2))
                values, sums = (
                    load_whole(acc_smem.at[split], layout=lanes),
                    of_rows(lambda r: ml_smem[split, 1, first_row + r]),
                )
                return formula.weighted(acc, w1, values, w2, lanes), formula.weighted(total, w1, sums, w2, lanes)

            def several(i, state):
                for j in range(unroll):
                    state = one(i * unroll + j, state)
                return state

            full = lax.div(here, i32(unroll))
            state = lax.fori_loop(0, full, several, (acc, total))
            acc, total = lax.fori_loop(full * unroll, here, one, state)
            return acc, total, tuple(weight_smem[r, 2, here - 1] for r in range(in_piece))

        zero = everywhere(0.0)
        parts = lax.div(splits + (chunk - 1), i32(chunk))
        none = (jnp.float32(-jnp.inf),) * in_piece
        acc, total, _ = lax.fori_loop(0, parts, part, (zero, zero, none))
        out = formula.finish((acc, zero, total), lambda x: x, lanes, out_gmem.dtype)
        out_gmem.at[pair, pl.ds(piece * _LANES, _LANES)][...] = out
