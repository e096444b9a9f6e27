"""Products of few rows: one warpgroup per block, many blocks, so that every weight is on its way at once.

The work is to read the weight once. A block owns a few columns and a few leaves: leaves are spread over the blocks of a
cluster, which exchange leaf values through their shared memory and finish the tree together, each for a part of the tile.
One kernel, no atomics, no second pass.

The tensor cores take tiles of 64 rows by 8 columns and more. Either side may be the one with few rows: ``swap`` gives the
weight the 64, so that few rows take little shared memory and more blocks fit on the device. Both give the bits of `large`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from tbik_jax.kernels.matmul.hopper import settling
from tbik_jax.kernels.matmul.hopper.large import ROWS, Operand, Problem, swizzled
from tbik_jax.kernels.operands import unsliced
from tbik_jax.tree import Node

Array = jax.Array
Ref = Any
_THREADS = 128


@dataclass(frozen=True)
class SmallTiles:
    """Performance-only settings; no bit depends on any of them.

    Attributes:
        columns: Columns of a block: a multiple of 8; with ``swap``, of 64.
        swap: The weight is the left operand of the tensor cores.
        depth: Contraction per stage, a multiple of 64.
        stages: Slots of the ring.
        split: Blocks of a cluster, over which the leaves are spread; divides them.
        rows: Rows of a block, 64 or 128; all of them with ``swap``.
    """

    columns: int = 64
    swap: bool = True
    depth: int = 128
    stages: int = 4
    split: int = 1
    rows: int = 128


def products(
    problem: Problem, nodes: tuple[Node, ...], tiles: SmallTiles, a: Array, b: Array, parts: tuple[int, ...]
) -> tuple[Array, ...]:
    """``[nodes, m, n]`` cut in ``parts`` of n, each an array of its own; ``m`` at most 128."""
    leaves = problem.program.leaves
    if (
        leaves % tiles.split
        or problem.m > 128
        or (tiles.swap and (problem.m > tiles.rows or tiles.columns % ROWS))
        or not (problem.a.k_major and problem.b.k_major)
    ):
        raise ValueError(f"{tiles} does not fit {problem}")
    return plgpu.kernel(
        functools.partial(_kernel, problem=problem, nodes=nodes, tiles=tiles, parts=parts),
        out_type=tuple(jax.ShapeDtypeStruct((len(nodes), problem.m, n), problem.out_dtype) for n in parts),
        grid=(-(-problem.n // tiles.columns), -(-problem.m // tiles.rows)),
        grid_names=("grid", "rows"),
        kernel_name="product_of_few_rows",
        cluster=(tiles.split,),
        cluster_names=("cluster",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Pallas would have the warps meet before every copy; once is enough for the two of a step.
            unsafe_no_auto_barriers=True,
        ),
    )(*unsliced(a, b))


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


@dataclass(frozen=True)
class Tile:
    """The tile of a block as the tensor cores see it: ``left`` rows in tiles of 64, ``right`` columns in blocks of 8."""

    m: int  # of a block
    columns: int
    swap: bool

    @property
    def tokens(self) -> int:
        return _round_up(self.m, 8)

    @property
    def left_tiles(self) -> int:
        return -(-(self.columns if self.swap else self.m) // ROWS)

    @property
    def right(self) -> int:
        return self.tokens if self.swap else self.columns

    @property
    def threads(self) -> int:
        """Threads that hold any rows."""
        return _THREADS if self.swap else min(_THREADS, 32 * -(-self.m // 16))

    @property
    def quads(self) -> int:
        """A thread's values come in quads: two rows, 8 apart, of two neighbouring columns."""
        return self.left_tiles * (self.right // 8)

    @property
    def words(self) -> int:
        """Shared memory for the values of one leaf, 16 bytes per thread and quad."""
        return self.quads * self.threads * 4


def _kernel(
    a_gmem: Ref,
    b_gmem: Ref,
    *outs: Ref,
    problem: Problem,
    nodes: tuple[Node, ...],
    tiles: SmallTiles,
    parts: tuple[int, ...],
) -> None:
    leaves = problem.program.leaves
    mine = leaves // tiles.split
    tile = Tile(min(problem.m, tiles.rows), tiles.columns, tiles.swap)
    steps = -(-problem.k // tiles.depth)
    total = mine * steps
    stages = min(tiles.stages, total)
    a_rows = tile.tokens if tiles.swap else tile.left_tiles * ROWS
    a_tile = problem.a.tile(a_rows, tiles.depth)
    b_tile = problem.b.tile(tiles.columns, tiles.depth)

    @functools.partial(
        pl.run_scoped,
        a_smem=plgpu.SMEM((stages, *a_tile), problem.dtype, transforms=swizzled(64, problem.dtype)),
        b_smem=plgpu.SMEM((stages, *b_tile), problem.dtype, transforms=swizzled(64, problem.dtype)),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        parts_smem=plgpu.SMEM((mine * tile.words,), jnp.float32),
    )
    def _(a_smem, b_smem, full, parts_smem):
        column = lax.axis_index("grid") * tiles.columns
        first_leaf = lax.axis_index("cluster") * mine
        # A start not known when compiled: rows behind m are then filled with zeros.
        row = lax.axis_index("rows") * tiles.rows + lax.axis_index("grid") * 0

        def load(step):
            slot = lax.rem(step, jnp.int32(stages))
            leaf, k = first_leaf + lax.div(step, jnp.int32(steps)), lax.rem(step, jnp.int32(steps)) * tiles.depth

            def at(operand, ref, start, size):
                where = {operand.free: pl.ds(start, size), "k": pl.ds(k, tiles.depth), "l": leaf}
                return ref.at[tuple(where[axis] for axis in operand.axes)]

            a_slot = a_smem.at[slot]
            if not tiles.swap:  # rows behind the last hold whatever was there, and give results that nobody reads
                a_slot = a_slot.at[pl.ds(0, tile.tokens)] if problem.a.k_major else a_slot.at[:, pl.ds(0, tile.tokens)]
            first = column + problem.first
            plgpu.copy_gmem_to_smem(at(problem.b, b_gmem, first, tiles.columns), b_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(at(problem.a, a_gmem, row, tile.tokens), a_slot, full.at[slot])

        for step in range(stages):
            load(jnp.int32(step))

        def multiply(leaf):
            def accumulate(*accs):
                def step(i, _):
                    now = leaf * steps + i
                    slot = lax.rem(now, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    left, right = _rows_by_k(problem.a, a_smem.at[slot]), _rows_by_k(problem.b, b_smem.at[slot])
                    if tiles.swap:
                        left, right = right, left
                    for number, acc in enumerate(accs):
                        rows = left.at[pl.ds(number * ROWS, ROWS)]
                        plgpu.wgmma(acc, rows, plgpu.transpose_ref(right, (1, 0)))
                    # The step before has been read: its slot takes the next operands.
                    plgpu.wgmma_wait(len(accs))

                    @pl.when(jnp.logical_and(now > 0, now - 1 + stages < total))
                    def _():
                        _meet()  # each warp knows of its own share of that step only
                        load(now - 1 + stages)

                    return _

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            return pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, tile.right), jnp.float32)] * tile.left_tiles)

        def leaf_body(leaf, _):
            _keep(parts_smem, multiply(leaf), leaf, tile)
            return _

        lax.fori_loop(0, mine, leaf_body, None) if mine > 1 else leaf_body(jnp.int32(0), None)
        results = _Results(problem.m, parts, problem.out_dtype)
        _finish(parts_smem, outs, (row, column), lax.axis_index("cluster"), problem, nodes, tiles, tile, results)


def _rows_by_k(operand: Operand, ref: Ref) -> Ref:
    return ref if operand.k_major else plgpu.transpose_ref(ref, (1, 0))


# What Pallas has no words for -----------------------------------------------------------------------------------------


def _i32(value: int) -> Any:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _scalar(x: Any) -> Any:
    return x.registers.item()


def _thread() -> Any:
    return arith.remui(mgpu.utils.thread_idx(), _i32(_THREADS))


def _row(thread: Any) -> Any:
    """The first of a thread's two rows in a tile of 64; the other is 8 below."""
    warp, lane = arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))
    return arith.addi(arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4)))


def _less(a: Any, b: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


@dataclass(frozen=True)
class _Results:
    """Where the results lie: columns ``0 .. sum(parts)`` of ``[nodes, m, n]`` arrays, one for each part."""

    m: int
    parts: tuple[int, ...]
    dtype: Any

    @property
    def by_pairs(self) -> bool:
        """Whether two neighbouring columns, from an even one on, lie side by side."""
        return all(n % 2 == 0 for n in self.parts)

    def place(self, bases: list[Any], node: int, m: Any, n: Any) -> tuple[Any, Any]:
        """The array that column ``n`` is in, and the offset of row ``m`` of a node there."""
        base, width, start, first = bases[0], _i32(self.parts[0]), _i32(0), 0
        for size, other, of_next in zip(self.parts, bases[1:], self.parts[1:], strict=False):
            first += size
            here = arith.cmpi(arith.CmpIPredicate.sge, n, _i32(first))
            base = arith.select(here, other, base)
            width, start = arith.select(here, _i32(of_next), width), arith.select(here, _i32(first), start)
        row = arith.addi(m, _i32(node * self.m))
        return base, arith.addi(arith.muli(row, width), arith.subi(n, start))


def _put(
    bases: list[Any], node: int, quad: Any, row: Any, column: Any, first: Any, results: _Results, tile: Tile
) -> None:
    """Cast and write a quad, whose first element is at ``(row, column)`` of the block's tile, where the result has it."""
    out_type = mgpu.utils.dtype_to_ir_type(jnp.dtype(results.dtype))
    if results.dtype != jnp.float32:
        quad = arith.truncf(ir.VectorType.get((4,), out_type), quad)
    for half in range(2):
        if tile.swap:  # rows are columns of the result, which starts at ``first``
            n = arith.addi(arith.addi(first, row), _i32(8 * half))
            for i in range(2):
                m = arith.addi(column, _i32(i))
                value = vector.extract(quad, [], [2 * half + i])
                _store(bases, out_type, value, node, m, n, results)
        else:
            if half and results.m <= 8:
                break
            m, n = arith.addi(row, _i32(8 * half)), arith.addi(first, column)
            if results.by_pairs:
                pair = vector.extract_strided_slice(ir.VectorType.get((2,), out_type), quad, [2 * half], [2], [1])
                _store(bases, out_type, pair, node, m, n, results)
            else:
                for i in range(2):
                    value = vector.extract(quad, [], [2 * half + i])
                    _store(bases, out_type, value, node, m, arith.addi(n, _i32(i)), results)


def _store(bases: list[Any], out_type: Any, value: Any, node: int, m: Any, n: Any, results: _Results) -> None:
    """One value, or two neighbours, whose columns are both inside or both outside."""
    with mgpu.utils.when(arith.andi(_less(m, _i32(results.m)), _less(n, _i32(sum(results.parts))))):
        base, offset = results.place(bases, node, m, n)
        llvm.store(value, mgpu.utils.getelementptr(base, [offset], out_type))


def _meet() -> None:
    """The warps of the block wait for each other."""
    plgpu.inline_mgpu(arg_types=())(lambda ctx: mgpu.utils.warpgroup_barrier())()


def _pair_column(thread: Any) -> Any:
    return arith.muli(arith.remui(thread, _i32(4)), _i32(2))


def _keep(parts_smem: Ref, values: tuple[Array, ...], leaf: Array, tile: Tile) -> None:
    """Lay the values of one leaf down for the whole cluster.

    A single leaf goes this way too: written straight from registers, ptxas would serialise the multiplications (C7514).
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), *[plgpu.Layout.WGMMA] * len(values)))
    def keep(ctx: Any, smem: Any, leaf: Any, *values: Any) -> None:
        thread = _thread()
        f32 = ir.F32Type.get()
        base = mgpu.utils.memref_ptr(smem)
        offset = arith.addi(arith.muli(_scalar(leaf), _i32(tile.words)), arith.muli(thread, _i32(4)))
        base = mgpu.utils.getelementptr(base, [offset], f32)
        with mgpu.utils.when(_less(thread, _i32(tile.threads))):
            for i, quad in enumerate(quad for value in values for quad in settling.quads(value)):
                llvm.store(quad, mgpu.utils.getelementptr(base, [4 * tile.threads * i], f32), alignment=16)

    keep(parts_smem, leaf, *values)


def _finish(
    parts_smem: Ref,
    outs: tuple[Ref, ...],
    start: tuple[Array, Array],
    rank: Array,
    problem: Problem,
    nodes: tuple[Node, ...],
    tiles: SmallTiles,
    tile: Tile,
    results: _Results,
) -> None:
    """The tree over the leaf values of the cluster's blocks; block r finishes every split-th quad from r on."""
    split, mine = tiles.split, problem.program.leaves // tiles.split

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (1 + len(outs)), *[plgpu.Layout.WG_SPLAT(())] * 3))
    def finish(ctx: Any, smem: Any, *outs_start_rank: Any) -> None:
        *outs, first_row, first_column, rank = outs_start_rank
        bases = [mgpu.utils.memref_ptr(out) for out in outs]
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        quad_type = ir.VectorType.get((4,), f32)
        thread, rank = _thread(), _scalar(rank)
        row, pair = _row(thread), _pair_column(thread)
        if not tiles.swap:
            row = arith.addi(row, _scalar(first_row))
        base = mgpu.utils.memref_ptr(smem)
        if split > 1:
            _cluster_barrier()
            base = llvm.ptrtoint(i32, base)
            owners = [
                mgpu.utils.inline_ptx("mapa.shared::cluster.u32 $0, $1, $2;", base, _i32(r), result_types=i32)
                for r in range(split)
            ]

        def value(quad: Any, leaf: int) -> Any:
            """``quad`` counts the quads of a leaf; may differ from block to block."""
            words = arith.addi(arith.muli(quad, _i32(4 * tile.threads)), arith.muli(thread, _i32(4)))
            words = arith.addi(words, _i32((leaf % mine) * tile.words))
            if split == 1:
                return llvm.load(quad_type, mgpu.utils.getelementptr(base, [words], f32), alignment=16)
            address = arith.addi(owners[leaf // mine], arith.muli(words, _i32(4)))
            found = mgpu.utils.inline_ptx(
                "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];",
                address,
                result_types=[f32] * 4,
                has_side_effects=True,
            )
            return vector.from_elements(quad_type, list(found))

        right = _i32(tile.right // 8)
        with mgpu.utils.when(_less(thread, _i32(tile.threads))):
            for i in range(0, tile.quads, split):
                quad = arith.addi(rank, _i32(i))
                with mgpu.utils.when(_less(quad, _i32(tile.quads))):
                    place = (
                        arith.addi(row, arith.muli(arith.divui(quad, right), _i32(ROWS))),
                        arith.addi(pair, arith.muli(arith.remui(quad, right), _i32(8))),
                    )
                    for number, node in enumerate(nodes):
                        total = node.evaluate(functools.partial(value, quad), arith.addf)
                        _put(bases, number, total, *place, _scalar(first_column), results, tile)
        if split > 1:
            _cluster_barrier()  # nobody leaves while others read its shared memory

    finish(parts_smem, *outs, *start, rank)


def _cluster_barrier() -> None:
    mgpu.utils.inline_ptx("barrier.cluster.arrive.release.aligned;", has_side_effects=True, convergent=True)
    mgpu.utils.inline_ptx("barrier.cluster.wait.acquire.aligned;", has_side_effects=True, convergent=True)
