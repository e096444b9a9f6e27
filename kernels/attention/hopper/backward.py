"""Gradients of causal grouped-query attention on Hopper GPUs, in an order that positions alone decide.

======= =========================== =====================================================================
kernel  a block owns                and walks
======= =========================== =====================================================================
`delta` 64 queries of a head        nothing: a row sum in the order of the accumulator's layout
`dkv`   128 keys of a KV head       the query heads of a node, of each the queries from the last to the diagonal
`dq`    128 queries of a head       the keys from 0 to the diagonal
======= =========================== =====================================================================

Seven products instead of the five of one kernel for all: measured and dropped, that one adds shares of dq in device memory in
the order of the keys, and waiting for its turn costs more than two products (0.75-0.90 of cuDNN, these two 0.90-1.07).

Tiling and recomputation: FlashAttention-2, arXiv 2307.08691; warpgroups in turns: FlashAttention-3, arXiv 2407.08608.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.attention.hopper.formula import fma, full
from tbik_jax.kernels.hopper.compat import load_whole
from tbik_jax.kernels.operands import unsliced

Array = jax.Array
Ref = Any

WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)
ROWS = 64
_PAD = 128  # queries of lse and delta come in multiples of this
i32 = jnp.int32


@dataclass(frozen=True)
class Settings:
    """Performance-only settings; no bit depends on any of them.

    Attributes:
        q_stages: Slots of 64 queries and their gradients, in `dkv`.
        kv_stages: Slots of ``kv_rows`` keys and values, in `dq`.
        kv_rows: Keys per step of `dq`, 64 or 128. A chain of products does not see it.
        dkv_turns: The warpgroups of `dkv` take turns at the tensor cores.
        dq_turns: Those of `dq` do.
        folded: A block of `dkv` owns 64 early keys and 64 late ones, so that all have the same work, of which one warpgroup does
            most; else neighbours. None: where there is at most one block a multiprocessor.
        together: So many KV heads are walked through before the next ones, whose queries and keys then have the L2 cache. 0: as
            few as keep all multiprocessors at work.
    """

    q_stages: int = 2
    kv_stages: int = 2
    kv_rows: int = 128
    dkv_turns: bool = True
    dq_turns: bool = True
    folded: bool | None = None
    together: int = 0


def attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    lse: Array,
    *,
    offset: Array,
    scale: float,
    heads_per_node: int | None = None,
    settings: Settings = Settings(),
) -> tuple[Array, Array, Array]:
    """The gradients of causal attention by ``q``, ``k`` and ``v``; queries of a sequence are at ``offset + 0, 1, 2, ...``

        p[i, j]  = exp2(fma(q[i] . k[j], scale * log2(e), -lse[i]))       0 where j > offset + i
        ds[i, j] = p[i, j] * (dy[i] . v[j] - sum_d dy[i, d] y[i, d])
        dq[i]    = scale * sum_j ds[i, j] k[j]
        dk[j]    = scale * sum_i ds[i, j] q[i]
        dv[j]    = sum_i p[i, j] dy[i]

    Products are accumulations on the tensor cores, f32 from +0, in steps of 16: over D; over queries in blocks of 64 from the
    sequence's first, the last block first, ascending inside; then the same with the next head, ``heads_per_node`` heads in
    one accumulation; over keys ascending from 0, in one accumulation. p and ds are rounded to the operands' dtype for them. A
    zero is +0.

    A *node* is the unit that a mesh may not cut: with the query heads of a KV head on one rank it is the whole group, the
    default, and dk, dv are rounded once and final. Where a mesh cuts a group, ``heads_per_node`` is the number of heads on
    the smallest piece; nodes then come as f32, and whoever gathers them adds them in the canonical order.

    Args:
        dy, q, y: ``[B, T, heads, D]``, bf16 or f16, one dtype; ``y`` is the forward result, D is 64 or 128.
        k, v: ``[B, kv_heads, S, D]``; finite, whatever they hold behind the last query.
        lse: ``[B, heads, T]`` f32, ``max_j s[i, j] + log2 sum_j exp2(s[i, j] - max_j s[i, j])`` of scores in units of log 2.
        offset: ``[B]`` integers, the position of each sequence's first query; ``offset + T <= S``.
        scale: Factor of the scores.
        heads_per_node: Divides the group ``heads / kv_heads``. Numerics-bearing.
        settings: Performance-only.

    Returns:
        ``dq [B, T, heads, D]``, and ``dk``, ``dv`` ``[B, kv_heads, S, D]`` in the dtype of the operands; with more than one
        node in a group f32 ``[B, kv_heads, group / heads_per_node, S, D]``.

    Guarantee: the bits of a sequence's head are a function of that sequence's and head's arguments: not of the batch, the heads
    beside it, the length of the cache, queries behind whose ``dy`` is zero, or ``settings``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: other D or dtypes.
    """
    group = _check(dy, q, k, v, y, lse, offset, heads_per_node)
    per_node = heads_per_node or group
    queries, keys = q.shape[1], k.shape[2]
    dy, q, y = (_pad(x, 1, 8) for x in (dy, q, y))  # TMA on tiled rows wants whole tiles of 8
    k, v = (_pad(x, 2, 8) for x in (k, v))
    offset = offset.astype(jnp.int32)
    # exp2(-inf) = 0: a query behind the last has no weights.
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, -queries % _PAD)), constant_values=jnp.inf)
    delta = _delta(dy, y, lse.shape[2])
    arguments = dy, q, k, v, lse, delta, offset
    dq = _dq(*arguments, scale=scale, settings=settings)
    dk, dv = _dkv(*arguments, scale=scale, per_node=per_node, settings=settings, queries=queries)
    if per_node == group:
        dk, dv = dk[:, :, 0], dv[:, :, 0]
    return dq[:, :queries], dk[..., :keys, :], dv[..., :keys, :]


def _check(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    y: Array,
    lse: Array,
    offset: Array,
    heads_per_node: int | None,
) -> int:
    group = 0
    with Problems("attention_backward") as problems:
        fits = problems.check(q.ndim == 4, f"q has shape {q.shape}, not [B, T, heads, D]")
        fits &= problems.check(k.ndim == 4, f"k has shape {k.shape}, not [B, kv_heads, S, D]")
        problems.check(k.shape == v.shape, f"k and v differ in shape: {k.shape} and {v.shape}")
        for name, x in (("dy", dy), ("y", y)):
            problems.check(x.shape == q.shape, f"{name} has shape {x.shape}, q has {q.shape}")
        for name, x in (("dy", dy), ("k", k), ("v", v), ("y", y)):
            problems.check(x.dtype == q.dtype, f"{name} is {x.dtype}, q is {q.dtype}; cast one of them")
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            problems.unsupported(f"q is {q.dtype}; supported are bfloat16 and float16")
        problems.check(lse.dtype == jnp.float32, f"lse is {lse.dtype}, not float32")
        if fits:
            batch, queries, heads, dim = q.shape
            kv_heads = k.shape[1]
            if dim not in (64, 128):
                problems.unsupported(f"head_dim {dim}; supported are 64 and 128")
            problems.check(k.shape[0] == batch, f"q has batch {batch}, k has {k.shape[0]}")
            problems.check(k.shape[3] == dim, f"q has head_dim {dim}, k has {k.shape[3]}")
            problems.check(
                lse.shape == (batch, heads, queries), f"lse has shape {lse.shape}, not {(batch, heads, queries)}"
            )
            problems.check(offset.shape == (batch,), f"offset has shape {offset.shape}, not {(batch,)}")
            if problems.check(heads % kv_heads == 0, f"{heads} query heads are not a multiple of {kv_heads} KV heads"):
                group = heads // kv_heads
                problems.check(
                    heads_per_node is None or (heads_per_node > 0 and group % heads_per_node == 0),
                    f"heads_per_node = {heads_per_node} does not divide the {group} query heads of a KV head",
                )
    return group


def _pad(x: Array, axis: int, multiple: int) -> Array:
    if x.shape[axis] % multiple == 0:
        return x
    return jnp.pad(x, [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)])


# Steps that the kernels share ----------------------------------------------------------------------------------------


def _zeros(rows: int, columns: int) -> Any:
    return full((rows, columns), 0.0, WGMMA)


def _finish(acc: Any, factor: float, dtype: Any) -> Any:
    """``acc * factor``, rounded once; adding +0 makes every zero positive."""
    return fma(acc, full(acc.shape, factor, WGMMA), _zeros(*acc.shape), WGMMA).astype(dtype)


def _weights(scores: Any, lse: Any, axis: int, scale: float, first_query: Any, first_key: Any, masked: bool) -> Any:
    """``exp2(scores * scale * log2(e) - lse)``; queries lie along ``axis``."""
    lse = lax.broadcast_in_dim(lse, scores.shape, [axis])
    p = jnp.exp2(fma(scores, full(scores.shape, scale * math.log2(math.e), WGMMA), -lse, WGMMA))
    if masked:
        query = plgpu.broadcasted_iota(i32, scores.shape, axis, layout=WGMMA) + first_query
        key = plgpu.broadcasted_iota(i32, scores.shape, 1 - axis, layout=WGMMA) + first_key
        p = jnp.where(query >= key, p, jnp.zeros_like(p))
    return p


def _swizzled(dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory of rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _tile(dtype: Any, *shape: int) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=_swizzled(dtype))


def _two_products(
    first: tuple[Ref, Ref],
    second: tuple[Ref, Ref],
    *,
    ready: Callable[[], None],
    issued: Callable[[], None],
    use: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """``use(a @ b.T)`` and ``c @ d.T``, once ``ready``; ``use`` runs while the tensor cores work on the second product."""
    (a, b), (c, d) = first, second
    shape = a.shape[0], b.shape[0]

    def multiply(one, two):
        plgpu.wgmma(one, a, b.transpose((1, 0)))
        ready()
        plgpu.wgmma(two, c, d.transpose((1, 0)))
        issued()
        used = use(plgpu.wgmma_accumulator_load(one, wait_n=1))
        return used, two[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def _add_products(sums: Sequence[Any], *factors: tuple[Any, Ref]) -> tuple[Any, ...]:
    """``sums[i] + a @ b`` for each pair, in the accumulators' registers."""

    def multiply(refs):
        for ref, (a, b) in zip(refs, factors, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in sums))


def _wait_from(first: int, at: Any, barrier: Ref) -> None:
    """Slots of a ring are free at the first ``first`` steps."""
    pl.when(at >= first)(lambda: plgpu.barrier_wait(barrier))


class _Turns:
    """Two warpgroups alternate: one issues products while the other weighs."""

    def __init__(self, barrier: Ref, wg: Any, on: bool) -> None:
        self.barrier, self.wg, self.on = barrier, wg, on

    def swap(self) -> None:
        if self.on:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)

    def begin(self) -> None:
        pl.when(self.wg == 1)(self.swap)

    def end(self) -> None:
        pl.when(self.wg == 0)(self.swap)


def _walk(low: Any, middle: Any, high: Any, first: Callable[..., Any], second: Callable[..., Any], state: Any) -> Any:
    middle = jnp.clip(middle, low, high)
    state = lax.fori_loop(low, middle, first, state)
    return lax.fori_loop(middle, high, second, state)


def _together(tiles: int, kv_heads: int, of_each: int, settings: Settings) -> int:
    """Rows of tiles that are walked through together: ``of_each`` of every KV head, so many KV heads as divide them all."""
    for count in range(1, kv_heads):
        few = settings.together or 2 * backend.multiprocessors() / (tiles * of_each)
        if kv_heads % count == 0 and count >= few:
            return count * of_each
    return kv_heads * of_each


def _in_bands(item: Any, tiles: int, rows: int, together: int) -> tuple[Any, Any]:
    """``(tile, row)`` of an item: tile by tile of ``together`` rows, then of the next ones."""
    band, inside = lax.div(item, i32(tiles * together)), lax.rem(item, i32(tiles * together))
    return lax.div(inside, i32(together)), band * together + lax.rem(inside, i32(together))


# delta ---------------------------------------------------------------------------------------------------------------


def _delta(dy: Array, y: Array, length: int) -> Array:
    """``sum_d dy * y``: ``[B, heads, length]`` f32, zeros behind the last query."""
    batch, _, heads, dim = dy.shape

    def kernel(dy_gmem, y_gmem, out_gmem, dy_smem, y_smem, out_smem, full):
        head, block, row = lax.axis_index("head"), lax.axis_index("block"), lax.axis_index("batch")
        for gmem, smem in ((dy_gmem, dy_smem), (y_gmem, y_smem)):
            plgpu.copy_gmem_to_smem(gmem.at[row, pl.ds(block * ROWS, ROWS), head], smem, full)
        plgpu.barrier_wait(full)
        a, b = (load_whole(smem, layout=WGMMA).astype(jnp.float32) for smem in (dy_smem, y_smem))
        # Products of two numbers of 8 or 11 bits are exact, and as fmas no addition contracts with them.
        out_smem[...] = fma(a, b, _zeros(ROWS, dim), WGMMA).sum(axis=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[row, head, pl.ds(block * ROWS, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        grid=(heads, length // ROWS, batch),
        kernel_name="attention_delta",
        grid_names=("head", "block", "batch"),
        scratch_types=[
            _tile(dy.dtype, ROWS, dim),
            _tile(dy.dtype, ROWS, dim),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=PARAMS,
    )(*unsliced(dy, y))


# dk, dv --------------------------------------------------------------------------------------------------------------


def _dkv(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    offset: Array,
    *,
    scale: float,
    per_node: int,
    settings: Settings,
    queries: int,
) -> tuple[Array, Array]:
    batch, _, heads, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group, dtype, stages = heads // kv_heads, q.dtype, settings.q_stages
    nodes = group // per_node
    out_dtype = dtype if nodes == 1 else jnp.float32
    chains, tiles = batch * kv_heads * nodes, pl.cdiv(keys, 2 * ROWS)
    blocks = pl.cdiv(queries, ROWS)
    folded = chains * tiles <= backend.multiprocessors() if settings.folded is None else settings.folded
    together = _together(tiles, batch * kv_heads, nodes, settings)

    def kernel(q_gmem, k_gmem, v_gmem, dy_gmem, lse_gmem, delta_gmem, offset_gmem, dk_gmem, dv_gmem, *scratch):
        (
            q_smem,
            dy_smem,
            k_smem,
            v_smem,
            out_smem,
            lse_smem,
            delta_smem,
            kv_full,
            q_full,
            dy_full,
            q_free,
            dy_free,
            turn,
        ) = scratch
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        # The first keys are seen by most queries: the longest tiles first.
        tile, chain = _in_bands(item, tiles, chains, together)
        kv, node = lax.div(chain, i32(nodes)), lax.rem(chain, i32(nodes))
        row, kv = lax.div(kv, i32(kv_heads)), lax.rem(kv, i32(kv_heads))
        first_head = kv * group + node * per_node
        first_query = offset_gmem[row]

        def first_key_of(wg):
            if folded:
                return jnp.where(wg == 0, tile, 2 * tiles - 1 - tile) * ROWS
            return tile * (2 * ROWS) + wg * ROWS

        def steps_of(wg):
            """Blocks of queries, per head, some of which see some of the warpgroup's keys."""
            before = lax.div(jnp.maximum(first_key_of(wg) - first_query, 0), i32(ROWS))
            return blocks - jnp.minimum(before, blocks)

        steps = steps_of(i32(0))

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            turns = _Turns(turn, wg, settings.dkv_turns)
            mine = pl.ds(wg * ROWS, ROWS)
            k_mine, v_mine = k_smem.at[mine], v_smem.at[mine]
            key = first_key_of(wg)
            plgpu.barrier_wait(kv_full)
            turns.begin()

            def head(number, sums):
                def step(index, sums, masked):
                    at = number * steps + index
                    block = blocks - 1 - index
                    slot = lax.rem(at, i32(stages))
                    plgpu.barrier_wait(q_full.at[slot])

                    def weigh(scores):
                        lse = load_whole(lse_smem.at[slot], layout=BY_COLUMN)
                        return _weights(scores, lse, 1, scale, first_query + block * ROWS, key, masked)

                    p, dp = _two_products(
                        (k_mine, q_smem.at[slot]),
                        (v_mine, dy_smem.at[slot]),
                        ready=lambda: plgpu.barrier_wait(dy_full.at[slot]),
                        issued=turns.swap,
                        use=weigh,
                    )
                    delta = load_whole(delta_smem.at[slot], layout=BY_COLUMN)
                    ds = p * (dp - lax.broadcast_in_dim(delta, dp.shape, [1]))
                    p, ds = lax.optimization_barrier((p.astype(dtype), ds.astype(dtype)))
                    turns.swap()

                    dv, dk = _add_products(sums, (p, dy_smem.at[slot]), (ds, q_smem.at[slot]))
                    plgpu.barrier_arrive(dy_free.at[slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    return dv, dk

                # Queries before this block do not see every key of this warpgroup.
                whole = lax.div(jnp.maximum(key + (ROWS - 1) - first_query, 0) + (ROWS - 1), i32(ROWS))
                wholly, partly = (functools.partial(step, masked=masked) for masked in (False, True))

                def without(index, _):
                    """Queries for the other warpgroup alone."""
                    slot = lax.rem(number * steps + index, i32(stages))
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.barrier_wait(dy_full.at[slot])
                    turns.swap()
                    turns.swap()
                    plgpu.barrier_arrive(dy_free.at[slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    return _

                mine = steps_of(wg)
                sums = _walk(i32(0), blocks - whole, mine, wholly, partly, sums)
                lax.fori_loop(mine, steps, without, None)
                return sums

            dv, dk = lax.fori_loop(0, per_node, head, (_zeros(ROWS, dim), _zeros(ROWS, dim)))
            turns.end()
            for sums, factor, out in ((dk, scale, dk_gmem), (dv, 1.0, dv_gmem)):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[wg][...] = _finish(sums, factor, out_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out.at[row, kv, node, pl.ds(key, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            for gmem, smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
                for half in range(2):
                    of = gmem.at[row, kv, pl.ds(first_key_of(i32(half)), ROWS)]
                    plgpu.copy_gmem_to_smem(of, smem.at[pl.ds(half * ROWS, ROWS)], kv_full)

            streams = (
                (q_gmem, lse_gmem, q_smem, lse_smem, q_full, q_free),
                (dy_gmem, delta_gmem, dy_smem, delta_smem, dy_full, dy_free),
            )

            def load(at, _):
                slot, head = lax.rem(at, i32(stages)), first_head + lax.div(at, steps)
                queries = pl.ds((blocks - 1 - lax.rem(at, steps)) * ROWS, ROWS)
                for tiles, numbers, tile_slots, number_slots, filled, free in streams:
                    _wait_from(stages, at, free.at[slot])
                    plgpu.copy_gmem_to_smem(tiles.at[row, queries, head], tile_slots.at[slot], filled.at[slot])
                    plgpu.copy_gmem_to_smem(numbers.at[row, head, queries], number_slots.at[slot], filled.at[slot])
                return _

            lax.fori_loop(0, per_node * steps, load, None)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            _tile(dtype, stages, ROWS, dim),
            _tile(dtype, stages, ROWS, dim),
            _tile(dtype, 2 * ROWS, dim),
            _tile(dtype, 2 * ROWS, dim),
            _tile(out_dtype, 2, ROWS, dim),
            plgpu.SMEM((stages, ROWS), jnp.float32),
            plgpu.SMEM((stages, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )

    out = jax.ShapeDtypeStruct((batch, kv_heads, nodes, keys, dim), out_dtype)
    return plgpu.kernel(
        entry,
        out_type=(out, out),
        grid=(chains * tiles,),
        kernel_name="attention_dkv",
        grid_names=("item",),
        num_threads=3,
        thread_name="wg",
        compiler_params=PARAMS,
    )(*unsliced(q, k, v, dy, lse, delta, offset))


# dq ------------------------------------------------------------------------------------------------------------------


def _dq(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    lse: Array,
    delta: Array,
    offset: Array,
    *,
    scale: float,
    settings: Settings,
) -> Array:
    batch, queries, heads, dim = q.shape
    kv_heads = k.shape[1]
    group, dtype, stages, kv_rows = heads // kv_heads, q.dtype, settings.kv_stages, settings.kv_rows
    tiles, rows = pl.cdiv(queries, 2 * ROWS), batch * heads
    together = _together(tiles, batch * kv_heads, group, settings)

    def kernel(q_gmem, k_gmem, v_gmem, dy_gmem, lse_gmem, delta_gmem, offset_gmem, dq_gmem, *scratch):
        q_smem, dy_smem, k_smem, v_smem, lse_smem, delta_smem, full, k_full, v_full, k_free, v_free, turn = scratch
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        tile, row = _in_bands(item, tiles, rows, together)
        tile = tiles - 1 - tile  # the last queries see most keys: the longest tiles first
        row, head = lax.div(row, i32(heads)), lax.rem(row, i32(heads))
        first = tile * (2 * ROWS)
        first_query = offset_gmem[row]
        last = first_query + jnp.minimum(first + 2 * ROWS, queries) - 1
        steps = lax.div(last, i32(kv_rows)) + 1

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            turns = _Turns(turn, wg, settings.dq_turns)
            query = first_query + first + wg * ROWS
            plgpu.barrier_wait(full)
            lse = load_whole(lse_smem.at[pl.ds(wg * ROWS, ROWS)], layout=BY_ROW)
            delta = load_whole(delta_smem.at[pl.ds(wg * ROWS, ROWS)], layout=BY_ROW)
            turns.begin()

            def step(block, dq, masked):
                slot = lax.rem(block, i32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                def weigh(scores):
                    return _weights(scores, lse, 0, scale, query, block * kv_rows, masked)

                p, dp = _two_products(
                    (q_smem.at[wg], k_smem.at[slot]),
                    (dy_smem.at[wg], v_smem.at[slot]),
                    ready=lambda: plgpu.barrier_wait(v_full.at[slot]),
                    issued=turns.swap,
                    use=weigh,
                )
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp - lax.broadcast_in_dim(delta, dp.shape, [0]))
                ds = lax.optimization_barrier(ds.astype(dtype))
                turns.swap()
                (dq,) = _add_products((dq,), (ds, k_smem.at[slot]))
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            wholly, partly = (functools.partial(step, masked=masked) for masked in (False, True))
            dq = _walk(i32(0), lax.div(query + 1, i32(kv_rows)), steps, wholly, partly, _zeros(ROWS, dim))
            turns.end()
            q_smem.at[wg][...] = _finish(dq, scale, dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_gmem.at[row, pl.ds(first + wg * ROWS, ROWS), head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            for gmem, smem in ((q_gmem, q_smem), (dy_gmem, dy_smem)):
                for half in range(2):
                    of = gmem.at[row, pl.ds(first + half * ROWS, ROWS), head]
                    plgpu.copy_gmem_to_smem(of, smem.at[half], full)
            for gmem, smem in ((lse_gmem, lse_smem), (delta_gmem, delta_smem)):
                plgpu.copy_gmem_to_smem(gmem.at[row, head, pl.ds(first, 2 * ROWS)], smem, full)
            kv = lax.div(head, i32(group))

            def load(block, _):
                slot = lax.rem(block, i32(stages))
                for gmem, smem, full, free in ((k_gmem, k_smem, k_full, k_free), (v_gmem, v_smem, v_full, v_free)):
                    _wait_from(stages, block, free.at[slot])
                    plgpu.copy_gmem_to_smem(
                        gmem.at[row, kv, pl.ds(block * kv_rows, kv_rows)], smem.at[slot], full.at[slot]
                    )
                return _

            lax.fori_loop(0, steps, load, None)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            _tile(dtype, 2, ROWS, dim),
            _tile(dtype, 2, ROWS, dim),
            _tile(dtype, stages, kv_rows, dim),
            _tile(dtype, stages, kv_rows, dim),
            plgpu.SMEM((2 * ROWS,), jnp.float32),
            plgpu.SMEM((2 * ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=6),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(rows * tiles,),
        kernel_name="attention_dq",
        grid_names=("item",),
        num_threads=3,
        thread_name="wg",
        compiler_params=PARAMS,
    )(*unsliced(q, k, v, dy, lse, delta, offset))
