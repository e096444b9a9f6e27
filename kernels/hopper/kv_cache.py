"""Keys and values on their way to a cache: words that are copied, to wherever a position says."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax

from tbik_jax.kernels.hopper import simt

Array = jax.Array


def write_kv(
    k_cache: Array, v_cache: Array, k: Array, v: Array, positions: Array, page_table: Array | None = None
) -> tuple[Array, Array]:
    """See :func:`tbik_jax.kernels.kv_cache.write_kv`; both in one launch, in place if nobody needs the caches as they were."""
    if not k.size:
        return k_cache, v_cache
    chunk = math.gcd(k.shape[-1], 16 // k.dtype.itemsize)
    chunks = k.size // chunk
    tables = () if page_table is None else (page_table,)
    program = partial(
        _write_kv,
        chunk=chunk,
        chunks=chunks,
        of_new=k.shape,
        of_cache=k_cache.shape,
        pages=0 if page_table is None else page_table.shape[1],
    )
    blocks = -(-chunks // simt.THREADS)
    k_cache, v_cache = simt.launch(program, blocks, (k, v, positions, *tables), (), changed=(k_cache, v_cache))
    return k_cache, v_cache


def _write_kv(
    m: Any,
    k: Any,
    v: Any,
    positions: Any,
    *refs: Any,
    chunk: int,
    chunks: int,
    of_new: tuple[int, ...],
    of_cache: tuple[int, ...],
    pages: int,
) -> None:
    """A thread has a chunk of a head of both."""
    *tables, k_cache, v_cache = refs
    (_, tokens, heads, dim), (places, _, size, _) = of_new, of_cache
    item = m.block * simt.THREADS + m.thread
    inside = item < chunks
    item = m.pick(inside, item, 0)
    of_head = dim // chunk
    row, part = item // of_head, item % of_head
    token, head = row // heads, row % heads
    position, place = m.integer(positions, token), token // tokens
    inside = inside & (position > -1) & (position < (pages or 1) * size)
    if tables:
        position = m.pick(inside, position, 0)
        place = m.integer(tables[0], place * pages + position // size)
        inside = inside & (place > -1) & (place < places)
        position = position % size
    to = ((m.wide(place) * heads + head) * size + position) * dim + part * chunk
    for new, cache in ((k, k_cache), (v, v_cache)):
        m.copy(cache, to, new, m.wide(item) * chunk, chunk, inside)
