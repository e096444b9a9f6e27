"""Sums over the GPUs of one host without a launch of their own: ranks write nodes to each other's mailbox, over NVLink.

A decode step adds a few rows after every attention and every MLP, and each exchange costs more in launches than in bytes.
Here the kernel that adds the residual and normalises also exchanges the nodes. What a separate exchange needs every time
(addresses of the peers' memory, a barrier) is done once a program, by :func:`open_mailbox`.

A block of any kernel has a part of the mailbox of its own. Its turn t writes half ``t % 2`` of the same block's part on every
rank, then the flag ``t + 1`` behind it, and reads its own part once all ranks' flags have come. A rank that has read the flags
of turn t - 1 knows that everybody has done with turn t - 2, so two halves are enough. Turns are counted in the mailbox
itself: it may serve any kernels, of any sizes, that all ranks run one after another in the same order.

XLA takes the mailbox for an operand that nobody changes. Its memory must stay where it was when its address was told; every
kernel compares, and stops the program otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.hopper import norms, simt
from tbik_jax.kernels.hopper.peers import Finish, meeting_kernel

Array = jax.Array

_MOST_RANKS = 16
_HEADER = 32  # words of a part before its halves: a flag of every rank, and the turn
_TURN = _HEADER - 1
#: More nodes than that would not fit a thread's registers.
MOST_NODES = 16


class Mailbox(NamedTuple):
    """This rank's mailbox and what the program knows of the others'.

    Attributes:
        words: ``[blocks, words]`` f32, uninitialised but for the headers.
        table: ``[ranks + 1, 2]`` int32: the address of every rank's ``words``, in rank order; then this rank's number.
    """

    words: Array
    table: Array


def fits(rows: int, d: int, counts: Sequence[int]) -> bool:
    """Whether one wave of blocks exchanges so many rows, of so many nodes on each rank."""
    return _has_room(rows, d, len(counts)) and sum(counts) <= MOST_NODES


def _has_room(rows: int, d: int, ranks: int) -> bool:
    whole = d % norms.CHUNK == 0 and 0 < d <= norms.LARGEST
    return whole and ranks <= _MOST_RANKS and 0 < _blocks(rows, d) <= backend.multiprocessors()


def _blocks(rows: int, d: int) -> int:
    return -(-rows // (simt.THREADS // norms.lanes(d)))


def _elements(d: int) -> int:
    """Of a block's rows."""
    return simt.THREADS // norms.lanes(d) * d


def open_mailbox(axis_name: str, ranks: int, width: int, rows: int, d: int) -> Mailbox:
    """A mailbox for sums of ``rows`` rows of ``d`` elements, of up to ``width`` nodes a rank, over that axis of the mesh.

    All ranks call it at the same place of the program. Needs a mesh as :func:`tbik_jax.kernels.hopper.peers.tree_sum` does.

    Raises:
        NotImplementedError: no Hopper GPUs; rows or ranks for which there is no room.
    """
    with Problems("open_mailbox") as problems:
        if backend.family() != "sm90":
            problems.unsupported("GPUs write to each other over NVLink, and this backend has none")
        elif not _has_room(rows, d, ranks):
            problems.unsupported(
                f"{rows} rows of {d} elements on {ranks} ranks; there is room for a row, or several narrow ones, on each "
                f"multiprocessor, for rows of a multiple of {norms.CHUNK} up to {norms.LARGEST}, and {_MOST_RANKS} ranks. "
                f"Sum by tree_psum"
            )
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    blocks = _blocks(rows, d)
    words = _HEADER + 2 * ranks * width * _elements(d)
    devices = [{axis_name: rank} for rank in range(ranks)]

    def body(box: Any, table: Any) -> None:
        places = [plgpu.remote_ref(box, device) for device in devices]

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * (ranks + 2), *[plgpu.Layout.WG_SPLAT(())] * 2))
        def run(ctx: Any, *arguments: Any) -> None:
            own, table, *others, block, rank = arguments
            m = simt.Machine(block.registers.item(), None)
            m.store(own, m.wide(m.block) * words + m.thread, [m.zero()], m.thread < _HEADER)
            first = mgpu.utils.memref_ptr(table)
            i32, i64 = simt._i32(), ir.IntegerType.get_signless(64)
            with mgpu.utils.when(((m.thread == 0) & (m.block == 0)).value):
                for i, ref in enumerate(others):
                    address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
                    llvm.store(address, mgpu.utils.getelementptr(first, [i], i64))
                llvm.store(rank.registers.item(), mgpu.utils.getelementptr(first, [2 * ranks], i32))

        run(box, table, *places, lax.axis_index("grid"), lax.axis_index(axis_name))

    out = (jax.ShapeDtypeStruct((blocks, words), jnp.float32), jax.ShapeDtypeStruct((ranks + 1, 2), jnp.int32))
    # They meet, so that nobody writes to a mailbox whose flags are not zero yet.
    box, table = meeting_kernel("open_mailbox", body, blocks, devices, (), out)
    return Mailbox(box, table)


def sum_add_norm(
    mailbox: Mailbox,
    nodes: Array,
    counts: Sequence[int],
    finish: Finish,
    residual: Array,
    scale: Array,
    eps: float,
) -> tuple[Array, Array]:
    """``nodes [width, rows, d]`` f32 of every rank, ``residual [rows, d]``, ``scale [d]`` -> ``(total, normal)``.

    The root of the nodes, rounded to the dtype of ``residual``; its sum with ``residual``; the norm of that. The bits of
    :func:`tbik_jax.kernels.hopper.peers.tree_sum` and of :func:`tbik_jax.kernels.hopper.norms.rms_norm` behind it.

    Args:
        mailbox: Large enough; see :func:`open_mailbox`.
        nodes: Node i of this rank in row i.
        counts: How many nodes each rank has; rows behind them are not added.
        finish: The additions.
    """
    width, rows, d = nodes.shape
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    count, elements = norms.lanes(d), _elements(d)
    if (
        mailbox.words.shape[0] < _blocks(rows, d)
        or mailbox.words.shape[1] < _HEADER + 2 * len(counts) * width * elements
    ):
        raise ValueError(
            f"sum_add_norm: {rows} rows of {d}, {width} nodes a rank, in a mailbox of {mailbox.words.shape}"
        )

    def program(m: Any, nodes: Any, residual: Any, scale: Any, words: Any, table: Any, total: Any, normal: Any) -> None:
        post = _Post(m, words, table, len(counts), mailbox.words.shape[1])
        row = m.block * (simt.THREADS // count) + m.thread // count
        inside = True if rows % (simt.THREADS // count) == 0 else row < rows
        columns = norms._columns(m, d)
        mine = (m.thread // count) * d
        parts = [(mine + at, inside & where) for at, where in columns]
        base = m.wide(row) * d
        for w in range(width):
            loaded = [m.load(nodes, base + w * rows * d + at, norms.CHUNK, inside & where) for at, where in columns]
            for chunk, (at, where) in zip(loaded, parts, strict=True):
                post.send(at + w * elements, chunk, where, width * elements)
        given = [m.load(residual, base + at, norms.CHUNK, inside & where) for at, where in columns]
        scales = [m.load(scale, m.wide(at), norms.CHUNK, where) for at, where in columns]
        post.exchange()
        chunks = []
        for (column, _), (at, where), beside in zip(columns, parts, given, strict=True):
            found = [
                [post.received(rank, at + w * elements, where, width * elements) for w in range(counts[rank])]
                for rank in range(len(counts))
            ]
            values = [
                finish([[node[e] for node in of_rank] for of_rank in found], lambda a, b: a + b)
                for e in range(norms.CHUNK)
            ]
            values = [a + b for a, b in zip(beside, m.rounded(values, total), strict=True)]
            chunks.append(m.store(total, base + column, values, where))
        normals = norms._normals(m, chunks, scales, count, 1.0 / d, eps)
        for (column, _), (_, where), values in zip(columns, parts, normals, strict=True):
            m.store(normal, base + column, values, where)
        post.end()

    program.__name__ = "sum_add_norm"
    total, normal = simt.launch(
        program,
        _blocks(rows, d),
        (nodes, residual, scale),
        (like, like),
        shared=norms._exchanged(d, 1),
        in_place=mailbox,
    )
    return total, normal


class _Post:
    """One turn of a block."""

    def __init__(self, m: simt.Machine, words: Any, table: Any, ranks: int, size: int) -> None:
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        self.m, self.ranks, self._utils = m, ranks, mgpu.utils
        i32, i64 = simt._i32(), ir.IntegerType.get_signless(64)
        first = mgpu.utils.memref_ptr(table)

        def word(kind: Any, index: Any) -> simt.Int:
            return simt.Int(llvm.load(kind, mgpu.utils.getelementptr(first, [index], kind)))

        self._table = lambda index: word(i64, index.value)
        own = simt.Int(llvm.ptrtoint(i64, mgpu.utils.memref_ptr(words)))
        self.rank = word(i32, 2 * ranks)
        # The address that the others have must be that of this operand.
        mgpu.utils.inline_ptx(
            "{ .reg .pred moved; setp.ne.s64 moved, $0, $1; @moved trap; }",
            own.value,
            self._table(self.rank).value,
            has_side_effects=True,
        )
        offset = m.wide(m.block) * (4 * size)
        self._offset, self._own = offset, own + offset
        self._others = [word(i64, r) + offset for r in range(ranks)]
        turn = mgpu.utils.inline_ptx(
            "ld.global.b32 $0, [$1];", (self._own + 4 * _TURN).value, result_types=i32, has_side_effects=True
        )
        self.turn = simt.Int(turn)
        self._half = (self.turn % 2) * ranks

    def send(self, index: Any, values: Sequence[Any], where: Any, stride: int) -> None:
        """To every rank."""
        place = self.m.wide((self._half + self.rank) * stride + index) + _HEADER
        for other in self._others:
            self.m.store(simt.Pointer(other, np.float32), place, values, where)

    def received(self, rank: int, index: Any, where: Any, stride: int) -> list[Any]:
        """What that rank has sent."""
        place = self.m.wide((self._half + rank) * stride + index) + _HEADER
        return self.m.load(simt.Pointer(self._own, np.float32), place, norms.CHUNK, where, written=True)

    def exchange(self) -> None:
        """Thread r tells rank r that its mail has come, and waits for its mail."""
        utils, m = self._utils, self.m
        after = self.turn + 1
        utils.warpgroup_barrier()  # what all threads have sent is released by one of them
        with utils.when((m.thread < self.ranks).value):
            there = self._table(m.thread) + self._offset + m.wide(self.rank) * 4
            utils.inline_ptx("st.release.sys.global.b32 [$0], $1;", there.value, after.value, has_side_effects=True)
            here = self._own + m.wide(m.thread) * 4
            utils.inline_ptx(
                "{ .reg .pred early; .reg .b32 flag; again: ld.acquire.sys.global.b32 flag, [$0]; "
                "setp.lt.s32 early, flag, $1; @early bra again; }",
                here.value,
                after.value,
                has_side_effects=True,
            )
        utils.warpgroup_barrier()

    def end(self) -> None:
        """The next turn of this block."""
        m = self.m
        self._utils.inline_ptx(
            "@$2 st.global.b32 [$0], $1;",
            (self._own + 4 * _TURN).value,
            (self.turn + 1).value,
            (m.thread == 0).value,
            has_side_effects=True,
        )
