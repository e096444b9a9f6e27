"""The machine of `tbik_jax.kernels.hopper.simt` in NumPy: every thread of every block at once, as arrays ``[blocks, 128]``.

What a GPU rounds correctly is the same here; exp2 and the approximate inverse are NumPy's.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tbik_jax.kernels.hopper import simt


class Picked:
    """One of two arrays, thread by thread."""

    def __init__(self, condition: np.ndarray, a: Any, b: Any) -> None:
        self.condition, self.a, self.b = condition, a, b
        assert a.dtype == b.dtype
        self.dtype = a.dtype


class Machine:
    def __init__(self, blocks: int, slots: int = 0) -> None:
        self.shape = blocks, simt.THREADS
        self.block = np.broadcast_to(np.arange(blocks)[:, None], self.shape)
        self.thread = np.broadcast_to(np.arange(simt.THREADS), self.shape)
        self.written: dict[int, np.ndarray] = {}
        self.slots: list[Any] = [None] * slots
        self.groups: list[list[tuple[int, Any]]] = [[]]  # of fetches on their way; the last is not committed

    def zero(self):
        return np.zeros(self.shape, np.float32)

    def wide(self, x):
        return x

    def fma(self, a, b, c):
        a, b, c = (np.asarray(np.float32(x), np.float64) for x in (a, b, c))
        return np.float32(a * b + c)

    def maximum(self, a, b):
        b = np.float32(b)
        largest = np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b))  # of two zeros +0
        return np.where(np.isnan(largest), np.float32(np.nan), largest)

    def clip(self, x, low, high):
        return np.minimum(np.maximum(x, np.float32(low)), np.float32(high))

    def exp2(self, x):
        y = np.exp2(x)
        return np.where(y < 2.0**-126, np.float32(0), y)

    def about_inverse(self, x):
        y = np.float32(1) / x
        return np.where(np.abs(y) < 2.0**-126, np.float32(0), y)

    def inverse(self, x):
        return np.float32(1) / x

    def sqrt(self, x):
        return np.sqrt(x)

    def select(self, condition, a, b):
        return np.where(condition, a, np.float32(b) if isinstance(b, float) else b)

    def pick(self, condition, a, b):
        condition = np.broadcast_to(condition, self.shape)
        numbers = isinstance(a, int) or np.issubdtype(a.dtype, np.integer)
        return np.where(condition, a, b) if numbers else Picked(condition, a, b)

    def load(self, ref, index, count, where=True, other=0.0, *, again=False):
        where = np.broadcast_to(where, self.shape)
        if isinstance(ref, Picked):
            a = self.load(ref.a, index, count, where & ref.condition, other)
            b = self.load(ref.b, index, count, where & ~ref.condition, other)
            return [np.where(ref.condition, x, y) for x, y in zip(a, b, strict=True)]
        index = np.where(where, index, 0)
        self._check_aligned(ref, index, count)
        return [np.where(where, ref.reshape(-1)[index + i].astype(np.float32), np.float32(other)) for i in range(count)]

    def copy(self, to, at, ref, index, count, where=True):
        where = np.broadcast_to(where, self.shape)
        index, at = (np.where(where, x, 0) for x in (index, at))
        self._check_aligned(ref, index, count)
        self._check_aligned(to, at, count)
        bits = f"u{ref.dtype.itemsize}"
        for i in range(count):
            to.view(bits).reshape(-1)[(at + i)[where]] = ref.view(bits).reshape(-1)[(index + i)[where]]

    def integer(self, ref, index):
        assert ref.dtype == np.int32
        return ref.reshape(-1)[index]

    def store(self, ref, index, values, where=True):
        where = np.broadcast_to(where, self.shape)
        index = np.broadcast_to(index, self.shape)
        if isinstance(ref, Picked):
            self.store(ref.a, index, values, where & ref.condition)
            return self.store(ref.b, index, values, where & ~ref.condition)
        self._check_aligned(ref, np.where(where, index, 0), len(values))
        times = self.written.setdefault(id(ref), np.zeros(ref.size, np.int32))
        for i, value in enumerate(values):
            at = (index + i)[where]
            np.add.at(times, at, 1)
            ref.reshape(-1)[at] = np.broadcast_to(value, self.shape)[where].astype(ref.dtype)
        return self.rounded(values, ref)

    def _check_aligned(self, ref, index, count):
        for offset, size in simt._pieces(count, ref.dtype.itemsize):
            assert ((index + offset) % size == 0).all(), "an access is not aligned to its size"

    def rounded(self, values, ref):
        return [np.asarray(x).astype(ref.dtype).astype(np.float32) for x in values]

    def itemsize(self, ref):
        return ref.dtype.itemsize

    def fetch(self, slot, ref, index, count, where=True):
        size = 16 // ref.dtype.itemsize
        assert count % size == 0
        for piece, offset in enumerate(range(0, count, size)):
            self.slots[slot + piece] = "on its way"
            self.groups[-1].append((slot + piece, self.load(ref, index + offset, size, where)))

    def commit(self):
        self.groups.append([])

    def wait(self, pending):
        while len(self.groups) > pending + 1:
            for slot, values in self.groups.pop(0):
                self.slots[slot] = values

    def keep(self, slot, values, ref=None, thread=None):
        size = 16 // (4 if ref is None else ref.dtype.itemsize)
        values = values if ref is None else self.rounded(values, ref)
        for piece in range(len(values) // size):
            assert not isinstance(self.slots[slot + piece], str)
            mine = [np.broadcast_to(x, self.shape) for x in values[piece * size :][:size]]
            if thread is not None:
                before = self.slots[slot + piece] or [np.full(self.shape, np.nan, np.float32) for _ in mine]
                to, mine, given = np.broadcast_to(thread, self.shape), [x.copy() for x in before], mine
                for x, y in zip(mine, given, strict=True):
                    np.put_along_axis(x, to, y, 1)
                    assert (np.take_along_axis(x, to, 1).view(np.int32) == y.view(np.int32)).all(), (
                        "two put different values"
                    )
            self.slots[slot + piece] = mine

    def kept(self, slot, count, ref=None, thread=None):
        if isinstance(slot, np.ndarray):  # each thread from one of its own choice
            slots = np.broadcast_to(slot, self.shape)
            choices = {n: self.kept(n, count, ref, thread) for n in np.unique(slots) if self.slots[n] is not None}
            return [
                np.select([slots == n for n in choices], [of[i] for of in choices.values()], np.nan)
                for i in range(count)
            ]
        size = 16 // (4 if ref is None else ref.dtype.itemsize)
        slots = [self.slots[slot + piece] for piece in range(count // size)]
        assert not any(isinstance(values, str) for values in slots), "on its way"
        values = [x for slot in slots for x in slot]
        assert len(values) == count, "not what was put there"
        if thread is None:
            return values
        return [np.take_along_axis(x, np.broadcast_to(thread, self.shape), 1) for x in values]

    def barrier(self):
        pass  # all threads are where the program is

    def of_lane(self, x, distance):
        return np.broadcast_to(x, self.shape)[:, np.arange(simt.THREADS) ^ distance]

    def of_warps(self, values, turn=0):
        of = [np.broadcast_to(x, self.shape).reshape(-1, simt.WARPS, simt.WARP) for x in values]
        assert all((x.view(np.uint32) == x[..., :1].view(np.uint32)).all() for x in map(np.ascontiguousarray, of))
        return [[np.broadcast_to(x[:, warp, :1], self.shape) for x in of] for warp in range(simt.WARPS)]

    def loop(self, count, carry, body):
        for i in range(count):
            carry = body(i, list(carry))
        return list(carry)


def launch(
    program: Any, blocks: int, inputs: Any, out: Any, *, shared: int = 0, slots: int = 0, changed: Any = ()
) -> Any:
    """Stands for `simt.launch`; also under ``jit`` and inside of ``custom_vmap``."""
    single = not isinstance(out, tuple | list)
    like = (out,) if single else tuple(out)

    def run(*arrays: Any) -> tuple[np.ndarray, ...]:
        machine = Machine(blocks, slots)
        given = [np.asarray(x) for x in arrays]
        kept, memory = given[: len(inputs)], [x.copy() for x in given[len(inputs) :]]
        results = [np.zeros(x.shape, x.dtype) for x in like]
        with np.errstate(all="ignore"):
            program(machine, *kept, *memory, *results)
        for result in results:
            assert (machine.written[id(result)] == 1).all(), "an element is not written once"
        return (*memory, *results)

    types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed)
    found = jax.pure_callback(run, (*types, *like), *inputs, *changed, vmap_method="sequential")
    return found[0] if single else found
