"""Accumulators that wait in memory, each thread's registers side by side with its neighbours'.

Only the thread that stored a sum reads it again, so the layout is free: 16 bytes per thread and access, neighbouring
threads at neighbouring addresses. No bank conflicts in shared memory, whole lines in device memory, no barrier.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

Array = jax.Array
_THREADS = 128


def words(rows: int, columns: int) -> int:
    """32-bit words that a tile takes, in whole 16-byte accesses of a warpgroup."""
    return -(-rows * columns // (4 * _THREADS)) * 4 * _THREADS


def store(ref: Any, value: Array) -> None:
    """``ref [words]`` f32 in shared or device memory; ``value`` in the layout of a wgmma accumulator."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def write(ctx: Any, ref: Any, value: Any) -> None:
        values = quads(value)
        for address, quad in zip(_addresses(ref, len(values)), values, strict=True):
            llvm.store(quad, address, alignment=16)

    write(ref, value)


def load_add(ref: Any, value: Array) -> Array:
    """What waits in ``ref``, plus ``value``."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct(value.shape, jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def read(ctx: Any, ref: Any, value: Any) -> Any:
        pairs, total = list(value.registers.flat), []
        quad_type = ir.VectorType.get((4,), ir.F32Type.get())
        for i, address in enumerate(_addresses(ref, len(pairs) // 2)):
            quad = llvm.load(quad_type, address, alignment=16)
            for j, pair in enumerate(pairs[2 * i : 2 * i + 2]):
                waiting = vector.extract_strided_slice(pair.type, quad, [2 * j], [2], [1])
                total.append(arith.addf(waiting, pair))
        registers = value.registers.copy()
        registers.flat = total
        return mgpu.FragmentedArray(_registers=registers, _layout=value.layout, _is_signed=value.is_signed)

    return read(ref, value)


def quads(value: Any) -> list[Any]:
    """A thread's values of an accumulator by fours: two rows, 8 apart, of two neighbouring columns."""
    pairs = list(value.registers.flat)
    return [vector.shuffle(pairs[i], pairs[i + 1], [0, 1, 2, 3]) for i in range(0, len(pairs), 2)]


def _addresses(ref: Any, quads: int) -> list[Any]:
    utils = mgpu.utils
    i32 = ir.IntegerType.get_signless(32)
    base = utils.memref_ptr(ref)
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    mine = utils.getelementptr(base, [arith.muli(thread, utils.c(4, i32))], ir.F32Type.get())
    return [utils.getelementptr(mine, [4 * _THREADS * i], ir.F32Type.get()) for i in range(quads)]
