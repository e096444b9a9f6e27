"""Sums over the leaves of a vocabulary, as they are or of exponentials. Entries are read once.

Chunk c of 4 entries belongs to lane c modulo 128. A lane adds a chunk pairwise, its chunks in order from +0; lanes are
added pairwise.

Exponentials are relative to a maximum, which a lane raises before each *group* of 4 of its chunks, starting from the lowest
float: what it has added so far is multiplied by ``exp(before - after)``. So are the lanes' sums, to the maximum of the leaf,
before they are added. No number is subtracted from ``-inf`` but a finite one: entries, lanes and leaves of ``-inf`` add 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.hopper.formulas import exp, pairwise
from tbik_jax.kernels.hopper.norms import _sum_of_lanes

Array = jax.Array
CHUNK = 4
#: Chunks that a lane loads together, so that enough loads are on their way. Numerics-bearing where there is a maximum.
GROUP = 4
LOWEST = float(jnp.finfo(jnp.float32).min)


def leaf_sums(x: Array) -> Array:
    """The sum of ``x`` over the last dimension, ``[..., leaves, width]`` f32 -> ``[..., leaves]`` f32."""
    (total,) = _of_leaves(_leaf_sum, x, 1)
    return total


def leaf_exp_sums(x: Array) -> tuple[Array, Array]:
    """``(m, sum(exp(x - m)))`` over the last dimension, ``[..., leaves, width]`` f32 -> twice ``[..., leaves]`` f32.

    ``m`` is the maximum, exactly, or the lowest float where all is ``-inf``. NaN and ``+inf`` make the sum NaN.
    """
    m, total = _of_leaves(_leaf_exp_sum, x, 2)
    return m, total


def _of_leaves(program: Callable[..., None], x: Array, results: int) -> Any:
    """A block has a leaf of a row."""
    *leaves, width = x.shape
    out = (jax.ShapeDtypeStruct(tuple(leaves), jnp.float32),) * results
    if not x.size:
        return tuple(jnp.zeros(leaves, jnp.float32) for _ in out)
    return simt.launch(partial(program, width=width), math.prod(leaves), (x,), out, shared=1)


def _leaf_sum(m: Any, x: Any, out: Any, *, width: int) -> None:
    def add(i: Any, carry: list[Any]) -> list[Any]:
        (total,) = carry
        for chunk in _group(m, x, i, width, 0.0):
            total = total + pairwise(chunk)
        return [total]

    (total,) = m.loop(_groups(width), [m.zero()], add)
    (total,) = _sum_of_lanes(m, [total], simt.THREADS)
    m.store(out, m.wide(m.block), [total], m.thread == 0)


def _leaf_exp_sum(m: Any, x: Any, tops: Any, out: Any, *, width: int) -> None:
    def add(i: Any, carry: list[Any]) -> list[Any]:
        before, total = carry
        group = _group(m, x, i, width, -math.inf)
        top = m.maximum(before, pairwise([value for chunk in group for value in chunk], m.maximum))
        total = total * exp(m, before - top)
        for chunk in group:
            total = total + pairwise([exp(m, value - top) for value in chunk])
        return [top, total]

    mine, total = m.loop(_groups(width), [m.zero() + LOWEST, m.zero()], add)
    top = _largest_of_lanes(m, mine)
    (total,) = _sum_of_lanes(m, [total * exp(m, mine - top)], simt.THREADS, 1)
    m.store(tops, m.wide(m.block), [top], m.thread == 0)
    m.store(out, m.wide(m.block), [total], m.thread == 0)


def _groups(width: int) -> int:
    return -(-width // (CHUNK * simt.THREADS * GROUP))


def _group(m: Any, x: Any, i: Any, width: int, other: float) -> list[list[Any]]:
    """The chunks of a lane's group, with ``other`` behind the end of the leaf."""
    together = math.gcd(width, CHUNK)  # entries of an access
    base = m.wide(m.block) * width
    chunks = []
    for step in range(GROUP):
        column = ((i * GROUP + step) * simt.THREADS + m.thread) * CHUNK
        places = [column + offset for offset in range(0, CHUNK, together)]
        chunks.append([value for at in places for value in m.load(x, base + at, together, at < width, other)])
    return chunks


def _largest_of_lanes(m: Any, x: Any) -> Any:
    """On all lanes of the block."""
    distance = 1
    while distance < simt.WARP:
        x = m.maximum(x, m.of_lane(x, distance))
        distance *= 2
    return pairwise([y for (y,) in m.of_warps([x])], m.maximum)
