"""RMSNorm, alone or behind the residual sum, and its gradients.

A row of D elements is summed by ``lanes(D)`` lanes, a power of two. Chunk c of 8 elements belongs to lane c modulo their
number. A lane adds a chunk pairwise (`formulas.pairwise`), its chunks in order from +0; lanes are added pairwise.

The gradient of the scale adds 16 consecutive tokens in order from +0, and these sums pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
LARGEST = 16384
#: Heads of a token that a thread normalises and rotates by the same angles, and up to how many rows only one of them.
_HEADS, _FEW = 4, 16384
#: Blocks of threads with 16 rows in turn, up to which every row has threads of its own and tokens are added behind instead.
_ALONE = 32
#: Shared memory of a thread, in 16 bytes: what leaves room for four blocks a multiprocessor, and what there is.
_AHEAD, _MOST_SLOTS = 25, 96
#: Threads side by side when nodes are added; the others' nodes follow on each other, each thread's up to so often 16.
_ACROSS, _MOST_ROUNDS = 4, 4


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


def rms_norm_gradients(
    x: Array, scale: Array, dy: Array, eps: float, beside: Array | None = None
) -> tuple[Array, Array]:
    """With respect to ``x`` and ``scale``; ``beside``, what else flows back to ``x``, is added to its gradient."""
    shape = x.shape
    x, rows, d = _rows(x)
    if not x.size:
        return x.reshape(shape), jnp.zeros_like(scale)
    besides = [] if beside is None else [_rows(beside)[0]]
    (dx,), (dscale,) = _gradients(
        [x], [_padded(scale)], [_rows(dy)[0]], [], besides, (_Rows(rows),), 1.0 / d, eps, scale.dtype
    )
    return dx[:, :d].reshape(shape), dscale[0, :d]


def rms_norm_rope_gradients(
    xs: Sequence[Array],
    scales: Sequence[Array],
    dys: Sequence[Array],
    cos: Array,
    sin: Array,
    eps: float,
    leaves: Sequence[int] | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Of `rms_norm_rope`, with respect to every ``x`` and every scale; ``dy`` turned back is rounded to its dtype.

    With ``leaves``, equal groups of an array's heads, the gradient of its scale is f32 ``[leaves, D]``, each as if alone.
    """
    if len(xs) > 1 and any(len({x.dtype for x in arrays}) > 1 for arrays in (xs, dys, scales)):
        each = [
            rms_norm_rope_gradients([x], [scale], [dy], cos, sin, eps, leaves and leaves[i : i + 1])
            for i, (x, scale, dy) in enumerate(zip(xs, scales, dys, strict=True))
        ]
        return tuple(dx for (dx,), _ in each), tuple(dscale for _, (dscale,) in each)
    leading, d = xs[0].shape[:-2], xs[0].shape[-1]
    tables = [jnp.broadcast_to(table, (*leading, d // 2)) for table in (cos, sin)]
    groups = leaves or (1,) * len(xs)
    dtype = jnp.dtype(jnp.float32) if leaves else scales[0].dtype
    if not tables[0].size:
        sums = [jnp.zeros((count, d), dtype) for count in groups]
        return tuple(xs), tuple(sums if leaves else (x[0] for x in sums))
    of = tuple(
        _Rows(math.prod(leading) * (x.shape[-2] // count), count, x.shape[-2] // count)
        for x, count in zip(xs, groups, strict=True)
    )
    flat = [[x.reshape(-1, d) for x in arrays] for arrays in (xs, dys)]
    dxs, dscales = _gradients(flat[0], scales, flat[1], tables, [], of, 1.0 / d, eps, dtype)
    dxs = [dx.reshape(x.shape) for dx, x in zip(dxs, xs, strict=True)]
    return tuple(dxs), tuple(dscales if leaves else (x[0] for x in dscales))


@dataclass(frozen=True)
class _Rows:
    """Of an array: those of a leaf, how many leaves there are, and how many consecutive rows of one share their angles."""

    rows: int
    leaves: int = 1
    heads: int = 1

    def blocks(self, rows: int) -> int:
        """Of a leaf, where each takes so many of its rows."""
        return -(-self.rows // rows)


def _gradients(
    xs: Sequence[Array],
    scales: Sequence[Array],
    dys: Sequence[Array],
    tables: Sequence[Array],
    besides: Sequence[Array],
    of: tuple[_Rows, ...],
    mean: float,
    eps: float,
    dtype: Any,
) -> tuple[list[Array], list[Array]]:
    """Of arrays ``[rows, D]`` in one launch: the gradients of each, and of its scale ``[leaves, D]``, of that dtype."""
    d, together = xs[0].shape[1], _rows_of_block(xs[0].shape[1])

    def all_blocks(chain: int) -> int:
        return sum(each.leaves * each.blocks(together * chain) for each in of)

    many = all_blocks(TOKENS) > _ALONE
    chain = TOKENS if many else 1
    nodes = [(each.leaves, each.blocks(together * TOKENS) if many else each.rows) for each in of]
    stage = len(_columns_of(d)) * sum(_slots(array) for array in (xs[0], dys[0], *besides))
    # Behind the rows lie a token's angles, and the scale if there is room for it.
    of_angles, of_scale = 2 * len(_columns_of(d)) * bool(tables) * many, _slots_of_scale(d)
    shared = many and 2 * stage + of_angles + of_scale <= _AHEAD
    behind = of_angles + of_scale * shared
    stages = max(1, min((_AHEAD - behind) // stage, 3), 2 * (2 * stage + behind <= _MOST_SLOTS)) if many else 1
    program = partial(
        _backward,
        of=of,
        d=d,
        mean=mean,
        eps=eps,
        chain=chain,
        stages=stages,
        shared=shared,
        turned=bool(tables),
        beside=bool(besides),
    )
    sums = sum(leaves * count for leaves, count in nodes)
    out = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs), jax.ShapeDtypeStruct((sums, d), jnp.float32)]
    slots = max(stages * stage + behind, 2 * len(_columns_of(d)))
    given = (*xs, *scales, *dys, *tables, *besides)
    *dxs, parts = simt.launch(program, all_blocks(chain), given, tuple(out), shared=_exchanged(d, 2), slots=slots)
    return dxs, _sums(parts, nodes, dtype, in_order=not many)


def _slots(x: Array) -> int:
    """Of a chunk."""
    return CHUNK * x.dtype.itemsize // 16


def _slots_of_scale(d: int) -> int:
    """In f32, which the rows of a block share."""
    return -(-2 * len(_columns_of(d)) * lanes(d) // simt.THREADS)


def _sums(parts: Array, of: Sequence[tuple[int, int]], dtype: Any, in_order: bool) -> list[Array]:
    """Of ``(leaves, nodes of a leaf)``, array by array, the sums of leaves: f32 ``[all nodes, D]`` -> an ``[leaves, D]`` each.

    Pairwise; ``in_order``, 16 by 16 from +0 before that. No part of a pair is -0, so missing ones may count as +0.
    """
    d = parts.shape[1]
    while True:
        once = TOKENS * (simt.THREADS // _ACROSS)
        rounds = min(_MOST_ROUNDS, 1 << (-(-max(nodes for _, nodes in of) // once) - 1).bit_length())
        left = [(leaves, -(-nodes // (once * rounds))) for leaves, nodes in of]
        rows = sum(leaves * nodes for leaves, nodes in left)
        last = all(nodes == 1 for _, nodes in left)
        out = tuple(jax.ShapeDtypeStruct((leaves, d), dtype) for leaves, _ in left)
        if not last:
            out = (jax.ShapeDtypeStruct((rows, d), jnp.float32),)
        program = partial(_add_nodes, of=tuple(of), d=d, rounds=rounds, in_order=in_order)
        sums = simt.launch(program, rows * -(-d // (4 * _ACROSS)), (parts,), out, slots=1)
        if last:
            return list(sums)
        (parts,), of, in_order = sums, left, False


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
    squares = _sum_of_chunks(m, [[x * x for x in chunk] for chunk in chunks])
    inverse = _inverse(m, _sum_of_lanes(m, [squares], count)[0], mean, eps)
    return [
        [(x * inverse) * s for x, s in zip(chunk, factors, strict=True)]
        for chunk, factors in zip(chunks, scales, strict=True)
    ]


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
    factors = [m.load(scale, m.wide(at), CHUNK) for at in columns]
    for i, (base, where) in enumerate(rows):
        m.wait(len(rows) - 1 - i)
        chunks = [m.kept((i * len(columns) + c) * slots, CHUNK, x) for c in range(len(columns))]
        normals = [m.rounded(normal, y) for normal in _normals(m, chunks, factors, count, 1.0 / d, eps)]
        for lower, upper, at, (c, s) in zip(normals[:half], normals[half:], columns, angles, strict=False):
            turned = [rotate(*pair) for pair in zip(lower, upper, c, s, strict=True)]
            m.store(y, base + at, [a for a, _ in turned], where)
            m.store(y, base + at + d // 2, [b for _, b in turned], where)


def _of_mine(m: Any, ends: Sequence[int], values: Sequence[Any]) -> Any:
    """The value of the array that this block belongs to, whose blocks end there."""
    found = values[-1]
    for end, value in zip(ends[-2::-1], values[-2::-1], strict=True):
        found = m.pick(m.block < end, value, found)
    return found


def _backward(
    m: Any,
    *refs: Any,
    of: tuple[_Rows, ...],
    d: int,
    mean: float,
    eps: float,
    chain: int,
    stages: int,
    shared: bool,
    turned: bool,
    beside: bool,
) -> None:
    """Every ``lanes`` threads take 16 rows one after another, and keep their part of the scale's gradient meanwhile.

    The rows after this one are on their way to shared memory. The angles of a token lie there too while its rows pass, and the
    scale if it is ``shared``. Or they take one row (``chain``), and its part is all there is.
    """
    rest, arrays = list(refs), len(of)
    xs, scales, dys, tables, besides, dxs, (parts,) = (
        [rest.pop(0) for _ in range(count)]
        for count in (arrays, arrays, arrays, 2 * turned, arrays * beside, arrays, 1)
    )
    count = lanes(d)
    together = simt.THREADS // count
    columns, numbers = _columns(m, d), _columns_of(d)
    # Chunks that are loaded together: one, or both halves of the pairs that are turned.
    half = len(columns) // 2
    groups = [(c, c + half) for c in range(half)] if turned else [(c,) for c in numbers]

    ends, places, first, first_part = [], [], 0, 0
    for each in of:
        blocks = each.blocks(together * chain)
        here = m.block - first
        leaf = here // blocks
        nodes = blocks if chain > 1 else each.rows
        places.append((here - leaf * blocks, leaf * each.heads, leaf * nodes + first_part))
        first += each.leaves * blocks
        first_part += each.leaves * nodes
        ends.append(first)
    mine = partial(_of_mine, m, ends)
    of_leaf, head, part = (mine(values) for values in zip(*places, strict=True))
    x, scale, dy, dx = (mine(values) for values in (xs, scales, dys, dxs))
    also = [mine(besides)] if beside else []
    rows = mine([each.rows for each in of])
    others = mine([each.heads * (each.leaves - 1) for each in of])  # heads of the other leaves
    start = (of_leaf * together + m.thread // count) * chain

    def place(i: Any) -> tuple[Any, Any, Any]:
        """Of a row in memory, of its token, and whether it is one."""
        number = start + i
        token = mine([number // each.heads for each in of])
        return number + head + token * others, token, number < rows

    fetched, slot, units = [], [], 0
    for ref in (x, dy, *also):
        size = CHUNK * m.itemsize(ref) // 16
        fetched.append(ref)
        slot.append([units + c * size for c in numbers])
        units += size * len(columns)

    def places_of_scale(c: int) -> list[tuple[int, Any]]:
        """Slot and thread of both halves of a chunk."""
        first = [(2 * c + half) * count for half in range(2)]
        return [(stages * units + i // simt.THREADS, m.thread % count + i % simt.THREADS) for i in first]

    def place_of_angles(table: int, pair: int) -> int:
        """Slot of the cosines or the sines of a pair of chunks."""
        return stages * units + _slots_of_scale(d) * shared + 2 * (table * half + pair)

    def fetch_angles(i: Any, *, first: bool = False) -> None:
        """If a row is the first of its token here."""
        _, token, inside = place(i)
        only = True
        if not first:
            inside = inside & (i < chain)
            only = (mine([(start + i) % each.heads for each in of]) == 0) & (i < chain)
        for table, ref in enumerate(tables):
            for pair in range(half):
                at = m.wide(token) * (d // 2) + columns[pair][0]
                m.fetch(place_of_angles(table, pair), ref, at, CHUNK, inside, only)
        m.commit()

    def fetch(i: Any, ahead: int) -> None:
        row, _, inside = place(i + ahead)
        stage = ((i + ahead) % stages) * units
        if ahead:
            inside = inside & (i + ahead < chain)
        for ref, slots in zip(fetched, slot, strict=True):
            for (at, where), number in zip(columns, slots, strict=True):
                m.fetch(stage + number, ref, m.wide(row) * d + at, CHUNK, inside & where)
        m.commit()

    def one(i: Any, sums: list[Any]) -> list[Any]:
        fetch(i, stages - 1)
        m.wait(min(1, stages - 1) if turned else stages - 1)
        row, token, inside = place(i)
        base = m.wide(row) * d
        stage = (i % stages) * units

        def kept(array: int, number: int) -> list[Any]:
            return m.kept(stage + slot[array][number], CHUNK, fetched[array])

        def load_scale(number: int) -> list[Any]:
            if shared:
                return [value for place in places_of_scale(number) for value in m.kept(place[0], 4, thread=place[1])]
            return m.load(scale, m.wide(columns[number][0]), CHUNK, columns[number][1], again=True)

        along, squares = {}, {}
        for pair in groups:
            dys_here = [kept(1, c) for c in pair]
            if turned:
                if chain > 1:
                    angles = [m.kept(place_of_angles(table, pair[0]), CHUNK) for table in range(2)]
                else:
                    at = m.wide(token) * (d // 2) + columns[pair[0]][0]
                    angles = [m.load(table, at, CHUNK, inside) for table in tables]
                both = [rotate(x1, x2, c, -s) for x1, x2, c, s in zip(*dys_here, *angles, strict=True)]
                dys_here = [m.rounded([values[j] for values in both], dy) for j in range(2)]
                for c, values in zip(pair, dys_here, strict=True):
                    m.keep(stage + slot[1][c], values, dy)
            for c, values in zip(pair, dys_here, strict=True):
                xs_here = kept(0, c)
                squares[c] = pairwise([a * a for a in xs_here])
                along[c] = pairwise([(a * b) * x for a, b, x in zip(values, load_scale(c), xs_here, strict=True)])
        totals = [m.zero(), m.zero()]
        for c in numbers:
            totals = [total + values[c] for total, values in zip(totals, (squares, along), strict=True)]
        square, share = _sum_of_lanes(m, totals, count, i)
        # Rows behind the last have no share in the scale's gradient, not even that of a row of zeros and eps = 0.
        inverse = m.select(inside, _inverse(m, square, mean, eps), 0.0)
        share = (share * inverse) * mean
        after = list(sums)
        for c in numbers:
            # Read again: what waits in registers would leave room for fewer blocks.
            dys_here = kept(1, c)
            normal = [a * inverse for a in kept(0, c)]
            places = slice(c * CHUNK, (c + 1) * CHUNK)
            after[places] = [a + b * n for a, b, n in zip(sums[places], dys_here, normal, strict=True)]
            gradient = [(b * s - n * share) * inverse for b, s, n in zip(dys_here, load_scale(c), normal, strict=True)]
            if beside:
                gradient = [a + b for a, b in zip(kept(2, c), m.rounded(gradient, dx), strict=True)]
            at, where = columns[c]
            m.store(dx, base + at, gradient, inside & where)
        if turned and chain > 1:
            fetch_angles(i + 1)
        return after

    for i in range(stages - 1):
        fetch(0, i)
    if turned and chain > 1:
        fetch_angles(0, first=True)
    if shared:
        for c, (at, where) in enumerate(columns):
            values = m.load(scale, m.wide(at), CHUNK, where)
            for i, (number, thread) in enumerate(places_of_scale(c)):
                m.keep(number, values[4 * i : 4 * i + 4], thread=thread)
        m.barrier()
    zeros = [m.zero()] * (CHUNK * len(columns))
    if chain == 1:
        sums = one(0, zeros)
        for c, (at, where) in enumerate(columns):
            m.store(parts, m.wide(part + start) * d + at, sums[c * CHUNK : (c + 1) * CHUNK], (start < rows) & where)
        return
    sums = m.loop(chain, zeros, one)
    m.wait(0)
    distance = count
    while distance < simt.WARP:
        sums = [a + m.of_lane(a, distance) for a in sums]
        distance *= 2
    span = max(count, simt.WARP)
    if span < simt.THREADS:
        m.keep(0, sums)
        m.barrier()
        places = [m.thread % span + i * span for i in range(simt.THREADS // span)]
    for c, (at, where) in enumerate(columns):
        total = sums[c * CHUNK : (c + 1) * CHUNK]
        if span < simt.THREADS:
            total = _added([m.kept(2 * c, CHUNK, thread=thread) for thread in places])
        m.store(parts, m.wide(part + of_leaf) * d + at, total, (m.thread < count) & where)


def _added(values: Sequence[Sequence[Any]]) -> Any:
    return pairwise(values, lambda a, b: [x + y for x, y in zip(a, b, strict=True)])


def _add_nodes(
    m: Any, parts: Any, *outs: Any, of: tuple[tuple[int, int], ...], d: int, rounds: int, in_order: bool
) -> None:
    """A thread adds ``rounds`` times 16 nodes of four columns; four threads lie side by side.

    The last time every array has a result of its own.
    """
    across = -(-d // (4 * _ACROSS))
    column = ((m.block % across) * _ACROSS + m.thread % _ACROSS) * 4
    to = m.block // across
    fan_in = rounds * TOKENS * (simt.THREADS // _ACROSS)
    ends, places, first, first_part = [], [], 0, 0
    for leaves, nodes in of:
        left = -(-nodes // fan_in)
        here = to - first
        leaf = here // left
        places.append(((here - leaf * left) * fan_in, leaf * nodes + first_part, here if len(outs) > 1 else to))
        first += leaves * left
        first_part += leaves * nodes
        ends.append(first * across)
    mine = partial(_of_mine, m, ends)
    start, base, row = (mine(values) for values in zip(*places, strict=True))
    start = start + (m.thread // _ACROSS) * (rounds * TOKENS)
    last = mine([nodes for _, nodes in of])
    inside = column < d
    totals = []
    for first in range(0, rounds * TOKENS, TOKENS):
        values = [
            m.load(parts, m.wide(base + start + i) * d + column, 4, inside & (start + i < last))
            for i in range(first, first + min(TOKENS, max(nodes for _, nodes in of)))
        ]
        if in_order:
            total = [m.zero()] * 4
            for value in values:
                total = [a + b for a, b in zip(total, value, strict=True)]
            totals.append(total)
        else:
            totals.append(_added(values))
    total = _added(totals)
    distance = _ACROSS
    while distance < simt.WARP:
        total = [a + m.of_lane(a, distance) for a in total]
        distance *= 2
    m.keep(0, total)
    m.barrier()
    total = _added([m.kept(0, 4, thread=m.thread % simt.WARP + i * simt.WARP) for i in range(simt.WARPS)])
    out = mine(outs) if len(outs) > 1 else outs[0]
    m.store(out, m.wide(row) * d + column, total, inside & (m.thread < _ACROSS))
