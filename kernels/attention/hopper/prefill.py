"""Attention of many queries: a persistent kernel; one warpgroup loads, two compute a tile of 64 queries each in turns.

While one warpgroup weighs its scores, the other has the tensor cores (FlashAttention-3's ping-pong, arXiv:2407.08608). The
state of finished splits stays in registers beside the running one; the result leaves from the slot of its queries while
the next tile runs. A warpgroup lets the other one go on before it finishes and stores its results.

Measured and dropped: the finished state in shared memory (0.83-0.91 of cuDNN, registers 0.92-0.98); blocks of 64 keys;
a block per tile instead of persistent ones; keys shared by multicast between two query heads (4 % slower); of 8 x 2048,
letting the other warpgroup go on only with the next tile's first scores (1 % slower), and bounds of the tiles from a kernel
of XLA's (2 %). States that stay in registers from tile to tile spill.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

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
        together: KV heads whose tiles are walked through together, all of one length in turn: the more, the better do blocks of
            few tiles share the work; the fewer, the longer do keys stay in the L2 cache. 0: as few as share it well.
        blocks: At most so many thread blocks; 0: one per multiprocessor.
        registers: Of a thread that computes, and of one that loads.
    """

    stages: int = 2
    together: int = 0
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


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(plgpu.ShapeDtypeStruct((), jnp.int32, layout=ROWS),) * 2)
def _bounds_of(ctx: Any, positions: Any) -> Any:
    """The last of a pair's positions, and the first of this warpgroup's tile; each warp by itself, 4 a lane."""
    utils, i32 = mgpu.utils, ir.IntegerType.get_signless(32)
    lane = arith.remui(utils.thread_idx(), utils.c(32, i32))
    start = utils.getelementptr(utils.memref_ptr(positions), [arith.muli(lane, utils.c(4, i32))], i32)
    four = llvm.load(ir.VectorType.get((4,), i32), start, alignment=16)
    mine = [llvm.extractelement(four, utils.c(j, i32)) for j in range(4)]
    last, first = (functools.reduce(of, mine) for of in (arith.maxsi, arith.minsi))
    wg = arith.divui(utils.thread_idx(), utils.c(128, i32))
    of_tile = arith.cmpi(arith.CmpIPredicate.eq, arith.divui(lane, utils.c(QUERIES // 4, i32)), wg)
    first = arith.select(of_tile, first, utils.c(2**31 - 1, i32))
    high, low = nvvm.ReductionKind.MAX, nvvm.ReductionKind.MIN
    found = (nvvm.redux_sync(x, kind, utils.c(-1, i32)) for x, kind in ((last, high), (first, low)))
    return [mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in found]


def _walk(item: Any, pairs: int, rows: int, together: int) -> tuple[Any, Any]:
    """``(pair of tiles, row of batch and head)`` of an item; of integers, or of arrays of NumPy or JAX."""
    # Up and down in turns, so that neighbours in time are of one length; the last comes down.
    number, inside = item // (pairs * together), item % (pairs * together)
    pair, up = inside // together, (rows // together - 1 - number) % 2
    return up * pair + (1 - up) * (pairs - 1 - pair), number * together + inside % together


def _place(wave: Any, block: Any, turn: int, grid: int) -> Any:
    """Which item of a wave a thread block takes: every second wave runs backwards, and every pair of them is turned."""
    odd = wave % 2
    return (odd * (grid - 1 - block) + (1 - odd) * block + wave // 2 * turn) % grid


@functools.cache
def _plan(pairs: int, rows: int, group: int, grid: int, heads: int) -> tuple[int, int]:
    """Rows that go together, and the turn that gives all thread blocks nearly the same work, if positions are a sequence's.

    With the rows of one KV head, the slowest of 132 blocks needs 2 % more than the mean for 8 x 2048 of 32 query heads, and 20 %
    for 1 x 4096; with those of 16 and of 2, less than 1 %.
    """
    items, step = pairs * rows, max(1, grid // 32)
    waves = -(-items // grid)
    # Waves that are so many apart are turned alike by every multiple of the step: they count as one, with the work of all.
    period = min(waves, 2 * grid // math.gcd(grid, step))
    wave = np.arange(period)[:, None]
    places = {turn: wave * grid + _place(wave, np.arange(grid), turn, grid) for turn in range(0, grid, step)}
    own = 1.5  # work of a tile besides the blocks before it, in blocks

    def slowest(together: int) -> tuple[float, int]:
        """Its work under the best turn, and that turn."""
        work = np.zeros(-(-waves // period) * period * grid)
        up_and_down = _walk(np.arange(min(items, 2 * pairs * together)), pairs, rows, together)[0]
        work[:items] = np.resize(up_and_down + own, items)
        work = work.reshape(-1, period * grid).sum(axis=0)
        return min((float(work[place].sum(axis=0).max()), turn) for turn, place in places.items())

    sizes = [heads * group] if heads else [group << n for n in range((rows // group).bit_length())]
    sizes = [size for size in sizes if size < rows and rows % size == 0]
    if not heads or not sizes:
        sizes.append(rows)
    mean = items / grid * ((pairs - 1) / 2 + own)
    found = []
    for size in sizes:
        work, turn = slowest(size)
        found.append((work, size, turn))
        if work <= 1.01 * mean:
            return size, turn
    return min(found)[1:]


def _kernel(*refs: Ref, c, cache, tiles: PrefillTiles, has_heads, has_table):
    q_gmem, k_gmem, v_gmem, positions_gmem, *rest = refs
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
        "positions_smem": plgpu.SMEM((_Q_SLOTS, _PAIR), i32),
        "k_smem": plgpu.SMEM((stages, BLOCK, dim), dtype, transforms=swizzled(dtype)),
        "v_smem": plgpu.SMEM((stages, BLOCK, dim), dtype, transforms=swizzled(dtype)),
        "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=_Q_SLOTS),
        "q_free": plgpu.Barrier(num_arrivals=2, num_barriers=_Q_SLOTS),
        "k_full": plgpu.Barrier(num_arrivals=cache.copies, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=cache.copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "order": plgpu.Barrier(num_arrivals=2),
    }
    if lse_gmem:
        scopes["lse_smem"] = plgpu.SMEM((2, QUERIES), jnp.float32)

    @functools.partial(pl.run_scoped, collective_axes="wg", **scopes)
    def _(
        qo_smem,
        positions_smem,
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
    ):
        cta, wg = lax.axis_index("grid"), lax.axis_index("wg")
        together, turn = _plan(pairs, batches * heads, group, grid, tiles.together)
        waves, remainder = divmod(items, grid)
        mine = waves + (_place(i32(waves), cta, turn, grid) < remainder).astype(i32)

        def unpack(i):
            item = i * grid + _place(i, cta, turn, grid)
            pair, row = _walk(item, pairs, batches * heads, together)
            return lax.div(row, i32(heads)), lax.rem(row, i32(heads)), pair

        def positions_of(batch, pair):
            return positions_gmem.at[batch, pl.ds(pair * _PAIR, _PAIR)]

        def swap():
            plgpu.barrier_arrive(order)
            plgpu.barrier_wait(order)

        @pl.when(wg == 2)
        def _load():
            plgpu.set_max_registers(tiles.registers[1], action="decrease")

            def item(i, base):
                batch, head, pair = unpack(i)
                steps = lax.div(_bounds_of(positions_of(batch, pair))[0], i32(BLOCK)) + 1
                kv_head = heads_gmem[head] if has_heads else lax.div(head, i32(group))
                q_slot = lax.rem(i, i32(_Q_SLOTS))

                @pl.when(i >= _Q_SLOTS)
                def _():
                    plgpu.barrier_wait(q_free.at[q_slot])

                for w in range(2):
                    rows = pl.ds(pair * _PAIR + w * QUERIES, QUERIES)
                    plgpu.copy_gmem_to_smem(q_gmem.at[batch, rows, head], qo_smem.at[q_slot, w], q_full.at[q_slot])
                plgpu.copy_gmem_to_smem(positions_of(batch, pair), positions_smem.at[q_slot], q_full.at[q_slot])

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

            def keys_after(step, base, steps):
                @pl.when(step + 1 < steps)
                def _():
                    plgpu.barrier_wait(k_full.at[lax.rem(base + step + 1, i32(stages))])

            def block(step, i, base, steps, qo, states, *, mask):
                """A block of keys; ``states`` are the running split's and that of all finished ones."""
                running, done = states
                slot = lax.rem(base + step, i32(stages))

                def scores(ref):
                    plgpu.wgmma(ref, qo, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
                    swap()
                    pl.when((step == 0) & (i > 0))(lambda: release(i))
                    merged = lax.cond(
                        (lax.rem(step, i32(BLOCKS_A_SPLIT)) == 0) & (step > 0),
                        lambda: (formula.empty(QUERIES, dim), formula.merge(done, running, spread, TILE, ROWS)),
                        lambda: (running, done),
                    )
                    return ref[...], merged

                qk, (running, done) = pl.run_scoped(scores, plgpu.ACC((QUERIES, BLOCK), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                p, (acc, m, total) = formula.weigh(mask(qk, step), running, c)
                acc, m, total, p = lax.optimization_barrier((acc, m, total, p.astype(dtype)))
                plgpu.barrier_arrive(order)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(order)
                acc = formula.add_values(acc, p, v_smem.at[slot], lambda: keys_after(step, base, steps))
                plgpu.barrier_arrive(v_free.at[slot])
                return (acc, m, total), done

            def item(i, base):
                batch, head, pair = unpack(i)
                row = pair * _PAIR + wg * QUERIES
                q_slot = lax.rem(i, i32(_Q_SLOTS))
                qo = qo_smem.at[q_slot, wg]
                positions = positions_smem.at[q_slot, pl.ds(wg * QUERIES, QUERIES)]
                plgpu.barrier_wait(q_full.at[q_slot])
                last, first = _bounds_of(positions_smem.at[q_slot])
                steps = lax.div(last, i32(BLOCK)) + 1
                unmasked = lax.div(first + 1, i32(BLOCK))  # blocks that all of the tile's queries see
                plgpu.barrier_wait(k_full.at[lax.rem(base, i32(stages))])

                pl.when(i > 0)(lambda: plgpu.barrier_wait(order))

                def whole(scores, step):
                    return scores

                def masked(scores, step):
                    at = load_whole(positions, layout=ROWS, optimized=False)
                    keys = plgpu.broadcasted_iota(i32, scores.shape, 1, layout=TILE)
                    return formula.hidden(scores, keys <= formula.over(at - step * BLOCK, scores.shape))

                def walk(low, high, states, mask):
                    one = functools.partial(block, i=i, base=base, steps=steps, qo=qo, mask=mask)
                    return lax.fori_loop(low, high, lambda step, states: one(step, states=states), states)

                # Hidden from the compiler, which would write them once for every loop that may be the first to run.
                states = lax.optimization_barrier((formula.empty(QUERIES, dim),) * 2)
                states = walk(0, unmasked, states, whole)
                states = walk(unmasked, steps, states, masked)
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
            plgpu.barrier_wait(order)
            pl.when(wg == 0)(swap)
            plgpu.wait_smem_to_gmem(0)
