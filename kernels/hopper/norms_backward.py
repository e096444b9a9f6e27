"""Gradients of RMSNorm, alone, behind the residual sum, and in front of a rotation.

Sums over a row have the order of `norms`. The gradient of the scale adds 16 consecutive tokens in order from +0, and these sums
pairwise, whichever kernel makes them: `_backward_of_few` for few rows, `_backward_of_short` for heads, `_backward` for long rows.
What they leave is added by `_add_nodes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.hopper.formulas import pairwise, rotate
from tbik_jax.kernels.hopper.norms import (
    CHUNK,
    _columns,
    _columns_of,
    _exchanged,
    _inverse,
    _of_mine,
    _padded,
    _rows,
    _rows_of_block,
    _slots,
    _sum_of_lanes,
    lanes,
)

Array = jax.Array
TOKENS = 16
#: Blocks of threads with 16 rows in turn, up to which every row has threads of its own and tokens are added behind instead.
_ALONE = 32
#: Shared memory of a thread, in 16 bytes: what leaves room for four blocks a multiprocessor, and what there is.
_AHEAD, _MOST_SLOTS = 25, 96
#: Up to so many elements a row's part in the scale's gradient lies in shared memory, in so many pieces of a thread at most, and
#: tokens are added there; a block has so many rounds of rows.
_SHORT, _PIECES, _ROUNDS = 256, 8, 2
#: Threads side by side when nodes are added; the others' nodes follow on each other, each thread's up to so often 16.
_ACROSS, _MOST_ROUNDS = 4, 4


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

    def all_blocks(rows: int) -> int:
        return sum(each.leaves * each.blocks(rows) for each in of)

    few = all_blocks(together * TOKENS) <= _ALONE
    stage = len(_columns_of(d)) * sum(_slots(array) for array in (xs[0], dys[0], *besides))
    options: dict[str, Any] = {"of": of, "d": d, "mean": mean, "eps": eps, "beside": bool(besides)}
    if few:
        rows, slots = together, 0
        program = partial(_backward_of_few, turned=bool(tables), **options)
    elif d <= _SHORT:
        rows, slots = _ROUNDS * 2 * together, 2 * _PIECES + _ROUNDS + stage + _slots_of_scale(d)
        program = partial(_backward_of_short, turned=bool(tables), **options)
    else:
        rows, of_scale = together * TOKENS, _slots_of_scale(d)
        shared = 2 * stage + of_scale <= _AHEAD
        stages = max(1, min((_AHEAD - of_scale * shared) // stage, 3), 2 * (2 * stage <= _MOST_SLOTS))
        slots = max(stages * stage + of_scale * shared, 2 * len(_columns_of(d)))
        program = partial(_backward, stages=stages, shared=shared, **options)
    nodes = [(each.leaves, each.rows if few else each.blocks(rows)) for each in of]
    sums = sum(leaves * count for leaves, count in nodes)
    out = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in xs), jax.ShapeDtypeStruct((sums, d), jnp.float32)]
    given = (*xs, *scales, *dys, *tables, *besides)
    *dxs, parts = simt.launch(program, all_blocks(rows), given, tuple(out), shared=_exchanged(d, 2), slots=slots)
    return dxs, _sums(parts, nodes, dtype, in_order=few)


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


@dataclass(frozen=True)
class _Own:
    """What a block has: one of the arrays that share a launch, and rows of one of its leaves."""

    x: Any
    scale: Any
    dy: Any
    dx: Any
    beside: list[Any]
    tables: list[Any]
    parts: Any
    rows: Any  #: of the leaf
    block: Any  #: its number among those of the leaf
    part: Any  #: the leaf's first node
    #: Where a row of the leaf is in memory, its token, and whether it is one.
    place: Callable[[Any], tuple[Any, Any, Any]]


def _own(
    m: Any, refs: Sequence[Any], of: tuple[_Rows, ...], of_block: int, turned: bool, beside: bool, few: bool = False
) -> _Own:
    """A block has ``of_block`` rows of a leaf, and a node of them; of ``few``, a node of each."""
    rest, arrays = list(refs), len(of)
    xs, scales, dys, tables, besides, dxs, (parts,) = (
        [rest.pop(0) for _ in range(count)]
        for count in (arrays, arrays, arrays, 2 * turned, arrays * beside, arrays, 1)
    )
    ends, places, first, first_part = [], [], 0, 0
    for each in of:
        blocks = each.blocks(of_block)
        here = m.block - first
        leaf = here // blocks
        nodes = each.rows if few else blocks
        places.append((here - leaf * blocks, leaf * each.heads, leaf * nodes + first_part))
        first += each.leaves * blocks
        first_part += each.leaves * nodes
        ends.append(first)
    mine = partial(_of_mine, m, ends)
    block, head, part = (mine(values) for values in zip(*places, strict=True))
    x, scale, dy, dx = (mine(values) for values in (xs, scales, dys, dxs))
    rows = mine([each.rows for each in of])
    others = mine([each.heads * (each.leaves - 1) for each in of])  # heads of the other leaves

    def place(number: Any) -> tuple[Any, Any, Any]:
        token = mine([number // each.heads for each in of])
        return number + head + token * others, token, number < rows

    return _Own(x, scale, dy, dx, [mine(besides)] if beside else [], tables, parts, rows, block, part, place)


def _slots_of_row(m: Any, arrays: Sequence[Any], d: int, first: int) -> tuple[list[list[int]], int]:
    """Where a thread's chunks of a row lie from a slot on, array by array, and the slot behind them."""
    slots = []
    for ref in arrays:
        size = CHUNK * m.itemsize(ref) // 16
        slots.append([first + c * size for c in _columns_of(d)])
        first += size * len(_columns_of(d))
    return slots, first


def _keep_scale(m: Any, scale: Any, first: int, d: int) -> Callable[[int], list[Any]]:
    """Put it in slots from the first one on, once for all rows of the block; how to get a chunk, behind a barrier."""
    count = lanes(d)

    def places(c: int) -> list[tuple[int, Any]]:
        starts = [(2 * c + half) * count for half in range(2)]
        return [(first + i // simt.THREADS, m.thread % count + i % simt.THREADS) for i in starts]

    for c, (at, where) in enumerate(_columns(m, d)):
        values = m.load(scale, m.wide(at), CHUNK, where)
        for half, (slot, thread) in enumerate(places(c)):
            m.keep(slot, values[4 * half : 4 * half + 4], thread=thread)
    return lambda c: [value for slot, thread in places(c) for value in m.kept(slot, 4, thread=thread)]


def _load_scale(m: Any, scale: Any, d: int) -> Callable[[int], list[Any]]:
    """How to get a chunk, each time from the cache."""
    columns = _columns(m, d)
    return lambda c: m.load(scale, m.wide(columns[c][0]), CHUNK, columns[c][1], again=True)


def _along(xs: Sequence[Any], dys: Sequence[Any], scale: Sequence[Any]) -> tuple[Any, Any]:
    """Of a chunk, the sum of squares, and that of the products of ``x`` and what comes back to its norm."""
    squares = pairwise([a * a for a in xs])
    return squares, pairwise([(b * s) * a for a, b, s in zip(xs, dys, scale, strict=True)])


def _of_row(
    m: Any, sums: Sequence[tuple[Any, Any]], inside: Any, d: int, mean: float, eps: float, turn: Any = 0
) -> tuple[Any, Any]:
    """The inverse of the root, and the share of the norm in the gradient of ``x``; from the sums of a lane's chunks."""
    totals = [m.zero(), m.zero()]
    for values in sums:
        totals = [total + value for total, value in zip(totals, values, strict=True)]
    square, share = _sum_of_lanes(m, totals, lanes(d), turn)
    # Rows behind the last have no share in the scale's gradient, not even that of a row of zeros and eps = 0.
    inverse = m.select(inside, _inverse(m, square, mean, eps), 0.0)
    return inverse, (share * inverse) * mean


def _of_chunk(
    m: Any, xs: Sequence[Any], dys: Sequence[Any], scale: Sequence[Any], of_row: tuple[Any, Any], beside: Any, dx: Any
) -> tuple[list[Any], list[Any]]:
    """What a chunk adds to the gradient of the scale, and the gradient of ``x``; ``beside`` is None or a chunk."""
    inverse, share = of_row
    normal = [a * inverse for a in xs]
    gradient = [(b * s - n * share) * inverse for b, s, n in zip(dys, scale, normal, strict=True)]
    if beside is not None:
        gradient = [a + b for a, b in zip(beside, m.rounded(gradient, dx), strict=True)]
    return [b * n for b, n in zip(dys, normal, strict=True)], gradient


def _one_row(
    m: Any,
    own: _Own,
    number: Any,
    arrays: Sequence[list[list[Any]]],
    scale: Callable[[int], list[Any]],
    d: int,
    mean: float,
    eps: float,
) -> Iterator[tuple[int, list[Any]]]:
    """Write the gradient of a row that threads have in registers; what each of their chunks adds to that of the scale.

    ``arrays`` are the chunks of ``x``, of ``dy``, and of what is beside.
    """
    columns, numbers = _columns(m, d), _columns_of(d)
    row, token, inside = own.place(number)
    base, half = m.wide(row) * d, len(columns) // 2
    xs, dys, *besides = arrays
    if own.tables:
        for c in range(half):
            at = m.wide(token) * (d // 2) + columns[c][0]
            cos, sin = (m.load(table, at, CHUNK, inside) for table in own.tables)
            both = [rotate(x1, x2, c, -s) for x1, x2, c, s in zip(dys[c], dys[c + half], cos, sin, strict=True)]
            dys[c], dys[c + half] = (m.rounded([values[i] for values in both], own.dy) for i in range(2))
    of_row = _of_row(m, [_along(xs[c], dys[c], scale(c)) for c in numbers], inside, d, mean, eps)
    for c, (at, where) in enumerate(columns):
        beside = besides[0][c] if besides else None
        added, gradient = _of_chunk(m, xs[c], dys[c], scale(c), of_row, beside, own.dx)
        m.store(own.dx, base + at, gradient, inside & where)
        yield c, added


def _backward_of_few(
    m: Any, *refs: Any, of: tuple[_Rows, ...], d: int, mean: float, eps: float, turned: bool, beside: bool
) -> None:
    """Every ``lanes`` threads take a row, whose part in the gradient of the scale is a node."""
    together = _rows_of_block(d)
    own = _own(m, refs, of, together, turned, beside, few=True)
    number = own.block * together + m.thread // lanes(d)
    columns = _columns(m, d)
    row, _, inside = own.place(number)
    arrays = [
        [m.load(ref, m.wide(row) * d + at, CHUNK, inside & where) for at, where in columns]
        for ref in (own.x, own.dy, *own.beside)
    ]
    for c, added in _one_row(m, own, number, arrays, _load_scale(m, own.scale, d), d, mean, eps):
        at, where = columns[c]
        sums = [m.zero() + a for a in added]
        m.store(own.parts, m.wide(own.part + number) * d + at, sums, (number < own.rows) & where)


def _backward_of_short(
    m: Any, *refs: Any, of: tuple[_Rows, ...], d: int, mean: float, eps: float, turned: bool, beside: bool
) -> None:
    """Rounds of two rows for every ``lanes`` threads, whose parts in the gradient of the scale lie in shared memory.

    There a thread adds 16 tokens of 4 columns, then lanes are added, at the end rounds: the block's node. Slot p has the p-th 4
    elements of every lane, ``p % swaps`` rows further on: 8 threads that read the same row then read from all banks.
    """
    count, together = lanes(d), _rows_of_block(d)
    swaps, chains, nodes = _PIECES // count, 2 * together // TOKENS, 2 * _PIECES
    own = _own(m, refs, of, _ROUNDS * 2 * together, turned, beside)
    arrays = own.x, own.dy, *own.beside
    ring, behind = _slots_of_row(m, arrays, d, nodes + _ROUNDS)
    lane = m.thread % count
    # Of a thread that adds.
    chain = (m.thread // _PIECES) % chains
    shift = (m.thread // count) % swaps
    piece = m.thread // (_PIECES * chains) * swaps + shift

    def place(row: Any, shift: Any) -> Any:
        """The thread whose slot has a row."""
        return (row // swaps * swaps + (row % swaps + shift) % swaps) * count + lane

    def number(n: Any) -> Any:
        return (own.block * (2 * _ROUNDS) + n) * together + m.thread // count

    def fetch(n: Any) -> None:
        row, _, inside = own.place(number(n))
        inside = inside & (n < 2 * _ROUNDS)
        for ref, slots in zip(arrays, ring, strict=True):
            for (at, where), slot in zip(_columns(m, d), slots, strict=True):
                m.fetch(slot, ref, m.wide(row) * d + at, CHUNK, inside & where)
        m.commit()

    def keep(i: Any, step: Any) -> list[Any]:
        n, row = i * 2 + step, m.thread // count
        m.wait(0)
        values = [[m.kept(slot, CHUNK, ref) for slot in slots] for ref, slots in zip(arrays, ring, strict=True)]
        fetch(n + 1)
        for c, added in _one_row(m, own, number(n), values, scale, d, mean, eps):
            for half in range(2):
                part = 2 * c + half
                to = place(row, part % swaps)
                m.keep(step * _PIECES + part, added[4 * half : 4 * half + 4], thread=to)
        return []

    def one(i: Any, _: list[Any]) -> list[Any]:
        m.loop(2, [], lambda step, _: keep(i, step))
        m.barrier()
        total = [m.zero()] * 4
        of_step = together // TOKENS
        for token in range(TOKENS):
            row = chain % of_step * TOKENS + token
            values = m.kept(chain // of_step * _PIECES + piece, 4, thread=place(row, shift))
            total = [a + b for a, b in zip(total, values, strict=True)]
        distance = _PIECES
        while distance < min(_PIECES * chains, simt.WARP):
            total = [a + m.of_lane(a, distance) for a in total]
            distance *= 2
        m.keep(nodes + i, total)
        m.barrier()
        return []

    fetch(0)
    scale = _keep_scale(m, own.scale, behind, d)
    m.barrier()
    m.loop(_ROUNDS, [], one)
    others = range(0, _PIECES * chains, simt.WARP)  # threads of one column
    total = _added(
        [m.kept(nodes + i, 4, thread=(m.thread + other) % simt.THREADS) for i in range(_ROUNDS) for other in others]
    )
    column = ((piece // 2) * count + lane) * CHUNK + (piece % 2) * 4
    m.store(own.parts, m.wide(own.part + own.block) * d + column, total, (chain == 0) & (column < d))


def _backward(
    m: Any,
    *refs: Any,
    of: tuple[_Rows, ...],
    d: int,
    mean: float,
    eps: float,
    stages: int,
    shared: bool,
    beside: bool,
) -> None:
    """Every ``lanes`` threads take 16 rows one after another, and keep their part of the scale's gradient meanwhile.

    The rows after this one are on their way to shared memory. The scale lies there, too, if it is ``shared``.
    """
    count = lanes(d)
    together = simt.THREADS // count
    columns, numbers = _columns(m, d), _columns_of(d)
    own = _own(m, refs, of, together * TOKENS, False, beside)
    start = (own.block * together + m.thread // count) * TOKENS
    fetched = own.x, own.dy, *own.beside
    slot, units = _slots_of_row(m, fetched, d, 0)

    def fetch(i: Any, ahead: int) -> None:
        row, _, inside = own.place(start + i + ahead)
        stage = ((i + ahead) % stages) * units
        if ahead:
            inside = inside & (i + ahead < TOKENS)
        for ref, slots in zip(fetched, slot, strict=True):
            for (at, where), number in zip(columns, slots, strict=True):
                m.fetch(stage + number, ref, m.wide(row) * d + at, CHUNK, inside & where)
        m.commit()

    def one(i: Any, sums: list[Any]) -> list[Any]:
        fetch(i, stages - 1)
        m.wait(stages - 1)
        row, _, inside = own.place(start + i)
        base = m.wide(row) * d
        stage = (i % stages) * units

        def kept(array: int, number: int) -> list[Any]:
            return m.kept(stage + slot[array][number], CHUNK, fetched[array])

        of_row = _of_row(m, [_along(kept(0, c), kept(1, c), scale(c)) for c in numbers], inside, d, mean, eps, i)
        after = list(sums)
        for c, (at, where) in enumerate(columns):
            # Read again: what waits in registers would leave room for fewer blocks.
            besides = kept(2, c) if beside else None
            added, gradient = _of_chunk(m, kept(0, c), kept(1, c), scale(c), of_row, besides, own.dx)
            places = slice(c * CHUNK, (c + 1) * CHUNK)
            after[places] = [a + b for a, b in zip(sums[places], added, strict=True)]
            m.store(own.dx, base + at, gradient, inside & where)
        return after

    for i in range(stages - 1):
        fetch(0, i)
    if shared:
        scale = _keep_scale(m, own.scale, stages * units, d)
        m.barrier()
    else:
        scale = _load_scale(m, own.scale, d)
    sums = m.loop(TOKENS, [m.zero()] * (CHUNK * len(columns)), one)
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
        m.store(own.parts, m.wide(own.part + own.block) * d + at, total, (m.thread < count) & where)


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
