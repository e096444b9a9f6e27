"""Accumulators that wait in memory, each thread's registers side by side with its neighbours'.

Only the thread that stored a sum reads it again, so the layout is free: 16 bytes per thread and access, neighbouring
threads at neighbouring addresses. No bank conflicts in shared memory, whole lines in device memory, no barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Stop:
    """A storage on the way of a leaf's value: in registers, number ``register`` there, or in memory, at ``refs``.

    ``pops``: whether what waits there is added; ``pushes``: whether the sum then stays there. Both are i32, the same for all
    threads, and not known when the kernel is written.
    """

    pops: Array
    pushes: Array
    register: int | None = None
    refs: Sequence[Any] = ()


def settle(value: Array, sums: Sequence[Array], stops: Sequence[Stop]) -> tuple[Array, ...]:
    """A leaf's value, added to ``sums[0]``, goes from stop to stop until it stays at one; else it remains as ``sums[0]``.

    ``sums`` are what waits in registers, -0 as the first of them if that is nothing: -0 + x is x for every x. All arrays are
    f32, as wgmma leaves them; ``refs`` are f32 ``[accesses * WORDS]`` in shared or device memory, one after the other.

    One piece of PTX, so that every sum keeps its registers: as values of branches each would be copied more than once a leaf.
    """
    layout = plgpu.Layout.WGMMA
    refs = [ref for stop in stops for ref in stop.refs]
    flags = [flag for stop in stops for flag in (stop.pops, stop.pushes)]

    @plgpu.inline_mgpu(
        arg_types=(
            *[plgpu.RefType()] * len(refs),
            *[plgpu.Layout.WG_SPLAT(())] * len(flags),
            *[layout] * (1 + len(sums)),
        ),
        return_type=tuple(plgpu.ShapeDtypeStruct(value.shape, jnp.float32, layout=layout) for _ in sums),
    )
    def run(ctx: Any, *arguments: Any) -> Any:
        arguments = list(arguments)
        refs, flags, (value, *sums) = (
            [arguments.pop(0) for _ in range(count)] for count in (len(of_stops), len(of_flags), 1 + len(of_sums))
        )
        size = 2 * value.registers.size
        asm = _Assembly([scalar for x in sums for scalar in _scalars(x)])
        leaf = [asm.operand("f", scalar) for scalar in _scalars(value)]
        total, *others = ([f"${i * size + e}" for e in range(size)] for i in range(len(sums)))
        asm.lines += [f"add.rn.f32 {t}, {t}, {x};" for t, x in zip(total, leaf, strict=True)]
        for number, stop in enumerate(stops):
            pops, pushes = (asm.operand("r", flags.pop(0).registers.item()) for _ in range(2))
            places = [asm.place(refs.pop(0)) for _ in stop.refs]
            asm.lines += [f"setp.ne.b32 p, {pops}, 0;", f"@!p bra.uni NOTHING{number};"]
            if stop.register is not None:
                asm.lines += [
                    f"add.rn.f32 {t}, {x}, {t};" for t, x in zip(total, others[stop.register - 1], strict=True)
                ]
            for i, place in enumerate(place for of_ref in places for place in of_ref):
                quad = total[4 * i : 4 * i + 4]
                asm.lines.append(f"ld{place[0]}.v4.f32 {{w0, w1, w2, w3}}, {place[1]};")
                asm.lines += [f"add.rn.f32 {t}, w{e}, {t};" for e, t in enumerate(quad)]
            asm.lines += [f"NOTHING{number}:", f"setp.ne.b32 p, {pushes}, 0;", f"@!p bra.uni ON{number};"]
            if stop.register is not None:
                asm.lines += [f"mov.f32 {x}, {t};" for t, x in zip(total, others[stop.register - 1], strict=True)]
            for i, place in enumerate(place for of_ref in places for place in of_ref):
                asm.lines.append(f"st{place[0]}.v4.f32 {place[1]}, {{{', '.join(total[4 * i : 4 * i + 4])}}};")
            asm.lines += [f"mov.b32 {t}, 0x80000000;" for t in total]
            asm.lines += ["bra.uni DONE;", f"ON{number}:"]
        asm.lines.append("DONE:")
        found = asm.run()
        return tuple(_array(found[i * size : (i + 1) * size], x) for i, x in enumerate(sums))

    of_stops, of_flags, of_sums = refs, flags, sums
    return tuple(run(*refs, *flags, value, *sums))


class _Assembly:
    """PTX whose first operands, f32, change in place."""

    def __init__(self, changing: Sequence[Any]) -> None:
        self.changing, self.given, self.constraints, self.lines = list(changing), [], [], []

    def operand(self, constraint: str, value: Any) -> str:
        self.given.append(value)
        self.constraints.append(constraint)
        return f"${2 * len(self.changing) + len(self.given) - 1}"

    def place(self, ref: Any) -> list[tuple[str, str]]:
        """The state space and the address of each of a thread's accesses."""
        utils = mgpu.utils
        pointer = utils.memref_ptr(ref)
        shared = utils.is_smem_ref(ref)
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
        mine = utils.getelementptr(pointer, [arith.muli(thread, utils.c(4, i32))], ir.F32Type.get())
        integer = i32 if shared else ir.IntegerType.get_signless(64)
        name = self.operand("r" if shared else "l", llvm.ptrtoint(integer, mine))
        count = ir.MemRefType(ref.type).shape[0] // WORDS
        return [(".shared" if shared else ".global", f"[{name} + {4 * WORDS * i}]") for i in range(count)]

    def run(self) -> list[Any]:
        count, f32 = len(self.changing), ir.F32Type.get()
        constraints = [*["=f"] * count, *[str(i) for i in range(count)], *self.constraints]
        found = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*self.changing, *self.given],
            "{ .reg .pred p; .reg .f32 w0, w1, w2, w3;\n" + "\n".join(self.lines) + "\n}",
            ",".join(constraints),
            asm_dialect=0,
            has_side_effects=True,
        )
        return [llvm.extractvalue(f32, found, [i]) for i in range(count)]


def _scalars(x: Any) -> list[Any]:
    return [vector.extract(pair, [], [i]) for pair in x.registers.flat for i in range(2)]


def _array(scalars: Sequence[Any], like: Any) -> Any:
    registers = like.registers.copy()
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers.flat = [vector.from_elements(pair, list(scalars[i : i + 2])) for i in range(0, len(scalars), 2)]
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=like.is_signed)


def quads(value: Any) -> list[Any]:
    """A thread's values of an accumulator by fours: two rows, 8 apart, of two neighbouring columns."""
    pairs = list(value.registers.flat)
    return [vector.shuffle(pairs[i], pairs[i + 1], [0, 1, 2, 3]) for i in range(0, len(pairs), 2)]
