"""RMSNorm, alone or behind the residual sum; with the rotation of queries and keys behind it.

A row of D elements is summed by ``lanes(D)`` lanes, a power of two. Chunk c of 8 elements belongs to lane c modulo their
number. A lane adds a chunk pairwise (`formulas.pairwise`), its chunks in order from +0; lanes are added pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.hopper.formulas import pairwise, rotate

Array = jax.Array
CHUNK = 8
#: Head sizes of which a thread holds both halves of its pairs.
ROTATED = (64, 128, 256)
LARGEST = 16384
#: Heads of a token that a thread normalises and rotates by the same angles, and up to how many rows only one of them.
_HEADS, _FEW = 4, 16384


def lanes(d: int) -> int:
    """Threads of a row of ``d`` elements: up to 32 elements each, until a block is full. Numerics-bearing."""
    return min(simt.THREADS, 1 << max(0, math.ceil(d / 32) - 1).bit_length())


def rms_norm(x: Array, scale: Array, eps: float, residual: Array | None = None) -> tuple[Array, Array]:
    """``(x + residual, its norm)`` of rows; without ``residual``, ``(x, its norm)``."""
    shape = x.shape
    x, rows, d = _rows(x)
    scale = _padded(scale)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    added = () if residual is None else (_rows(residual)[0],)
    if not x.size:
        return x.reshape(shape), x.reshape(shape)
    program = partial(_forward, rows=rows, d=x.shape[1], mean=1.0 / d, eps=eps, residual=residual is not None)
    blocks, out = -(-rows // _rows_of_block(d)), (like,) * (1 + len(added))
    done = simt.launch(program, blocks, (x, *added, scale), out, shared=_exchanged(d, 1))
    total, normal = (x, *done) if residual is None else done
    return total[:, :d].reshape(shape), normal[:, :d].reshape(shape)


def rms_norm_rope(
    xs: Sequence[Array], scales: Sequence[Array], cos: Array, sin: Array, eps: float
) -> tuple[Array, ...]:
    """The norm of every head of each ``x [..., heads, D]``, rotated, for D of :data:`ROTATED`; tables as in `maps.rope`."""
    leading, d = xs[0].shape[:-2], xs[0].shape[-1]
    cos, sin = (jnp.broadcast_to(table, (*leading, d // 2)) for table in (cos, sin))
    if not cos.size:
        return tuple(xs)
    heads = tuple(x.shape[-2] for x in xs)
    few = math.prod(leading) * sum(heads) <= _FEW
    if any(len({x.dtype for x in arrays}) > 1 for arrays in (xs, scales)):
        return tuple(
            y for x, scale in zip(xs, scales, strict=True) for y in rms_norm_rope((x,), (scale,), cos, sin, eps)
        )
    groups = tuple(count if few else -(-count // _HEADS) for count in heads)
    program = partial(_forward_rotated, tokens=math.prod(leading), heads=heads, groups=groups, d=d, eps=eps)
    blocks = sum(_blocks_of(math.prod(leading) * count, d) for count in groups)
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)
    slots = len(_columns_of(d)) * _slots(xs[0]) * max(-(-a // b) for a, b in zip(heads, groups, strict=True))
    return tuple(simt.launch(program, blocks, (*xs, *scales, cos, sin), out, slots=slots))


def _blocks_of(rows: int, d: int) -> int:
    return -(-rows // _rows_of_block(d))


def _slots(x: Array) -> int:
    """Of a chunk."""
    return CHUNK * x.dtype.itemsize // 16


def _rows(x: Array) -> tuple[Array, int, int]:
    """``[rows, D]``, completed by zeros to whole chunks; the number of rows, and D."""
    d = x.shape[-1]
    if not 0 < d <= LARGEST:
        raise NotImplementedError(f"rms_norm: rows of {d} elements; Hopper's kernel has rows of 1 to {LARGEST}")
    return _padded(x).reshape(-1, -(-d // CHUNK) * CHUNK), math.prod(x.shape[:-1]), d


def _padded(x: Array) -> Array:
    short = -x.shape[-1] % CHUNK
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


def _rows_of_block(d: int) -> int:
    return simt.THREADS // lanes(d)


def _exchanged(d: int, sums: int) -> int:
    return sums if lanes(d) > simt.WARP else 0


def _columns_of(d: int) -> range:
    """Numbers of a thread's chunks in a row."""
    return range(-(-d // (CHUNK * lanes(d))))


def _columns(m: Any, d: int) -> list[tuple[Any, Any]]:
    """Where a thread's chunks start in a row, and whether they are in it."""
    count = lanes(d)
    places = [((m.thread % count) + i * count) * CHUNK for i in _columns_of(d)]
    return [(at, True if (i + 1) * count * CHUNK <= d else at < d) for i, at in enumerate(places)]


def _sum_of_chunks(m: Any, chunks: Sequence[Sequence[Any]]) -> Any:
    total = m.zero()
    for chunk in chunks:
        total = total + pairwise(chunk)
    return total


def _sum_of_lanes(m: Any, values: Sequence[Any], count: int, turn: Any = 0) -> list[Any]:
    """Each over the ``count`` lanes of its row, on all of them."""
    totals = list(values)
    distance = 1
    while distance < min(count, simt.WARP):
        totals = [x + m.of_lane(x, distance) for x in totals]
        distance *= 2
    if count <= simt.WARP:
        return totals
    warps = m.of_warps(totals, turn)
    pairs = [[a + b for a, b in zip(*warps[i : i + 2], strict=True)] for i in (0, 2)]
    if count == simt.THREADS:
        return [a + b for a, b in zip(*pairs, strict=True)]
    second = (m.thread // (2 * simt.WARP)) == 1
    return [m.select(second, b, a) for a, b in zip(*pairs, strict=True)]


def _inverse(m: Any, squares: Any, mean: float, eps: float) -> Any:
    return m.inverse(m.sqrt(squares * mean + eps))


def _forward(m: Any, *refs: Any, rows: int, d: int, mean: float, eps: float, residual: bool) -> None:
    x, *more, scale = refs[: 2 + residual]
    count = lanes(d)
    row = m.block * (simt.THREADS // count) + m.thread // count
    inside = True if rows % (simt.THREADS // count) == 0 else row < rows
    base = m.wide(row) * d
    columns = _columns(m, d)
    chunks = [m.load(x, base + at, CHUNK, inside & where) for at, where in columns]
    added = [[m.load(y, base + at, CHUNK, inside & where) for at, where in columns] for y in more]
    scales = [m.load(scale, m.wide(at), CHUNK, where) for at, where in columns]
    if residual:
        total = refs[3]
        chunks = [
            m.store(total, base + at, [a + b for a, b in zip(chunk, other, strict=True)], inside & where)
            for (at, where), chunk, other in zip(columns, chunks, added[0], strict=True)
        ]
    normals = _normals(m, chunks, scales, count, mean, eps)
    for (at, where), normal in zip(columns, normals, strict=True):
        m.store(refs[-1], base + at, normal, inside & where)


def _normals(m: Any, chunks: Any, scales: Any, count: int, mean: float, eps: float) -> list[list[Any]]:
    inverse = _inverse_of(m, chunks, count, mean, eps)
    return [_scaled(chunk, inverse, factors) for chunk, factors in zip(chunks, scales, strict=True)]


def _inverse_of(m: Any, chunks: Any, count: int, mean: float, eps: float) -> Any:
    squares = _sum_of_chunks(m, [[x * x for x in chunk] for chunk in chunks])
    return _inverse(m, _sum_of_lanes(m, [squares], count)[0], mean, eps)


def _scaled(chunk: Any, inverse: Any, scale: Any) -> list[Any]:
    return [(x * inverse) * s for x, s in zip(chunk, scale, strict=True)]


def _forward_rotated(
    m: Any, *refs: Any, tokens: int, heads: tuple[int, ...], groups: tuple[int, ...], d: int, eps: float
) -> None:
    """A thread has both elements of every pair, and the angles of the first half's chunks, for every ``groups``-th head.

    Each array has blocks of its own.
    """
    arrays = len(heads)
    xs, scales, (cos, sin), ys = refs[:arrays], refs[arrays : 2 * arrays], refs[2 * arrays : -arrays], refs[-arrays:]
    count = lanes(d)
    columns = [at for at, _ in _columns(m, d)]
    half = len(columns) // 2

    ends, places, first = [], [], 0
    for of_token, strided in zip(heads, groups, strict=True):
        item = (m.block - first) * (simt.THREADS // count) + m.thread // count
        token = item // strided
        places.append((item, token, item - token * strided, of_token, strided, tokens * strided))
        first += _blocks_of(tokens * strided, d)
        ends.append(first)
    mine = partial(_of_mine, m, ends)
    item, token, head, of_token, stride, items = (mine(values) for values in zip(*places, strict=True))
    x, scale, y = (mine(values) for values in (xs, scales, ys))
    inside, rows = item < items, []
    for i in range(max(-(-a // b) for a, b in zip(heads, groups, strict=True))):
        surely = all((i + 1) * strided <= of_token for of_token, strided in zip(heads, groups, strict=True))
        rows.append((m.wide(token * of_token + head) * d, inside if surely else inside & (head < of_token)))
        head = head + stride

    # All rows are on their way to shared memory at once: in registers they would leave room for few blocks.
    slots = CHUNK * m.itemsize(x) // 16
    for i, (base, where) in enumerate(rows):
        for c, at in enumerate(columns):
            m.fetch((i * len(columns) + c) * slots, x, base + at, CHUNK, where)
        m.commit()
    table = m.wide(token) * (d // 2)
    angles = [[m.load(of, table + at, CHUNK, inside) for of in (cos, sin)] for at in columns[:half]]
    for i, (base, where) in enumerate(rows):
        m.wait(len(rows) - 1 - i)
        chunks = [m.kept((i * len(columns) + c) * slots, CHUNK, x) for c in range(len(columns))]
        inverse = _inverse_of(m, chunks, count, 1.0 / d, eps)
        for lower, upper, at, (c, s) in zip(chunks[:half], chunks[half:], columns, angles, strict=False):
            # The scale again for every head: what of it waited in registers would leave room for three blocks instead of four.
            normals = [
                m.rounded(_scaled(chunk, inverse, m.load(scale, m.wide(column), CHUNK, again=True)), y)
                for chunk, column in ((lower, at), (upper, at + d // 2))
            ]
            turned = [rotate(*pair) for pair in zip(*normals, c, s, strict=True)]
            m.store(y, base + at, [a for a, _ in turned], where)
            m.store(y, base + at + d // 2, [b for _, b in turned], where)


def _of_mine(m: Any, ends: Sequence[int], values: Sequence[Any]) -> Any:
    """The value of the array that this block belongs to, whose blocks end there."""
    found = values[-1]
    for end, value in zip(ends[-2::-1], values[-2::-1], strict=True):
        found = m.pick(m.block < end, value, found)
    return found
