"""What follows a leaf: its value meets the sums that wait for it, in registers or in memory, and waits itself.

In memory each thread's registers lie side by side with its neighbours'. Only the thread that stored a sum reads it again, so
the layout is free: 16 bytes per thread and access, neighbouring threads at neighbouring addresses. No bank conflicts in shared
memory, whole lines in device memory, no barrier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    threads, and not known when the kernel is written. ``late``: a sum that stays in memory is left in ``sums[0]``, for
    :func:`store` to move.
    """

    pops: Array
    pushes: Array
    register: int | None = None
    refs: Sequence[Any] = ()
    late: bool = False


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
        left = iter(arguments)
        of_refs, of_flags = (iter(list(itertools.islice(left, count))) for count in (len(refs), len(flags)))
        value, *sums = left
        size = 2 * value.registers.size
        asm = _Assembly([scalar for x in sums for scalar in _scalars(x)])
        leaf = [asm.operand("f", scalar) for scalar in _scalars(value)]
        total, *others = [[f"${i * size + e}" for e in range(size)] for i in range(len(sums))]
        named = []
        for stop in stops:
            pops, pushes = (asm.operand("r", next(of_flags).registers.item()) for _ in range(2))
            places = [place for _ in stop.refs for place in asm.places(next(of_refs))]
            here = None if stop.register is None else others[stop.register - 1]
            named.append(Named(pops, pushes, here, places, stop.late))
        found = asm.run(written(total, leaf, named))
        return tuple(_array(found[i * size : (i + 1) * size], x) for i, x in enumerate(sums))

    return tuple(run(*refs, *flags, value, *sums))


def store(value: Array, refs: Sequence[Any], first: int, last: int) -> None:
    """Move accesses ``first`` to ``last - 1`` of a sum to memory, where :func:`settle` finds them: ``refs`` of a stop."""

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WGMMA))
    def run(ctx: Any, *arguments: Any) -> None:
        *refs, value = arguments
        scalars, at = _scalars(value), 0
        for ref in refs:
            space, base, count = _mine(ref)
            for i in range(max(first - at, 0), min(last - at, count)):
                four = scalars[4 * (at + i) : 4 * (at + i) + 4]
                mgpu.utils.inline_ptx(
                    f"st{space}.v4.f32 [$4+{4 * WORDS * i}], {{$0, $1, $2, $3}};", *four, base, has_side_effects=True
                )
            at += count

    run(*refs, value)


class Named(NamedTuple):
    """A stop as PTX names it: flags, its registers if it has them, else a thread's accesses: state space and address."""

    pops: str
    pushes: str
    registers: Sequence[str] | None
    places: Sequence[tuple[str, str]]
    late: bool = False


def written(total: Sequence[str], leaf: Sequence[str], stops: Sequence[Named]) -> list[str]:
    """The instructions of :func:`settle` for registers of those names. ``p`` and ``w0`` to ``w3`` are free."""
    lines = [f"add.rn.f32 {t}, {t}, {x};" for t, x in zip(total, leaf, strict=True)]
    for number, stop in enumerate(stops):
        lines += [f"setp.ne.b32 p, {stop.pops}, 0;", f"@!p bra.uni NOTHING{number};"]
        if stop.registers is not None:
            lines += [f"add.rn.f32 {t}, {x}, {t};" for t, x in zip(total, stop.registers, strict=True)]
        for i, (space, address) in enumerate(stop.places):
            lines.append(f"ld{space}.v4.f32 {{w0, w1, w2, w3}}, [{address}];")
            lines += [f"add.rn.f32 {t}, w{e}, {t};" for e, t in enumerate(total[4 * i : 4 * i + 4])]
        lines += [f"NOTHING{number}:", f"setp.ne.b32 p, {stop.pushes}, 0;", f"@!p bra.uni ON{number};"]
        if stop.late:
            lines += ["bra.uni DONE;", f"ON{number}:"]
            continue
        if stop.registers is not None:
            lines += [f"mov.b32 {x}, {t};" for t, x in zip(total, stop.registers, strict=True)]
        for i, (space, address) in enumerate(stop.places):
            lines.append(f"st{space}.v4.f32 [{address}], {{{', '.join(total[4 * i : 4 * i + 4])}}};")
        lines += [f"mov.b32 {t}, 0x80000000;" for t in total]
        lines += ["bra.uni DONE;", f"ON{number}:"]
    return [*lines, "DONE:"]


class _Assembly:
    """PTX whose first operands, f32, change in place."""

    def __init__(self, changing: Sequence[Any]) -> None:
        self.changing = list(changing)
        self.given: list[Any] = []
        self.constraints: list[str] = []

    def operand(self, constraint: str, value: Any) -> str:
        self.given.append(value)
        self.constraints.append(constraint)
        return f"${2 * len(self.changing) + len(self.given) - 1}"

    def places(self, ref: Any) -> list[tuple[str, str]]:
        """The state space and the address of each of a thread's accesses."""
        space, base, count = _mine(ref)
        name = self.operand("r" if space == ".shared" else "l", base)
        return [(space, f"{name}+{4 * WORDS * i}") for i in range(count)]

    def run(self, lines: Sequence[str]) -> list[Any]:
        count, f32 = len(self.changing), ir.F32Type.get()
        constraints = [*["=f"] * count, *[str(i) for i in range(count)], *self.constraints]
        found: Any = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count),
            [*self.changing, *self.given],
            "{ .reg .pred p; .reg .f32 w0, w1, w2, w3;\n" + "\n".join(lines) + "\n}",
            ",".join(constraints),
            asm_dialect=0,
            has_side_effects=True,
        )
        return [llvm.extractvalue(f32, found, [i]) for i in range(count)]


def _mine(ref: Any) -> tuple[str, Any, int]:
    """State space, address of a thread's first access, and how many there are, a warpgroup's accesses apart."""
    utils = mgpu.utils
    shared = utils.is_smem_ref(ref)
    i32 = ir.IntegerType.get_signless(32)
    thread = arith.remui(utils.thread_idx(), utils.c(_THREADS, i32))
    mine = utils.getelementptr(utils.memref_ptr(ref), [arith.muli(thread, utils.c(4, i32))], ir.F32Type.get())
    base = llvm.ptrtoint(i32 if shared else ir.IntegerType.get_signless(64), mine)
    return ".shared" if shared else ".global", base, ir.MemRefType(ref.type).shape[0] // WORDS


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
