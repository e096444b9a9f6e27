"""Products of many rows: two warpgroups compute, a third feeds them through a ring of operands in shared memory.

A block owns 128 rows, 64 for each computing warpgroup, and walks its tiles, and their leaves in order. A result stays in
registers at first and leaves piece by piece while the first steps of the next leaf run. The running sum of a chain stays
in registers, and so do two sums of a narrow tile; further ones wait in shared or in device memory (`settling`).

Measured and dropped: the two warpgroups in turns, each with a tile of 64 rows (the fill of shared memory and the tensor
cores' reads then ask for more than its bandwidth: 0.66-0.74 of cuBLAS, whatever the tree); one warpgroup held a step behind
the other, to overlap what follows a leaf (the ring is then too short: 0.79 instead of 0.87 for a chain); turns of two steps,
each handed over when the first of them is done (0.70 to 0.80: the tensor cores wait for the handing over).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from tbik_jax.kernels.hopper import formulas, simt
from tbik_jax.kernels.matmul.hopper import settling
from tbik_jax.kernels.operands import unsliced
from tbik_jax.program import Program

Array = jax.Array
Ref = Any

ROWS = 64
#: Contraction per stage: rows of 128 bytes. Half as deep, with more stages in the same room, took 1.4 times as long.
DEPTH = 64


@dataclass(frozen=True)
class Tiles:
    """Performance-only settings of :func:`product`; no bit depends on any of them.

    Attributes:
        columns: Columns of a block's tile, up to 256 in steps of 32 bytes of results; with leaves to add at most 208, since two
            such tiles must fit in registers. Of 64 where the columns are the fast dimension of ``b``.
        stages: Slots of the ring.
        cluster: Blocks that share by multicast what they read, 1, 2 or 4: columns, or the rows where one block has all of them.
        sums: How many sums that wait do so in registers, 1 or 2; with 2 a tile has at most 128 columns.
        near: How much of the waiting sums (beyond registers) is in shared memory, in accesses of 16 bytes per thread; the
            rest is in device memory. A sum takes ``columns / 8`` accesses.
        band: Width of the bands in which the grid walks the tiles, for the L2 cache.
        out_bytes: Results leave through shared memory in pieces of at most so many bytes of a row, 128, 64 or 32, one with
            each of the next leaf's first steps.
        turns: The computing warpgroups start their steps in turns, so that one adds leaves while the other multiplies.
        end_pairs: With ``turns``, the first two steps of a leaf are one turn, and the last two: as long as what follows a leaf.
            Of leaves of four steps or more, with three stages or more.
        late_sums: A sum that waits in memory goes there with the next leaf's first steps, as results do.
    """

    columns: int = 192
    stages: int = 4
    cluster: int = 1
    sums: int = 1
    near: int = 0
    band: int = 8
    out_bytes: int = 128
    turns: bool = False
    end_pairs: bool = False
    late_sums: bool = False


@dataclass(frozen=True)
class Operand:
    """Where the dimensions of an operand are: a string over ``b`` (batch), ``l`` (leaf), ``k``, and ``m`` or ``n``."""

    axes: str
    free: Literal["m", "n"]

    @property
    def k_major(self) -> bool:
        """Whether k is the fast one of the tile's two dimensions."""
        return self.axes.index("k") > self.axes.index(self.free)

    def tile(self, size: int, depth: int) -> tuple[int, int]:
        return (size, depth) if self.k_major else (depth, size)

    def at(self, ref: Ref, *, start: Any, size: int, k: Any, depth: int, leaf: Any, batch: Any) -> Ref:
        where = {self.free: pl.ds(start, size), "k": pl.ds(k, depth), "l": leaf, "b": batch}
        return ref.at[tuple(where[axis] for axis in self.axes)]


@dataclass(frozen=True)
class Problem:
    """A product as the kernel sees it: sizes, layouts, and what happens after each leaf."""

    m: int
    n: int
    k: int  # of one leaf
    batch: int
    a: Operand
    b: Operand
    out_axes: str  # over s (node), b, m, n
    dtype: Any
    out_dtype: Any
    program: Program
    first: int = 0  # column of b that is the result's first
    # If given, the result is swiglu(gate, up): `up` is the product with the columns of b from there on.
    up: int | None = None

    @property
    def factors(self) -> tuple[int, ...]:
        """Where the columns of b begin that make one element of the result."""
        return (self.first,) if self.up is None else (self.first, self.up)


def product(problem: Problem, tiles: Tiles, a: Array, b: Array, *, blocks: int) -> Array:
    """``[nodes, batch, m, n]`` in the order of ``problem.out_axes``; ``blocks`` is how many the device runs at once."""
    # TMA writes whole swizzled tiles; what ragged sizes need beyond their own is cut off again.
    width = out_width(tiles.columns // len(problem.factors), problem.n, problem.out_dtype, tiles.out_bytes)
    sizes = {"s": len(problem.program.ends), "b": problem.batch, "m": problem.m, "n": problem.n}
    padded = sizes | {"m": -(-problem.m // 8) * 8, "n": -(-problem.n // width) * width}
    out = jax.ShapeDtypeStruct(tuple(padded[axis] for axis in problem.out_axes), problem.out_dtype)
    grid = blocks // tiles.cluster
    far = max(0, problem.program.storages - tiles.sums) * settling.accesses(ROWS, tiles.columns) - tiles.near
    waiting = (grid * tiles.cluster, 2, far * settling.WORDS) if far > 0 else (1, 1, settling.WORDS)
    scratch = jax.ShapeDtypeStruct(waiting, jnp.float32)
    result, _ = plgpu.kernel(
        functools.partial(_kernel, problem=problem, tiles=tiles),
        out_type=(out, scratch),
        grid=(grid,),
        grid_names=("grid",),
        kernel_name="product_of_many_rows",
        cluster=(tiles.cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Pallas would have a warpgroup meet before every copy and around every store. Here all threads arrive at the
            # barriers of the ring, and what is written to shared memory is committed before it is copied.
            unsafe_no_auto_barriers=True,
        ),
    )(*unsliced(a, b))
    return result if sizes == padded else result[tuple(slice(sizes[axis]) for axis in problem.out_axes)]


def swizzled(columns: int, dtype: Any) -> tuple[Any, Any]:
    """The layout in shared memory of tiles that many columns wide."""
    bytes_ = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * bytes_ * 8)
    return plgpu.TilingTransform((8, swizzle // bytes_)), plgpu.SwizzleTransform(swizzle)


def out_width(columns: int, n: int, dtype: Any, most: int = 128) -> int:
    """The widest swizzled piece of a row, in columns, that the tile is a multiple of: TMA wants it aligned to itself.

    One that also divides ``n``, if there is any, spares the copy that cuts ragged results.
    """
    itemsize = jnp.dtype(dtype).itemsize
    widths = [size // itemsize for size in (128, 64, 32) if size <= most and columns % (size // itemsize) == 0]
    if not widths:
        raise ValueError(f"a tile of results must be a multiple of 32 bytes wide, not {columns} columns of {dtype}")
    return next((width for width in widths if n % width == 0), widths[0])


def _kernel(a_gmem: Ref, b_gmem: Ref, out_gmem: Ref, far_gmem: Ref, *, problem: Problem, tiles: Tiles) -> None:
    program, columns, stages = problem.program, tiles.columns, tiles.stages
    results = columns // len(problem.factors)  # columns of the result in a tile
    block_rows = 2 * ROWS
    steps = -(-problem.k // DEPTH)  # per leaf
    shares_rows = problem.m <= block_rows
    across, along = (1, tiles.cluster) if shares_rows else (tiles.cluster, 1)  # tiles of a cluster: rows by columns
    row_tiles = -(-problem.m // (block_rows * across))
    column_tiles = -(-problem.n // (results * along))
    sums = min(tiles.sums, program.storages)  # in registers
    accesses = settling.accesses(ROWS, columns)  # of one that waits elsewhere
    near = min((program.storages - sums) * accesses, tiles.near)
    late_sums = tiles.late_sums and program.storages > sums
    # With two stages, who has the turn would wait for a slot that the other one cannot leave.
    end_pairs = tiles.turns and tiles.end_pairs and steps >= 4 and stages >= 3
    # Where a turn begins with two steps, nothing leaves between them.
    late = int(end_pairs)
    a_tile, b_tile = problem.a.tile(block_rows, DEPTH), problem.b.tile(columns, DEPTH)

    width = out_width(results, problem.n, problem.out_dtype, tiles.out_bytes)

    barrier: Callable[..., Any] = plgpu.Barrier
    if tiles.cluster > 1:
        barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))

    scopes = {
        "a_smem": plgpu.SMEM((stages, *a_tile), problem.dtype, transforms=swizzled(DEPTH, problem.dtype)),
        "b_smem": plgpu.SMEM((stages, *b_tile), problem.dtype, transforms=swizzled(DEPTH, problem.dtype)),
        "out_smem": plgpu.SMEM((2, ROWS, width), problem.out_dtype, transforms=swizzled(width, problem.out_dtype)),
        "full": plgpu.Barrier(num_arrivals=1 + len(problem.factors), num_barriers=stages),
        "empty": barrier(num_arrivals=2, num_barriers=stages),
    }
    if tiles.turns:
        scopes["turn"] = plgpu.Barrier(num_barriers=2)
    if near:
        scopes["near_smem"] = plgpu.SMEM((2, near * settling.WORDS), jnp.float32)

    @functools.partial(pl.run_scoped, collective_axes="wg", **scopes)
    def _(a_smem, b_smem, out_smem, full, empty, turn=None, near_smem=None):
        wg = lax.axis_index("wg")
        cta = lax.axis_index("cluster")

        def starts_of(tile):
            # Mosaic must see that these are multiples, so a tile is carried by its number.
            batch, row, column = tile
            return batch, row * block_rows, column * results

        def each_tile(body, carry):
            @plgpu.nd_loop((problem.batch * row_tiles * column_tiles,), collective_axes="grid", init_carry=carry)
            def last(info, carry):
                (index,) = info.index
                if problem.batch == 1:
                    batch, inside = jnp.int32(0), index
                else:
                    batch = lax.div(index, jnp.int32(row_tiles * column_tiles))
                    inside = lax.rem(index, jnp.int32(row_tiles * column_tiles))
                row, column = plgpu.planar_snake(inside, (row_tiles, column_tiles), 1, tiles.band)
                first_step = info.local_index * (program.leaves * steps)
                down, right = (0, cta) if shares_rows else (cta, 0)
                tile = batch, row * across + down, column * along + right
                return body(tile, first_step, carry)

            return last

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def load_tile(tile, first_step, done):
                batch, row, column = starts_of(tile)

                def load(index, done):
                    leaf = lax.div(index, jnp.int32(steps))
                    k = lax.rem(index, jnp.int32(steps)) * DEPTH
                    step = first_step + index
                    slot = lax.rem(step, jnp.int32(stages))

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    where = {"k": k, "depth": DEPTH, "leaf": leaf, "batch": batch}
                    slots_of_b = [b_smem.at[slot]]
                    if problem.up is not None:
                        halves = [pl.ds(i * results, results) for i in range(2)]
                        slots_of_b = [
                            b_smem.at[(slot, h) if problem.b.k_major else (slot, slice(None), h)] for h in halves
                        ]
                    loads = [(problem.a, a_gmem, row, block_rows, a_smem.at[slot], shares_rows)]
                    for start, of_b in zip(problem.factors, slots_of_b, strict=True):
                        loads.append((problem.b, b_gmem, column + start, results, of_b, not shares_rows))
                    for operand, ref, start, size, smem, shared in loads:
                        plgpu.copy_gmem_to_smem(
                            operand.at(ref, start=start, size=size, **where),
                            smem,
                            full.at[slot],
                            collective_axes="cluster" if shared and tiles.cluster > 1 else None,
                        )
                    return done

                return lax.fori_loop(0, program.leaves * steps, load, done)

            each_tile(load_tile, jnp.int32(0))
            if tiles.cluster > 1:
                # A block must not leave while its neighbour still signals to it.
                total = _tiles_of_this_block(problem.batch * row_tiles * column_tiles) * (program.leaves * steps)

                def drain(step, _):
                    plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])
                    return _

                lax.fori_loop(lax.max(total - stages, 0), total, drain, None)

        @pl.when(wg != 2)
        def _():
            plgpu.set_max_registers(240, action="increase")
            if turn is not None:

                @pl.when(wg == 1)
                def _():
                    plgpu.barrier_arrive(turn.at[0])

            def multiply(leaf, first_step, held):
                """The value of a leaf, and what then waits first in registers; the result before it leaves meanwhile."""
                base = first_step + leaf * steps

                def in_turn(i, of_pair, act):
                    """At each step; but where two steps are one turn, not at the first (0) or second (1) of them."""
                    if turn is None:
                        return
                    if end_pairs:
                        pl.when(jnp.logical_and(i != of_pair, i != steps - 2 + of_pair))(act)
                    else:
                        act()

                def accumulate(acc):
                    def step(i):
                        slot = lax.rem(base + i, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        a = a_smem.at[slot]
                        if not problem.a.k_major:
                            a = plgpu.transpose_ref(a, (1, 0))
                        a = a.at[pl.ds(wg * ROWS, ROWS)]
                        b = b_smem.at[slot]
                        if problem.b.k_major:
                            b = plgpu.transpose_ref(b, (1, 0))
                        in_turn(i, 1, lambda: plgpu.barrier_wait(turn.at[wg]))
                        plgpu.wgmma(acc, a, b)
                        in_turn(i, 0, lambda: plgpu.barrier_arrive(turn.at[1 - wg]))
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[lax.rem(base + i - 1, jnp.int32(stages))])

                    def step_and_leave(i, waiting):
                        step(i)
                        return leave_at(i - late, held, waiting)

                    def step_and_store(i, waiting):
                        step(i)
                        return store_at(i - late, held, waiting)

                    def step_alone(i, done):
                        step(i)
                        return done

                    # Loops of their own, since most steps have nothing that leaves, and must not be late.
                    first = lax.select(held.node >= 0, jnp.int32(rounds + late), jnp.int32(0))
                    waiting = lax.fori_loop(0, first, step_and_leave, held.values[0] if program.storages else None)
                    if late_sums:
                        stored = lax.select(held.storage >= 0, jnp.int32(store_rounds + late), jnp.int32(0))
                        waiting = lax.fori_loop(0, stored, step_and_store, waiting)
                        first = first + stored  # one of them is 0
                    lax.fori_loop(first, steps, step_alone, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(base + steps - 1, jnp.int32(stages))])
                    return acc[...], waiting

                return pl.run_scoped(accumulate, plgpu.ACC((ROWS, columns), jnp.float32))

            # No piece may lie behind the result: Mosaic drops a dimension that has one piece, and its start with it.
            starts = range(0, min(results, -(-problem.n // width) * width), width)
            each = -(-len(starts) // (steps - late))
            rounds = -(-len(starts) // each)  # steps of the next leaf with which pieces leave
            store_each = -(-accesses // (steps - late))
            store_rounds = -(-accesses // store_each)

            def leave_at(step, held, waiting):
                """The pieces that are due with a ``step`` of the next leaf; after the last of them nothing waits any more."""
                value = waiting if program.storages else held.values[0]
                for number in range(rounds):

                    @pl.when(step == number)
                    def _(number=number):
                        leave(starts[number * each : (number + 1) * each], value, held.node, held.tile)

                return lax.cond(step == rounds - 1, nothing, lambda: waiting) if program.storages else waiting

            def store_at(step, held, waiting):
                """As :func:`leave_at`, of a sum on its way to memory."""
                for number in range(store_rounds):

                    @pl.when(step == number)
                    def _(number=number):
                        for place in range(sums, program.storages):

                            @pl.when(held.storage == place)
                            def _(place=place):
                                settling.store(waiting, storage(place), number * store_each, (number + 1) * store_each)

                return lax.cond(step == store_rounds - 1, nothing, lambda: waiting)

            def leave(starts, value, node, tile):
                batch, row, column = starts_of(tile)
                # Mosaic takes no index into a dimension of one but 0.
                node, batch = (node if len(program.ends) > 1 else 0), (batch if problem.batch > 1 else 0)
                where = {"s": node, "b": batch, "m": pl.ds(row + wg * ROWS, ROWS)}
                for start in starts:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_smem[wg] = value[:, start : start + width].astype(problem.out_dtype)
                    plgpu.commit_smem()
                    where["n"] = pl.ds(column + start, width)
                    there = out_gmem.at[tuple(where[axis] for axis in problem.out_axes)]
                    plgpu.copy_smem_to_gmem(out_smem.at[wg], there)

            def result(value):
                """Of a product of one leaf: rounded, gated."""
                value = value.astype(problem.out_dtype)
                if problem.up is None:
                    return value
                # Here, not when it leaves: the compiler would move it in front of all steps anyway, and spill.
                gate, up = (value[:, start : start + results].astype(jnp.float32) for start in (0, results))
                gated = simt.elementwise(lambda m, g, u: formulas.swiglu(m, g, u)[0], gate, up)
                return gated.astype(problem.out_dtype)

            block = lax.axis_index("grid") * tiles.cluster + cta

            def storage(number):
                start, stop = ((number - sums) * accesses, (number - sums + 1) * accesses)
                here, there = min(max(near, start), stop) - start, stop - max(near, start)
                refs = []
                if here > 0:
                    refs.append(near_smem.at[wg, pl.ds(start * settling.WORDS, here * settling.WORDS)])
                if there > 0:
                    at = (stop - there - near) * settling.WORDS
                    refs.append(far_gmem.at[block, wg, pl.ds(at, there * settling.WORDS)])
                return refs

            def holds(leaf, of_step):
                return _holds(program.mask(of_step), leaf, program.leaves)

            def stops(leaf):
                """Where the value of a leaf goes from the registers' first sum on."""
                for number in range(1, program.storages):
                    pops = holds(leaf, lambda step, number=number: number in step.pops).astype(jnp.int32)
                    pushes = holds(leaf, lambda step, number=number: step.push == number).astype(jnp.int32)
                    if number < sums:
                        yield settling.Stop(pops, pushes, register=number)
                    else:
                        yield settling.Stop(pops, pushes, refs=storage(number), late=late_sums)

            def nothing():
                # Where nothing waits in registers, -0 does: -0 + x is x for every x.
                return plgpu.layout_cast(jnp.full((ROWS, columns), -0.0, jnp.float32), plgpu.Layout.WGMMA)

            def compute_tile(tile, first_step, held):
                def after(leaf, held):
                    value, waiting = multiply(leaf, first_step, held)
                    ends = _holds(sum(1 << end for end in program.ends), leaf, program.leaves)
                    node = sum(((leaf > end).astype(jnp.int32) for end in program.ends[:-1]), jnp.int32(0))
                    node = lax.select(ends, node, jnp.int32(-1))
                    goes_to = jnp.int32(-1)
                    if not program.storages:
                        return _Held((result(value),), node, goes_to, tile)
                    if program.storages == 1:
                        return _Held((waiting + value,), node, goes_to, tile)
                    for place in range(sums, program.storages) if late_sums else ():
                        goes = holds(leaf, lambda step, place=place: step.push == place)
                        goes_to = lax.select(goes, jnp.int32(place), goes_to)
                    values = settling.settle(value, (waiting, *held.values[1:]), tuple(stops(leaf)))
                    return _Held(values, node, goes_to, tile)

                if program.leaves == 1:
                    return after(jnp.int32(0), held)
                return lax.fori_loop(0, program.leaves, after, held)

            values = [nothing()] * sums if program.storages else [result(nothing())]
            held = each_tile(compute_tile, _Held(tuple(values), jnp.int32(-1), jnp.int32(-1), (jnp.int32(0),) * 3))
            pl.when(held.node >= 0)(lambda: leave(starts, held.values[0], held.node, held.tile))
            plgpu.wait_smem_to_gmem(0)


class _Held(NamedTuple):
    """What a computing warpgroup has in registers between leaves.

    ``values[0]`` is node number ``node`` of ``tile``, which leaves with the next leaf's first steps, or a sum on its way to
    memory, to that ``storage``; if both are -1, a sum that waits, as the other values do.
    """

    values: tuple[Array, ...]
    node: Array
    storage: Array
    tile: tuple[Array, Array, Array]


def _tiles_of_this_block(total: int) -> Array:
    grid = lax.axis_size("grid")
    return lax.div(jnp.int32(total) - lax.axis_index("grid") + jnp.int32(grid - 1), jnp.int32(grid))


def _holds(mask: int, leaf: Array, leaves: int) -> Array:
    """Bit ``leaf`` of a mask known when the kernel is written."""
    words = [(mask >> shift) & 0xFFFFFFFF for shift in range(0, max(leaves, 1), 32)]
    word = jnp.int32(_signed(words[0]))
    for i, value in enumerate(words[1:], 1):
        word = lax.select(lax.div(leaf, jnp.int32(32)) == i, jnp.int32(_signed(value)), word)
    return (lax.shift_right_logical(word, lax.rem(leaf, jnp.int32(32))) & 1) != 0


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
