"""RMSNorm, alone or behind the residual sum, and its gradients.

A row of D elements is summed by ``lanes(D)`` lanes, a power of two. Chunk c of 8 elements belongs to lane c modulo their
number. A lane adds a chunk pairwise (`formulas.pairwise`), its chunks in order from +0; lanes are added pairwise.

The gradient of the scale adds 16 consecutive tokens in order from +0, and these sums pairwise.
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
TOKENS = 16
#: Head sizes of which a thread holds both halves of its pairs.
ROTATED = (64, 128, 256)
_FAN_IN = 32
LARGEST = 16384
#: Up to so many rows arrays share a launch, which costs registers; more rows fill the device by themselves.
_FEW = 16384


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
    if len(xs) > 1 and math.prod(leading) * sum(heads) > _FEW:
        return tuple(
            y for x, scale in zip(xs, scales, strict=True) for y in rms_norm_rope((x,), (scale,), cos, sin, eps)
        )
    program = partial(_forward_rotated, tokens=math.prod(leading), heads=heads, d=d, eps=eps)
    blocks = sum(_blocks_of(math.prod(leading) * count, d) for count in heads)
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs)
    return tuple(simt.launch(program, blocks, (*xs, *scales, cos, sin), out))


def _blocks_of(rows: int, d: int) -> int:
    return -(-rows // _rows_of_block(d))


def rms_norm_gradients(
    x: Array,
    scale: Array,
    dy: Array,
    eps: float,
    beside: Array | None = None,
    angles: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """With respect to ``x`` and ``scale``; ``beside``, what else flows back to ``x``, is added to its gradient.

    With ``angles``, tables as in :func:`rms_norm_rope`, ``dy [..., heads, D]`` is turned back first, and rounded to its dtype.
    """
    shape = x.shape
    heads = x.shape[-2] if angles is not None else 0
    x, rows, d = _rows(x)
    scaled = _padded(scale)
    if not x.size:
        return x.reshape(shape), jnp.zeros_like(scale)
    turned = [jnp.broadcast_to(table, (*shape[:-2], d // 2)) for table in angles or ()]
    given = (x, scaled, _rows(dy)[0], *turned) + (() if beside is None else (_rows(beside)[0],))
    per_block = _rows_of_block(d) * TOKENS
    blocks = -(-rows // per_block)
    nodes = blocks * min(_rows_of_block(d), simt.WARPS)
    out = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((nodes, x.shape[1]), jnp.float32))
    program = partial(_backward, rows=rows, d=x.shape[1], mean=1.0 / d, eps=eps, beside=beside is not None, heads=heads)
    dx, parts = simt.launch(program, blocks, given, out, shared=_exchanged(d, 2))
    return dx[:, :d].reshape(shape), sum_of_nodes(parts, scale.dtype)[:d]


def sum_of_nodes(parts: Array, dtype: Any) -> Array:
    """``[nodes, D]`` f32 -> ``[D]``, added pairwise; no part is -0."""
    nodes, d = parts.shape
    while True:
        left = -(-nodes // _FAN_IN)
        out = jax.ShapeDtypeStruct((left, d), jnp.float32 if left > 1 else dtype)
        blocks = left * -(-d // (4 * simt.THREADS))
        parts = simt.launch(partial(_add_nodes, nodes=nodes, d=d), blocks, (parts,), out)
        if left == 1:
            return parts[0]
        nodes = left


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


def _columns(m: Any, d: int) -> list[tuple[Any, Any]]:
    """Where a thread's chunks start in a row, and whether they are in it."""
    count = lanes(d)
    places = [((m.thread % count) + i * count) * CHUNK for i in range(-(-d // (CHUNK * count)))]
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
    squares = _sum_of_chunks(m, [[x * x for x in chunk] for chunk in chunks])
    inverse = _inverse(m, _sum_of_lanes(m, [squares], count)[0], mean, eps)
    return [
        [(x * inverse) * s for x, s in zip(chunk, factors, strict=True)]
        for chunk, factors in zip(chunks, scales, strict=True)
    ]


def _forward_rotated(m: Any, *refs: Any, tokens: int, heads: tuple[int, ...], d: int, eps: float) -> None:
    """A thread has both elements of every pair, and the angles of the first half's chunks. Each array has blocks of its own."""
    arrays = len(heads)
    xs, scales, (cos, sin), ys = refs[:arrays], refs[arrays : 2 * arrays], refs[2 * arrays : -arrays], refs[-arrays:]
    count = lanes(d)
    columns = [at for at, _ in _columns(m, d)]
    half = len(columns) // 2
    rows, insides, first = [], [], 0
    for of_token in heads:
        row = (m.block - first) * (simt.THREADS // count) + m.thread // count
        rows.append(row)
        insides.append((m.block * 0 - 1 < m.block - first) & (row < tokens * of_token))
        first += _blocks_of(tokens * of_token, d)

    def of_mine(loads: Sequence[list[Any]]) -> list[Any]:
        found = loads[0]
        for inside, values in zip(insides[1:], loads[1:], strict=True):
            found = [m.select(inside, b, a) for a, b in zip(found, values, strict=True)]
        return found

    def load(of: Sequence[Any], places: Sequence[Any]) -> list[Any]:
        return of_mine([m.load(*one, CHUNK, inside) for *one, inside in zip(of, places, insides, strict=True)])

    bases = [m.wide(row) * d for row in rows]
    tables = [m.wide(row // of_token) * (d // 2) for row, of_token in zip(rows, heads, strict=True)]
    chunks = [load(xs, [base + at for base in bases]) for at in columns]
    factors = [load(scales, [m.wide(at)] * arrays) for at in columns]
    angles = [[load([of] * arrays, [table + at for table in tables]) for of in (cos, sin)] for at in columns[:half]]
    normals = [m.rounded(normal, ys[0]) for normal in _normals(m, chunks, factors, count, 1.0 / d, eps)]
    for lower, upper, at, (c, s) in zip(normals[:half], normals[half:], columns, angles, strict=False):
        turned = [rotate(*pair) for pair in zip(lower, upper, c, s, strict=True)]
        for y, base, inside in zip(ys, bases, insides, strict=True):
            m.store(y, base + at, [a for a, _ in turned], inside)
            m.store(y, base + at + d // 2, [b for _, b in turned], inside)


def _backward(m: Any, *refs: Any, rows: int, d: int, mean: float, eps: float, beside: bool, heads: int = 0) -> None:
    """Every ``lanes`` threads take 16 rows one after another, and keep their part of the scale's gradient meanwhile.

    Rows that were turned are ``heads`` to a token, whose angles they share.
    """
    x, scale, dy = refs[:3]
    dx, parts = refs[-2:]
    count = lanes(d)
    columns = _columns(m, d)
    group = m.block * (simt.THREADS // count) + m.thread // count

    # Chunks that are loaded together: one, or both halves of the pairs that are turned.
    half = len(columns) // 2
    groups = [(c, c + half) for c in range(half)] if heads else [(c,) for c in range(len(columns))]

    def one(i: Any, sums: list[Any]) -> list[Any]:
        row = group * TOKENS + i
        inside = row < rows
        base = m.wide(row) * d

        def load(ref: Any, number: int, **how: bool) -> list[Any]:
            at, where = columns[number]
            return m.load(ref, base + at, CHUNK, inside & where, **how)

        def load_dy(numbers: tuple[int, ...], **how: bool) -> list[list[Any]]:
            found = [load(dy, c, **how) for c in numbers]
            if not heads:
                return found
            place = m.wide(row // heads) * (d // 2) + columns[numbers[0]][0]
            angles = [m.load(table, place, CHUNK, inside, **how) for table in refs[3:5]]
            turned = [rotate(x1, x2, c, -s) for x1, x2, c, s in zip(*found, *angles, strict=True)]
            return [m.rounded([pair[j] for pair in turned], dy) for j in range(2)]

        def load_scale(number: int) -> list[Any]:
            at, where = columns[number]
            return m.load(scale, m.wide(at), CHUNK, where, again=True)

        chunks = range(len(columns))
        xs: list[Any] = [load(x, c) for c in chunks]
        dys: dict[int, list[Any]] = {}
        for numbers in groups:
            dys.update(zip(numbers, load_dy(numbers), strict=True))
        squares = _sum_of_chunks(m, [[a * a for a in chunk] for chunk in xs])
        along = _sum_of_chunks(
            m, [[(a * b) * c for a, b, c in zip(dys[c], load_scale(c), xs[c], strict=True)] for c in chunks]
        )
        squares, along = _sum_of_lanes(m, [squares, along], count, i)
        # Rows behind the last have no share in the scale's gradient, not even that of a row of zeros and eps = 0.
        inverse = m.select(inside, _inverse(m, squares, mean, eps), 0.0)
        along = (along * inverse) * mean
        after = list(sums)
        for numbers in groups:
            # Read again: what waits in registers would leave room for fewer blocks.
            for c, dys_here in zip(numbers, load_dy(numbers, again=True), strict=True):
                normal = [a * inverse for a in load(x, c, again=True)]
                mine = slice(c * CHUNK, (c + 1) * CHUNK)
                after[mine] = [a + b * n for a, b, n in zip(sums[mine], dys_here, normal, strict=True)]
                gradient = [
                    (b * s - n * along) * inverse for b, s, n in zip(dys_here, load_scale(c), normal, strict=True)
                ]
                if beside:
                    gradient = [a + b for a, b in zip(load(refs[-3], c), m.rounded(gradient, dx), strict=True)]
                at, where = columns[c]
                m.store(dx, base + at, gradient, inside & where)
        return after

    sums = m.loop(TOKENS, [m.zero()] * (CHUNK * len(columns)), one)
    distance = count
    while distance < simt.WARP:
        sums = [a + m.of_lane(a, distance) for a in sums]
        distance *= 2
    per_node = max(count, simt.WARP)
    node = m.block * (simt.THREADS // per_node) + m.thread // per_node
    first = (m.thread % per_node) < count
    for number, (at, where) in enumerate(columns):
        m.store(parts, m.wide(node) * d + at, sums[number * CHUNK : (number + 1) * CHUNK], first & where)


def _add_nodes(m: Any, parts: Any, out: Any, *, nodes: int, d: int) -> None:
    """A thread adds up to 32 nodes of four columns."""
    across = -(-d // (4 * simt.THREADS))
    column = ((m.block % across) * simt.THREADS + m.thread) * 4
    to = m.block // across
    inside = column < d
    values = []
    for i in range(min(_FAN_IN, nodes)):
        node = to * _FAN_IN + i
        values.append(m.load(parts, m.wide(node) * d + column, 4, inside & (node < nodes)))
    total = pairwise(values, lambda a, b: [x + y for x, y in zip(a, b, strict=True)])
    m.store(out, m.wide(to) * d + column, total, inside)
