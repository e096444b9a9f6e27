"""One thread's view of a Hopper GPU: numbers, memory, neighbours.

A kernel here is a Python function of a `Machine` and of its arrays; the machine writes instructions where the function
computes. Another machine with the same methods may run it (tests do, in NumPy).

Additions are ``add.rn``, which no compiler fuses with the product that it adds: a sum is fused where `Machine.fma` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from tbik_jax.kernels.operands import unsliced

Array = jax.Array

THREADS = 128
WARP = 32
WARPS = THREADS // WARP


def launch(
    program: Callable[..., None],
    blocks: int,
    inputs: Sequence[Array],
    out: Any,
    *,
    shared: int = 0,
    slots: int = 0,
    in_place: Sequence[Array] = (),
    changed: Sequence[Array] = (),
) -> Any:
    """Run ``program(machine, *inputs, *in_place, *changed, *outputs)`` in every thread of so many blocks of 128.

    ``out`` is one or several ``jax.ShapeDtypeStruct``; ``shared`` the words that `Machine.of_warps` exchanges at most at once;
    ``slots`` of 16 bytes of shared memory every thread has for itself; ``in_place`` whole arrays of which no copy will do.
    ``changed`` are arrays that the program writes parts of: what has become of them is returned instead of ``out``, in their
    memory where the program around does not need them as they were. Their types name no axes of a mesh: no kernel changes
    others (JAX 0.12 still).
    """
    scratch = [2 * shared * WARPS] * bool(shared) + [4 * slots * THREADS] * bool(slots)

    def body(*refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), plgpu.Layout.WG_SPLAT(())))
        def run(ctx: Any, *arguments: Any) -> None:
            *arrays, block = arguments
            own = arrays.pop() if slots else None
            exchange = arrays.pop() if shared else None
            program(Machine(block.registers.item(), exchange, own), *arrays)

        run(*refs, lax.axis_index("grid"))

    body.__name__ = getattr(program, "__name__", None) or program.func.__name__
    memory = [jax.new_ref(x) for x in changed]
    made = plgpu.kernel(
        body,
        out_type=out,
        grid=(blocks,),
        grid_names=("grid",),
        scratch_types=[plgpu.SMEM((words,), jnp.float32) for words in scratch],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*unsliced(*inputs), *in_place, *memory)
    return [ref[...] for ref in memory] if changed else made


def elementwise(f: Callable[..., Float], *arrays: Array) -> Array:
    """``f(arithmetic, *elements)`` of f32 accumulators of the tensor cores, inside a kernel in warpgroup semantics."""
    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout,) * len(arrays),
        return_type=plgpu.ShapeDtypeStruct(arrays[0].shape, jnp.float32, layout=layout),
    )
    def run(ctx: Any, *values: Any) -> Any:
        registers = values[0].registers.copy()
        for place in np.ndindex(registers.shape):
            vectors = [value.registers[place] for value in values]
            result = llvm.mlir_undef(vectors[0].type)
            for i in range(vectors[0].type.shape[0]):
                at = mgpu.utils.c(i, _i32())
                elements = [Float(llvm.extractelement(x, at)) for x in vectors]
                result = llvm.insertelement(result, f(Arithmetic(), *elements).value, at)
            registers[place] = result
        return mgpu.FragmentedArray(_registers=registers, _layout=values[0].layout, _is_signed=values[0].is_signed)

    return run(*arrays)


class Int:
    """A signed integer of 32 bits, or of 64 where one operand has so many."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _both(self, other: Int | int) -> tuple[Any, Any]:
        if not isinstance(other, Int):
            return self.value, mgpu.utils.c(other, self.value.type)
        a, b = (x if x.value.type == self._wider(other) else x.wide() for x in (self, other))
        return a.value, b.value

    def _wider(self, other: Int) -> Any:
        return max(self.value.type, other.value.type, key=lambda type_: ir.IntegerType(type_).width)

    def wide(self) -> Int:
        return Int(arith.extsi(ir.IntegerType.get_signless(64), self.value))

    def __add__(self, other: Int | int) -> Int:
        return Int(arith.addi(*self._both(other)))

    def __sub__(self, other: Int | int) -> Int:
        return Int(arith.subi(*self._both(other)))

    def __mul__(self, other: Int | int) -> Int:
        return Int(arith.muli(*self._both(other)))

    def __floordiv__(self, other: int) -> Int:  # of numbers that are not negative
        return Int(arith.divui(*self._both(other)))

    def __mod__(self, other: int) -> Int:
        return Int(arith.remui(*self._both(other)))

    def __lt__(self, other: Int | int) -> Int:
        return Int(arith.cmpi(arith.CmpIPredicate.slt, *self._both(other)))

    def __gt__(self, other: Int | int) -> Int:
        return Int(arith.cmpi(arith.CmpIPredicate.sgt, *self._both(other)))

    def __eq__(self, other: object) -> Int:  # type: ignore[override]
        assert isinstance(other, int)
        return Int(arith.cmpi(arith.CmpIPredicate.eq, *self._both(other)))

    __hash__ = None  # type: ignore[assignment]
    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Int | bool) -> Int:
        if isinstance(other, bool):
            assert other
            return self
        return Int(arith.andi(self.value, other.value))

    __rand__ = __and__


class Float:
    """An f32; every operator rounds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __mul__(self, other: Float | float) -> Float:
        return Float(arith.mulf(self.value, _float(other)))

    def __add__(self, other: Float | float) -> Float:
        return _ptx("add.rn.f32 $0, $1, $2;", self, other)

    def __sub__(self, other: Float | float) -> Float:
        return _ptx("sub.rn.f32 $0, $1, $2;", self, other)

    def __rsub__(self, other: float) -> Float:
        return _ptx("sub.rn.f32 $0, $1, $2;", other, self)

    def __neg__(self) -> Float:
        return _ptx("neg.f32 $0, $1;", self)

    __rmul__, __radd__ = __mul__, __add__


def _f32() -> Any:
    return ir.F32Type.get()


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _float(x: Float | float) -> Any:
    return x.value if isinstance(x, Float) else mgpu.utils.c(float(np.float32(x)), _f32())


def _ptx(text: str, *operands: Float | float) -> Float:
    return Float(mgpu.utils.inline_ptx(text, *map(_float, operands), result_types=_f32()))


class Arithmetic:
    """What a thread can compute besides sums and products."""

    def zero(self) -> Float:
        return Float(_float(0.0))

    def wide(self, x: Int) -> Int:
        return x.wide()

    def fma(self, a: Float, b: Float | float, c: Float | float) -> Float:
        """``a * b + c``, rounded once."""
        return _ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def maximum(self, a: Float, b: Float | float) -> Float:
        """NaN where either is; +0 of two zeros."""
        return _ptx("max.NaN.f32 $0, $1, $2;", a, b)

    def clip(self, x: Float, low: float, high: float) -> Float:
        """NaN stays."""
        return _ptx("min.NaN.f32 $0, $1, $2;", self.maximum(x, low), high)

    def exp2(self, x: Float) -> Float:
        """The instruction; within 2**-22, and 0 below 2**-126."""
        return _ptx("ex2.approx.ftz.f32 $0, $1;", x)

    def about_inverse(self, x: Float) -> Float:
        """``1 / x`` by the instruction; within a unit in the last place, and 0 below 2**-126."""
        return _ptx("rcp.approx.ftz.f32 $0, $1;", x)

    def inverse(self, x: Float) -> Float:
        """``1 / x``, correctly rounded."""
        return _ptx("rcp.rn.f32 $0, $1;", x)

    def sqrt(self, x: Float) -> Float:
        """Correctly rounded."""
        return _ptx("sqrt.rn.f32 $0, $1;", x)

    def select(self, condition: Int, a: Float, b: Float | float) -> Float:
        return Float(arith.select(condition.value, a.value, _float(b)))


class Machine(Arithmetic):
    """A thread of a block: arithmetic, memory, neighbours."""

    def __init__(self, block: Any, exchange: Any, own: Any = None) -> None:
        self.block = Int(block)
        self.thread = Int(arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(THREADS, _i32())))
        self._exchange = exchange
        self._own: Any = None if own is None else Int(llvm.ptrtoint(_i32(), mgpu.utils.memref_ptr(own)))

    def pick(self, condition: Int, a: Any, b: Any) -> Any:
        """One of two numbers, or of two arrays of one dtype."""
        if isinstance(a, Int | int) and isinstance(b, Int | int):
            if isinstance(a, Int):
                return Int(arith.select(condition.value, *a._both(b)))
            if isinstance(b, Int):
                return Int(arith.select(condition.value, *reversed(b._both(a))))
            return a if a == b else self.pick(condition, Int(mgpu.utils.c(a, _i32())), b)
        assert _dtype(a) == _dtype(b)
        return Pointer(self.pick(condition, *(_pointer(x).address for x in (a, b))), _dtype(a))

    # Memory ----------------------------------------------------------------------------------------------------------

    def load(
        self,
        ref: Any,
        index: Int,
        count: int,
        where: Int | bool = True,
        other: float = 0.0,
        *,
        again: bool = False,
        written: bool = False,
    ) -> list[Float]:
        """``ref.flat[index : index + count]`` as f32, in accesses of up to 16 bytes, which must be aligned to their size.

        ``other`` (of f32 only, unless 0) where ``where`` is false, and then nothing is read. ``again``: from the cache, at
        this place, instead of from registers that a compiler keeps since an earlier load. ``written``: memory that somebody
        writes while this kernel runs, and has written before a barrier that this thread has passed.
        """
        dtype = _dtype(ref)
        return [
            value
            for offset, size in _pieces(count, dtype.itemsize)
            for value in _unpack(
                _read(_address(ref, index + offset), size * dtype.itemsize, where, other, again, written), dtype
            )
        ]

    def integer(self, ref: Any, index: Int) -> Int:
        """``ref.flat[index]`` of int32."""
        (word,) = _read(_address(ref, index), 4, True, 0.0, False)
        return Int(word)

    def store(self, ref: Any, index: Int, values: Sequence[Float], where: Int | bool = True) -> list[Float]:
        """Round to the dtype of ``ref`` and write; the rounded values."""
        dtype, rounded = _dtype(ref), []
        for offset, size in _pieces(len(values), dtype.itemsize):
            words = _pack(values[offset : offset + size], dtype)
            _write(_address(ref, index + offset), words, where)
            rounded += _unpack(words, dtype)
        return rounded

    def copy(self, to: Any, at: Int, ref: Any, index: Int, count: int, where: Int | bool = True) -> None:
        """``to.flat[at : at + count] = ref.flat[index : index + count]``, bit by bit; aligned as for `load`."""
        for offset, size in _pieces(count, _dtype(ref).itemsize):
            words = _read(_address(ref, index + offset), size * _dtype(ref).itemsize, where, 0.0, False)
            _write(_address(to, at + offset), words, where)

    def rounded(self, values: Sequence[Float], ref: Any) -> list[Float]:
        """The values as ``ref`` would hold them."""
        dtype = _dtype(ref)
        return [
            value
            for offset, size in _pieces(len(values), dtype.itemsize)
            for value in _unpack(_pack(values[offset : offset + size], dtype), dtype)
        ]

    def itemsize(self, ref: Any) -> int:
        """Bytes of an element."""
        return _dtype(ref).itemsize

    # Slots: 16 bytes of shared memory each, of this thread alone until a barrier ----------------------------------------

    def fetch(self, slot: Int | int, ref: Any, index: Int, count: int, where: Int | bool = True) -> None:
        """Copy ``ref.flat[index : index + count]`` to as many slots as it fills, while the program goes on, until `wait`.

        Zeros where ``where`` is false.
        """
        size = 16 // _dtype(ref).itemsize
        assert count % size == 0
        for piece in range(count // size):
            operands = [self._slot(slot + piece, self.thread).value, _address(ref, index + piece * size)]
            text = "cp.async.cg.shared.global [$0], [$1], 16"
            if isinstance(where, bool):
                assert where
            else:
                text += ", $2"
                operands.append(arith.select(where.value, *(mgpu.utils.c(x, _i32()) for x in (16, 0))))
            mgpu.utils.inline_ptx(text + ";", *operands, has_side_effects=True)

    def commit(self) -> None:
        """What was fetched since the last time belongs together."""
        mgpu.utils.inline_ptx("cp.async.commit_group;", has_side_effects=True)

    def wait(self, pending: int) -> None:
        """Until no more than so many of this thread's last groups are on their way."""
        mgpu.utils.inline_ptx(f"cp.async.wait_group {pending};", has_side_effects=True)

    def keep(self, slot: Int | int, values: Sequence[Float], ref: Any = None, thread: Int | None = None) -> None:
        """Round to the dtype of ``ref``, f32 without it, and put in as many slots as that fills; in those of another thread,
        too, if everybody who does puts the same."""
        dtype = jnp.dtype(jnp.float32) if ref is None else _dtype(ref)
        size = 16 // dtype.itemsize
        for piece in range(len(values) // size):
            words = _pack(values[piece * size : (piece + 1) * size], dtype)
            address = self._slot(slot + piece, self.thread if thread is None else thread).value
            mgpu.utils.inline_ptx(f"st.shared.v4.b32 [$4], {_braced(4)};", *words, address, has_side_effects=True)

    def kept(self, slot: Int | int, count: int, ref: Any = None, thread: Int | None = None) -> list[Float]:
        """What is in slots of this thread, or behind a `barrier` of another: values of the dtype of ``ref``, f32 without it."""
        dtype = jnp.dtype(jnp.float32) if ref is None else _dtype(ref)
        size, values = 16 // dtype.itemsize, []
        for piece in range(count // size):
            address = self._slot(slot + piece, self.thread if thread is None else thread).value
            words = mgpu.utils.inline_ptx(
                f"ld.shared.v4.b32 {_braced(4)}, [$4];", address, result_types=[_i32()] * 4, has_side_effects=True
            )
            values += _unpack(list(words), dtype)
        return values

    def _slot(self, slot: Int | int, thread: Int) -> Int:
        place = thread * 16 + self._own
        return place + (slot * (16 * THREADS))

    def barrier(self) -> None:
        """Of the block."""
        mgpu.utils.warpgroup_barrier()

    # Neighbours ------------------------------------------------------------------------------------------------------

    def of_lane(self, x: Float, distance: int) -> Float:
        """The value of the lane whose number differs in that one bit. All lanes of the warp take part."""
        return Float(mgpu.utils.shfl_bfly(x.value, distance))

    def of_warps(self, values: Sequence[Float], turn: Int | int = 0) -> list[list[Float]]:
        """The values that the block's warps hold, warp by warp; those of a warp are the same in all of its lanes.

        ``turn`` counts the exchanges of a kernel: two buffers alternate, so that one barrier each is enough.
        """
        f32, gep = _f32(), mgpu.utils.getelementptr
        base = mgpu.utils.memref_ptr(self._exchange)
        half = (turn % 2) * (len(values) * WARPS)
        base = gep(base, [half.value if isinstance(half, Int) else half], f32)
        mine = gep(base, [((self.thread // WARP) * len(values)).value], f32)
        with mgpu.utils.when((self.thread % WARP == 0).value):
            for i, x in enumerate(values):
                llvm.store(x.value, gep(mine, [i], f32))
        mgpu.utils.warpgroup_barrier()
        return [
            [Float(llvm.load(f32, gep(base, [warp * len(values) + i], f32))) for i in range(len(values))]
            for warp in range(WARPS)
        ]

    def loop(
        self, count: int, carry: Sequence[Float], body: Callable[[Int, list[Float]], Sequence[Float]]
    ) -> list[Float]:
        """``for i in range(count): carry = body(i, carry)``."""
        first, last, step = (mgpu.utils.c(x, _i32()) for x in (0, count, 1))
        for_op = scf.ForOp(first, last, step, [x.value for x in carry])
        with ir.InsertionPoint(for_op.body):
            after = body(Int(for_op.induction_variable), [Float(x) for x in for_op.inner_iter_args])
            scf.yield_([x.value for x in after])
        return [Float(x) for x in for_op.results]


# Words of memory ---------------------------------------------------------------------------------------------------------


class Pointer:
    """Memory at an address that a program has computed; loads and stores take it for an array."""

    def __init__(self, address: Int, dtype: Any) -> None:
        self.address, self.dtype = address, jnp.dtype(dtype)


def _pointer(ref: Any) -> Pointer:
    if isinstance(ref, Pointer):
        return ref
    i64 = ir.IntegerType.get_signless(64)
    return Pointer(Int(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))), _dtype(ref))


def _dtype(ref: Any) -> Any:
    if isinstance(ref, Pointer):
        return ref.dtype
    element = ir.MemRefType(ref.type).element_type
    for name in ("float32", "bfloat16", "float16"):
        if element == mgpu.utils.dtype_to_ir_type(jnp.dtype(name)):
            return jnp.dtype(name)
    raise NotImplementedError(f"memory of {element}")


def _pieces(count: int, itemsize: int) -> list[tuple[int, int]]:
    """``(offset, elements)`` of equal accesses of 2, 4, 8 or 16 bytes."""
    size = min(math.gcd(count, 16), 16 // itemsize)
    return [(offset, size) for offset in range(0, count, size)]


def _address(ref: Any, index: Int) -> Any:
    if isinstance(ref, Pointer):
        return (ref.address + index * ref.dtype.itemsize).value
    element = ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index.value], element)


def _braced(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}" if count > 1 else f"${first}"


def _read(address: Any, bytes_: int, where: Int | bool, other: float, again: bool, written: bool = False) -> list[Any]:
    """As words of 32 bits, or one of 16."""
    count, bits = (bytes_ // 4, 32) if bytes_ >= 4 else (1, 16)
    vector = f".v{count}" if count > 1 else ""
    kind = "" if written else ".nc"
    text = f"ld.global{kind}{vector}.b{bits} {_braced(count)}, [${count}];"
    operands = [address]
    if not isinstance(where, bool):
        fill = int(np.float32(other).view(np.uint32)) if bits == 32 else 0
        fills = " ".join(f"mov.b{bits} ${i}, {fill};" for i in range(count))
        text = f"{fills} @${count + 1} {text}"
        operands.append(where.value)
    type_ = ir.IntegerType.get_signless(bits)
    found = mgpu.utils.inline_ptx(text, *operands, result_types=[type_] * count, has_side_effects=again or written)
    return list(found) if isinstance(found, tuple | list) else [found]


def _write(address: Any, words: list[Any], where: Int | bool) -> None:
    bits = ir.IntegerType(words[0].type).width
    vector = f".v{len(words)}" if len(words) > 1 else ""
    guard = "" if isinstance(where, bool) else f"@${len(words) + 1} "
    text = f"{guard}st.global{vector}.b{bits} [${len(words)}], {_braced(len(words))};"
    operands = [*words, address] if isinstance(where, bool) else [*words, address, where.value]
    mgpu.utils.inline_ptx(text, *operands, has_side_effects=True)


def _unpack(words: list[Any], dtype: Any) -> list[Float]:
    f32 = _f32()
    if dtype == jnp.float32:
        return [Float(arith.bitcast(f32, word)) for word in words]
    if ir.IntegerType(words[0].type).width == 16:
        return [Float(arith.extf(f32, arith.bitcast(mgpu.utils.dtype_to_ir_type(dtype), words[0])))]
    values = []
    for word in words:
        if dtype == jnp.bfloat16:  # its bits are the upper half of f32's
            low = arith.shli(word, mgpu.utils.c(16, _i32()))
            high = arith.andi(word, arith.constant(_i32(), ir.IntegerAttr.get(_i32(), -65536)))
            values += [Float(arith.bitcast(f32, low)), Float(arith.bitcast(f32, high))]
        else:
            text = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
            values += map(Float, mgpu.utils.inline_ptx(text, word, result_types=[f32, f32]))
    return values


def _pack(values: Sequence[Float], dtype: Any) -> list[Any]:
    if dtype == jnp.float32:
        return [arith.bitcast(_i32(), x.value) for x in values]
    name = {"bfloat16": "bf16", "float16": "f16"}[dtype.name]
    if len(values) == 1:
        i16 = ir.IntegerType.get_signless(16)
        return [mgpu.utils.inline_ptx(f"cvt.rn.{name}.f32 $0, $1;", values[0].value, result_types=i16)]
    return [
        mgpu.utils.inline_ptx(f"cvt.rn.{name}x2.f32 $0, $2, $1;", low.value, high.value, result_types=_i32())
        for low, high in zip(values[::2], values[1::2], strict=True)
    ]
