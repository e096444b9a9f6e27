"""Attention of many queries: a persistent kernel; one warpgroup loads, two compute a tile of 64 queries each in turns.

While one warpgroup weighs its scores, the other has the tensor cores (FlashAttention-3's ping-pong, arXiv:2407.08608). The
state of finished splits stays in registers beside the running one; the result leaves from the slot of its queries while
the next tile runs.

Measured and dropped: the finished state in shared memory (0.83-0.91 of cuDNN, registers 0.92-0.98); blocks of 64 keys;
a block per tile instead of persistent ones.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from tbik_jax.kernels.attention.hopper import formula
from tbik_jax.kernels.attention.hopper.cache import Cache, swizzled
from tbik_jax.kernels.attention.hopper.formula import BLOCK, BLOCKS_A_SPLIT, ROWS, TILE
from tbik_jax.kernels.hopper.compat import load_whole
from tbik_jax.kernels.operands import unsliced

Array = jax.Array
Ref = Any

#: Queries of a warpgroup, and of a block of two.
QUERIES = 64
_PAIR = 2 * QUERIES
_Q_SLOTS = 2


@dataclass(frozen=True)
class PrefillTiles:
    """Performance-only settings; no bit depends on any of them.

    Attributes:
        stages: Blocks of keys, and of values, on their way.
        order: What the walk goes through first: ``"heads"``, so that the longest tiles of all heads come first, for balance;
            ``"tiles"``, all of a KV head before the next, so that a long context's keys stay in the L2 cache; or ``"balanced"``,
            tiles, unless heads would end notably earlier if all were limited by their own length.
        merge: When a finished split is merged: ``"late"``, while the tensor cores work on the next one's first scores; or
            ``"peeled"``, half before and half after, in a copy of the loop's body of its own (`formula.ROUNDS_LATER` only).
        handover: When a warpgroup that is through with its tile lets the other one go on: ``"next"``, with the first scores of
            its next tile; or ``"early"``, before it finishes and stores its results, which then leave while the tensor cores
            work on those scores.
        bounds: Who finds the blocks that a tile sees: ``"array"``, XLA, in a kernel of its own; or ``"kernel"``, each warp,
            of positions that come with the queries.
        blocks: At most so many thread blocks; 0: one per multiprocessor.
        registers: Of a thread that computes, and of one that loads.
    """

    stages: int = 2
    order: Literal["heads", "tiles", "balanced"] = "tiles"
    merge: Literal["late", "peeled"] = "late"
    handover: Literal["next", "early"] = "next"
    bounds: Literal["array", "kernel"] = "array"
    blocks: int = 0
    registers: tuple[int, int] = (240, 24)


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
    tiles: PrefillTiles,
    multiprocessors: int,
    with_lse: bool,
) -> tuple[Array, Array | None]:
    """``([B, T, heads, D], log2 of the weights' sum [B, heads, T] f32 if asked for)``."""
    batch, queries, heads, _ = q.shape
    pairs = -(-queries // _PAIR)
    q = jnp.pad(q, ((0, 0), (0, -queries % 8), (0, 0), (0, 0)))  # TMA wants whole tiles of 8 rows
    # Rows that are not there look where the last one does, and are not written.
    positions = jnp.pad(positions.astype(jnp.int32), ((0, 0), (0, pairs * _PAIR - queries)), mode="edge")
    count = min(tiles.blocks or multiprocessors, pairs * batch * heads)
    out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if with_lse:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, pairs * _PAIR), jnp.float32))
    extra = [x.astype(jnp.int32) for x in (kv_head_of, table) if x is not None]
    if tiles.bounds == "array":
        extra.insert(0, _bounds(positions))
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            c=c,
            cache=cache,
            tiles=tiles,
            has_heads=kv_head_of is not None,
            has_table=table is not None,
        ),
        out_type=out_type,
        grid=(count,),
        kernel_name="attention_prefill",
        grid_names=("grid",),
        num_threads=3,
        thread_name="wg",
        compiler_params=formula.PARAMS,
    )(*unsliced(q, k, v, positions, *extra))
    return out[0][:, :queries], out[1][:, :, :queries] if with_lse else None


def _bounds(positions: Array) -> Array:
    """``[B, pairs, 2, 2]``: the last position of each tile of a pair, and the first one negated; one reduction for both."""
    of_tiles = positions.reshape(positions.shape[0], -1, 2, 1, QUERIES)
    return jnp.max(jnp.concatenate([of_tiles, -of_tiles], axis=3), axis=4)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(plgpu.ShapeDtypeStruct((), jnp.int32, layout=ROWS),) * 2)
def _bounds_of(ctx: Any, positions: Any) -> Any:
    """The last of a pair's positions, and the first one of this warpgroup's tile; each warp by itself, 4 positions a lane."""
    utils, i32 = mgpu.utils, ir.IntegerType.get_signless(32)
    lane = arith.remui(utils.thread_idx(), utils.c(32, i32))
    start = utils.getelementptr(utils.memref_ptr(positions), [arith.muli(lane, utils.c(4, i32))], i32)
    four = llvm.load(ir.VectorType.get((4,), i32), start, alignment=16)
    mine = [llvm.extractelement(four, utils.c(j, i32)) for j in range(4)]
    last, first = (functools.reduce(of, mine) for of in (arith.maxsi, arith.minsi))
    wg = arith.divui(utils.thread_idx(), utils.c(128, i32))
    of_tile = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(lane, utils.c(QUERIES // 4, i32)), wg)
    first = arith.select(of_tile, first, utils.c(2**31 - 1, i32))
    kinds = nvvm.ReductionKind
    found = (nvvm.redux_sync(x, kind, utils.c(-1, i32)) for x, kind in ((last, kinds.MAX), (first, kinds.MIN)))
    return [mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in found]


def _walk(item: Any, order: str, pairs: int, rows: int, group: int) -> tuple[Any, Any]:
    """``(pair of tiles, row of batch and head)`` of an item; of integers, or of arrays of NumPy or JAX."""
    if order == "heads":
        return pairs - 1 - item // rows, item % rows
    # Up and down in turns, so that neighbours in time are of one length; the last comes down.
    number, inside = item // (pairs * group), item % (pairs * group)
    pair, up = inside // group, (rows // group - 1 - number) % 2
    return up * pair + (1 - up) * (pairs - 1 - pair), number * group + inside % group


def _place(wave: Any, block: Any, turn: int, grid: int) -> Any:
    """Which item of a wave a thread block takes: every second wave runs backwards, and every pair of them is turned."""
    odd = wave % 2
    return (odd * (grid - 1 - block) + (1 - odd) * block + wave // 2 * turn) % grid


def _order(order: str, pairs: int, rows: int, group: int, grid: int) -> str:
    """What to walk through first. Of 32 query heads by tiles, 132 blocks need 2 % longer for 8 x 2048, 20 % for 1 x 4096."""
    if order != "balanced":
        return order
    heads, tiles = (_turned(each, pairs, rows, group, grid)[1] for each in ("heads", "tiles"))
    return "heads" if heads < 0.995 * tiles else "tiles"


def _turn(order: str, pairs: int, rows: int, group: int, grid: int) -> int:
    """The turn that gives all thread blocks nearly the same work, if tiles are as long as their place in the sequence."""
    return _turned(order, pairs, rows, group, grid)[0]


@functools.cache
def _turned(order: str, pairs: int, rows: int, group: int, grid: int) -> tuple[int, float]:
    """That turn, and the most work of a thread block."""
    items = pairs * rows
    waves = np.arange(-(-items // grid))[:, None]
    work = np.zeros(waves.size * grid)
    work[:items] = _walk(np.arange(items), order, pairs, rows, group)[0] + 1.7  # a block of its own, and a fixed cost

    def longest(turn: int) -> float:
        return float(work[waves * grid + _place(waves, np.arange(grid), turn, grid)].sum(axis=0).max())

    turn = min(range(0, grid, max(1, grid // 32)), key=longest)
    return turn, longest(turn)


def _kernel(*refs: Ref, c, cache, tiles: PrefillTiles, has_heads, has_table):
    q_gmem, k_gmem, v_gmem, positions_gmem, *rest = refs
    bounds_gmem: Ref = rest.pop(0) if tiles.bounds == "array" else None
    heads_gmem: Ref = rest.pop(0) if has_heads else None
    table_gmem: Ref = rest.pop(0) if has_table else None
    out_gmem, *lse_gmem = rest
    batches, _, heads, dim = q_gmem.shape
    dtype = q_gmem.dtype
    kv_heads = k_gmem.shape[1]
    group = heads // kv_heads if heads % kv_heads == 0 else 1
    pairs = positions_gmem.shape[1] // _PAIR
    items, stages = pairs * batches * heads, tiles.stages
    grid = lax.axis_size("grid")
    i32 = jnp.int32

    scopes = {
        "qo_smem": plgpu.SMEM((_Q_SLOTS, 2, QUERIES, dim), dtype, transforms=swizzled(dtype)),
        "k_smem": plgpu.SMEM((stages, BLOCK, dim), dtype, transforms=swizzled(dtype)),
        "v_smem": plgpu.SMEM((stages, BLOCK, dim), dtype, transforms=swizzled(dtype)),
        "q_full": plgpu.Barrier(num_arrivals=2 if bounds_gmem is not None else 3, num_barriers=_Q_SLOTS),
        "q_free": plgpu.Barrier(num_arrivals=2, num_barriers=_Q_SLOTS),
        "k_full": plgpu.Barrier(num_arrivals=cache.copies, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=cache.copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "order": plgpu.Barrier(num_arrivals=2),
    }
    if lse_gmem:
        scopes["lse_smem"] = plgpu.SMEM((2, QUERIES), jnp.float32)
    if bounds_gmem is None:
        scopes["positions_smem"] = plgpu.SMEM((_Q_SLOTS, _PAIR), i32)

    @functools.partial(pl.run_scoped, collective_axes="wg", **scopes)
    def _(
        qo_smem,
        k_smem,
        v_smem,
        q_full,
        q_free,
        k_full,
        v_full,
        k_free,
        v_free,
        order,
        lse_smem=None,
        positions_smem=None,
    ):
        cta, wg = lax.axis_index("grid"), lax.axis_index("wg")
        shape = pairs, batches * heads, group
        way = _order(tiles.order, *shape, grid)
        turn = _turn(way, *shape, grid)
        waves, remainder = divmod(items, grid)
        mine = waves + (_place(i32(waves), cta, turn, grid) < remainder).astype(i32)

        def unpack(i):
            item = i * grid + _place(i, cta, turn, grid)
            pair, row = _walk(item, way, *shape)
            return lax.div(row, i32(heads)), lax.rem(row, i32(heads)), pair

        def positions_of(batch, pair):
            return positions_gmem.at[batch, pl.ds(pair * _PAIR, _PAIR)]

        def seen(batch, pair, wg, positions):
            """Blocks of keys that a pair of tiles sees, and those that all queries of one of them see."""
            if bounds_gmem is None:
                last, first = _bounds_of(positions)
            else:
                last = jnp.maximum(bounds_gmem[batch, pair, 0, 0], bounds_gmem[batch, pair, 1, 0])
                first = -bounds_gmem[batch, pair, wg, 1]
            return lax.div(last, i32(BLOCK)) + 1, lax.div(first + 1, i32(BLOCK))

        def swap():
            plgpu.barrier_arrive(order)
            plgpu.barrier_wait(order)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(tiles.registers[1], action="decrease")

            def item(i, base):
                batch, head, pair = unpack(i)
                steps, _ = seen(batch, pair, 0, positions_of(batch, pair))
                kv_head = heads_gmem[head] if has_heads else lax.div(head, i32(group))
                q_slot = lax.rem(i, i32(_Q_SLOTS))

                @pl.when(i >= _Q_SLOTS)
                def _():
                    plgpu.barrier_wait(q_free.at[q_slot])

                for w in range(2):
                    rows = pl.ds(pair * _PAIR + w * QUERIES, QUERIES)
                    plgpu.copy_gmem_to_smem(q_gmem.at[batch, rows, head], qo_smem.at[q_slot, w], q_full.at[q_slot])
                if positions_smem is not None:
                    to = positions_smem.at[q_slot]
                    plgpu.copy_gmem_to_smem(positions_of(batch, pair), to, q_full.at[q_slot])

                def step(s, _):
                    slot = lax.rem(base + s, i32(stages))
                    places = cache.places(table_gmem, batch, s)
                    for ref, smem, full, free in ((k_gmem, k_smem, k_full, k_free), (v_gmem, v_smem, v_full, v_free)):

                        @pl.when(base + s >= stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        cache.load(ref, places, kv_head, smem.at[slot], full.at[slot])
                    return _

                lax.fori_loop(0, steps, step, None)
                return base + steps

            lax.fori_loop(0, mine, item, i32(0))

        @pl.when(wg != 2)
        def _compute():
            plgpu.set_max_registers(tiles.registers[0], action="increase")
            pl.when(wg == 1)(swap)

            def spread(row):
                return formula.over(row, (QUERIES, dim))

            def release(i):
                """Results of the item before have left their slot: it may take queries."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[lax.rem(i - 1, i32(_Q_SLOTS))])

            def block(step, i, base, steps, qo, states, *, mask, first):
                """One block of keys; ``states`` are the running split's and that of all finished ones."""
                running, done = states
                slot = lax.rem(base + step, i32(stages))
                if first == "peeled":
                    begun = lax.optimization_barrier(formula.merge_begin(done, running, spread))

                def scores(ref):
                    plgpu.wgmma(ref, qo, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
                    swap()
                    if tiles.handover == "early":
                        pl.when((step == 0) & (i > 0))(lambda: release(i))
                    fresh = formula.empty(QUERIES, dim)
                    if first == "peeled":
                        merged = lax.optimization_barrier(formula.merge_end(done, begun, spread, TILE, ROWS))
                        return ref[...], (fresh, merged)
                    if first == "late":
                        starts = lax.rem(step, i32(BLOCKS_A_SPLIT)) == 0
                        merged = lax.cond(
                            starts,
                            lambda: (fresh, formula.merge(done, running, spread, TILE, ROWS)),
                            lambda: (running, done),
                        )
                        return ref[...], merged
                    return ref[...], (running, done)

                qk, (running, done) = pl.run_scoped(scores, plgpu.ACC((QUERIES, BLOCK), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                p, (acc, m, total) = formula.weigh(mask(qk, step), running, c)
                if first == "peeled":
                    acc = running[0]  # nothing to rescale yet
                acc, m, total, p = lax.optimization_barrier((acc, m, total, p.astype(dtype)))
                plgpu.barrier_arrive(order)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(order)

                def wait_for_keys():
                    @pl.when(step + 1 < steps)
                    def _():
                        plgpu.barrier_wait(k_full.at[lax.rem(base + step + 1, i32(stages))])

                acc = formula.add_values(acc, p, v_smem.at[slot], wait_for_keys)
                plgpu.barrier_arrive(v_free.at[slot])
                return (acc, m, total), done

            def item(i, base):
                batch, head, pair = unpack(i)
                row = pair * _PAIR + wg * QUERIES
                q_slot = lax.rem(i, i32(_Q_SLOTS))
                qo = qo_smem.at[q_slot, wg]
                if positions_smem is None:
                    positions = positions_gmem.at[batch, pl.ds(row, QUERIES)]
                    steps, unmasked = seen(batch, pair, wg, None)
                    plgpu.barrier_wait(q_full.at[q_slot])
                else:
                    positions = positions_smem.at[q_slot, pl.ds(wg * QUERIES, QUERIES)]
                    plgpu.barrier_wait(q_full.at[q_slot])
                    steps, unmasked = seen(batch, pair, wg, positions_smem.at[q_slot])
                plgpu.barrier_wait(k_full.at[lax.rem(base, i32(stages))])

                @pl.when(i > 0)
                def _():
                    if tiles.handover == "early":
                        plgpu.barrier_wait(order)
                    else:
                        release(i)

                def whole(scores, step):
                    return scores

                def masked(scores, step):
                    at = load_whole(positions, layout=ROWS, optimized=False)
                    keys = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=TILE)
                    return formula.hidden(scores, keys <= formula.over(at - step * BLOCK, scores.shape))

                def walk(low, high, states, mask, first):
                    one = functools.partial(block, i=i, base=base, steps=steps, qo=qo, mask=mask, first=first)
                    return lax.fori_loop(low, high, lambda step, states: one(step, states=states), states)

                states = (formula.empty(QUERIES, dim),) * 2
                if tiles.merge == "late":
                    states = walk(0, unmasked, states, whole, "late")
                    states = walk(unmasked, steps, states, masked, "late")
                else:

                    def mask(scores, step):
                        return lax.cond(step < unmasked, lambda: scores, lambda: masked(scores, step))

                    def split(number, states):
                        low = number * BLOCKS_A_SPLIT
                        high = jnp.minimum(low + BLOCKS_A_SPLIT, steps)
                        states = block(low, i, base, steps, qo, states, mask=mask, first="peeled")
                        middle = jnp.clip(unmasked, low + 1, high)
                        states = walk(low + 1, middle, states, whole, "")
                        return walk(middle, high, states, masked, "")

                    splits = lax.div(steps + (BLOCKS_A_SPLIT - 1), i32(BLOCKS_A_SPLIT))
                    states = lax.fori_loop(0, splits, split, states)
                if tiles.handover == "early":
                    plgpu.barrier_arrive(order)  # the other's last values need not wait for what follows
                running, done = states
                state = formula.merge(done, running, spread, TILE, ROWS)
                qo[...] = formula.finish(state, spread, TILE, dtype)
                if lse_gmem:
                    lse_smem.at[wg][...] = formula.log_sum_exp2(state)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(qo, out_gmem.at[batch, pl.ds(row, QUERIES), head])
                if lse_gmem:
                    plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_gmem[0].at[batch, head, pl.ds(row, QUERIES)])
                return base + steps

            lax.fori_loop(0, mine, item, i32(0))
            if tiles.handover == "early":
                plgpu.barrier_wait(order)
            pl.when(wg == 0)(swap)
            plgpu.wait_smem_to_gmem(0)
