"""The canonical sum over the GPUs of one host in one kernel, which reads and writes its peers' memory over NVLink.

Measured and dropped: products whose tiles leave by TMA for the rank that adds them, so that this kernel reads its own memory
only. Prefill of 36 layers on two H200 took 1.08 of plain numerics, 1.06 to 1.08 without; chains 1.28 instead of 1.36. A block
whose stores wait for NVLink does not multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.typing import DTypeLike

from tbik_jax.kernels import backend
from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.operands import unsliced

Array = jax.Array
_CHUNK = 4  # elements: 16 bytes of f32, so that the loads of a warp lie side by side
_LOADS = 16  # chunks that a thread has on their way
_BLOCKS_PER_SM = 2

#: ``values[rank][i]`` of one element, and how to add two -> the root; `Schedule.finish`.
Finish = Callable[[list[list[Any]], Callable[[Any, Any], Any]], Any]

#: More nodes than that would not fit a thread's registers.
MOST_NODES = 32


def tree_sum(
    nodes: Array, axis_name: str, counts: Sequence[int], finish: Finish, *, dtype: DTypeLike, scatter: bool = False
) -> Array:
    """``nodes [width, n]`` f32 of every rank -> their root ``[n]``, rounded once to ``dtype``, on every rank.

    Rank r adds the r-th slice, for which it reads everybody's nodes, and writes it to everybody's result; with ``scatter`` it
    keeps the slice ``[n / ranks]``. At the end the ranks wait for each other: nobody's memory has another use while a peer
    reads it, and all slices are there.

    Args:
        nodes: Node i of this rank in row i.
        axis_name: Axis of the mesh, all of whose devices belong to this process.
        counts: How many nodes each rank has; rows behind them are not read.
        finish: The additions.
    """
    ranks, n = len(counts), nodes.shape[1]
    chunk = math.gcd(n // ranks if scatter else n, _CHUNK)
    each = -(-n // (chunk * ranks))  # chunks of a slice
    most = _BLOCKS_PER_SM * backend.multiprocessors()
    unroll = max(1, min(_LOADS // sum(counts), each // (simt.THREADS * most)))
    blocks = max(1, min(most, -(-each // (simt.THREADS * unroll))))
    program = partial(
        _sum,
        counts=tuple(counts),
        finish=finish,
        n=n,
        chunk=chunk,
        each=each,
        unroll=unroll,
        blocks=blocks,
        own=scatter,
    )
    size = n // ranks if scatter else n
    return _launch(program, blocks, axis_name, ranks, nodes, jax.ShapeDtypeStruct((size,), dtype), of_all=not scatter)


def _sum(
    m: Any,
    rank: Any,
    sources: Sequence[Any],
    targets: Sequence[Any],
    *,
    counts: tuple[int, ...],
    finish: Finish,
    n: int,
    chunk: int,
    each: int,
    unroll: int,
    blocks: int,
    own: bool,
) -> None:
    """A thread has every so many chunks of this rank's slice; ``own``: the result begins with it."""
    start = rank * (each * chunk) if n < 2**31 else m.wide(rank) * (each * chunk)

    def turn(i: Any, _: list[Any]) -> list[Any]:
        first = (i * blocks + m.block) * (simt.THREADS * unroll) + m.thread
        chunks = [first + u * simt.THREADS for u in range(unroll)]
        places = [m.wide(at) * chunk for at in chunks]
        inside = [(at < each) & (place + start < n) for at, place in zip(chunks, places, strict=True)]
        loaded = [
            [
                [m.load(ref, place + start + w * n, chunk, where) for w in range(count)]
                for ref, count in zip(sources, counts, strict=True)
            ]
            for place, where in zip(places, inside, strict=True)
        ]
        for place, where, nodes in zip(places, inside, loaded, strict=True):
            of_element = [[[node[e] for node in of_rank] for of_rank in nodes] for e in range(chunk)]
            total = [finish(values, lambda a, b: a + b) for values in of_element]
            for ref in targets:
                m.store(ref, place if own else place + start, total, where)
        return []

    m.loop(-(-each // (simt.THREADS * unroll * blocks)), [], turn)


def _launch(
    program: Callable[..., None], blocks: int, axis_name: str, ranks: int, x: Array, out: Any, *, of_all: bool
) -> Array:
    """``program(machine, rank, everybody's x, results)``: everybody's results ``of_all``, or one's own."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    devices = [{axis_name: rank} for rank in range(ranks)]

    def body(x: Any, result: Any) -> None:
        sources = [plgpu.remote_ref(x, device) for device in devices]
        targets = [plgpu.remote_ref(result, device) for device in devices] if of_all else [result]
        arrays = [*sources, *targets]

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(arrays), *[plgpu.Layout.WG_SPLAT(())] * 2))
        def run(ctx: Any, *arguments: Any) -> None:
            *refs, block, rank = arguments
            machine = simt.Machine(block.registers.item(), None)
            program(machine, simt.Int(rank.registers.item()), refs[:ranks], refs[ranks:])

        run(*arrays, lax.axis_index("grid"), lax.axis_index(axis_name))

    return meeting_kernel("tree_sum_of_peers", body, blocks, devices, (x,), out)


def meeting_kernel(
    name: str,
    body: Callable[..., None],
    blocks: int,
    devices: Sequence[dict[str, int]],
    inputs: Sequence[Array],
    out: Any,
) -> Any:
    """``body(*inputs, *outputs)`` in so many blocks, each of which ends when the same block of every device has.

    What a block has written anywhere is there for the others when it ends.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def run(*refs: Any) -> None:
        *arrays, arrived = refs
        body(*arrays)
        for device in devices:  # its own included; a signal releases what the block has written
            pl.semaphore_signal(arrived, device_id=device)
        pl.semaphore_wait(arrived, len(devices), decrement=False)

    run.__name__ = name
    return plgpu.kernel(
        run,
        out_type=out,
        grid=(blocks,),
        grid_names=("grid",),
        scratch_types=[plgpu.SemaphoreType.REGULAR],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*unsliced(*inputs))
