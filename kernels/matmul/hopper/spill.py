"""Accumulators that wait in memory, each thread's registers side by side with its neighbours'.

Only the thread that stored a sum reads it again, so the layout is free: 16 bytes per thread and access, neighbouring
threads at neighbouring addresses. No bank conflicts in shared memory, whole lines in device memory, no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Array = jax.Array
_THREADS = 128


#: 32-bit words of one access of a warpgroup, 16 bytes per thread.
WORDS = 4 * _THREADS


def accesses(rows: int, columns: int) -> int:
    """How many accesses move a tile."""
    return -(-rows * columns // WORDS)


def store(refs: Sequence[Any], value: Array) -> None:
    """``refs`` f32 ``[accesses * WORDS]`` in shared or device memory, one after the other; ``value`` as wgmma leaves it."""

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WGMMA))
    def write(ctx: Any, *refs_and_value: Any) -> None:
        *refs, value = refs_and_value
        for address, quad in zip(_addresses(refs), quads(value), strict=True):
            llvm.store(quad, address, alignment=16)

    write(*refs, value)


def load_add(refs: Sequence[Any], value: Array) -> Array:
    """What waits in ``refs``, plus ``value``."""

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct(value.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def read(ctx: Any, *refs_and_value: Any) -> Any:
        *refs, value = refs_and_value
        pairs, total = list(value.registers.flat), []
        quad_type = ir.VectorType.get((4,), ir.F32Type.get())
        for i, address in enumerate(_addresses(refs)):
            quad = llvm.load(quad_type, address, alignment=16)
            for j, pair in enumerate(pairs[2 * i : 2 * i + 2]):
                waiting = vector.extract_strided_slice(pair.type, quad, [2 * j], [2], [1])
                total.append(arith.addf(waiting, pair))
        registers = value.registers.copy()
        registers.flat = total
        return mgpu.FragmentedArray(_registers=registers, _layout=value.layout, _is_signed=value.is_signed)

    return read(*refs, value)


def quads(value: Any) -> list[Any]:
    """A thread's values of an accumulator by fours: two rows, 8 apart, of two neighbouring columns."""
    pairs = list(value.registers.flat)
    return [vector.shuffle(pairs[i], pairs[i + 1], [0, 1, 2, 3]) for i in range(0, len(pairs), 2)]


def _addresses(refs: Sequence[Any]) -> list[Any]:
    utils = mgpu.utils
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    offset, found = arith.muli(thread, utils.c(4, i32)), []
    for ref in refs:
        mine = utils.getelementptr(utils.memref_ptr(ref), [offset], ir.F32Type.get())
        count = ir.MemRefType(ref.type).shape[0] // WORDS
        found += [utils.getelementptr(mine, [WORDS * i], ir.F32Type.get()) for i in range(count)]
    return found
