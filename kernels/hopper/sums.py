"""Sums over the leaves of a vocabulary, as they are or of exponentials.

Chunk c of 4 entries belongs to lane c modulo 128. A lane adds a chunk pairwise, its chunks in order from +0; lanes are
added pairwise.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.hopper.formulas import exp, pairwise
from tbik_jax.kernels.hopper.norms import _sum_of_lanes

Array = jax.Array
CHUNK = 4
_UNROLL = 4


def leaf_sums(x: Array, top: Array | None = None) -> Array:
    """The sum of ``x``, or of ``exp(x - top)``, over the last dimension.

    Args:
        x: ``[..., leaves, width]`` f32.
        top: ``[...]`` f32.

    Returns:
        ``[..., leaves]`` f32.
    """
    *rows, leaves, width = x.shape
    if not x.size:
        return jnp.zeros((*rows, leaves), jnp.float32)
    program = partial(_leaf_sum, leaves=leaves, width=width)
    inputs = (x,) if top is None else (x, top)
    out = jax.ShapeDtypeStruct((*rows, leaves), jnp.float32)
    return simt.launch(program, math.prod(out.shape), inputs, out, shared=1)


def _leaf_sum(m: Any, x: Any, *refs: Any, leaves: int, width: int) -> None:
    out = refs[-1]
    exponential = len(refs) == 2
    together = math.gcd(width, CHUNK)  # entries of an access
    top = m.load(refs[0], m.wide(m.block // leaves), 1)[0] if exponential else None
    base = m.wide(m.block) * width

    def some(i: Any, carry: list[Any]) -> list[Any]:
        (total,) = carry
        chunks = []
        for step in range(_UNROLL):
            column = ((i * _UNROLL + step) * simt.THREADS + m.thread) * CHUNK
            chunks.append(
                [
                    value
                    for offset in range(0, CHUNK, together)
                    for value in m.load(
                        x,
                        base + column + offset,
                        together,
                        column + offset < width,
                        -math.inf if exponential else 0.0,
                    )
                ]
            )
        for chunk in chunks:
            total = total + pairwise([exp(m, value - top) for value in chunk] if exponential else chunk)
        return [total]

    steps = -(-width // (CHUNK * simt.THREADS * _UNROLL))
    (total,) = m.loop(steps, [m.zero()], some)
    (total,) = _sum_of_lanes(m, [total], simt.THREADS)
    m.store(out, m.wide(m.block), [total], m.thread == 0)
