"""Stages without sums: SwiGLU, the residual sum, rotations. A thread has up to 16 bytes of an array at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax.kernels.hopper import formulas, simt

Array = jax.Array
_CHUNK = 8  # elements: 16 bytes of bf16
_UNROLL = 2  # chunks of a thread, so that more loads are on their way
_HEADS = 4  # heads that a thread rotates by the same angles


def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up``; see :func:`tbik_jax.kernels.swiglu.swiglu`."""
    (y,) = _each(formulas.swiglu, (gate, up), (gate,))
    return y


def swiglu_gradients(gate: Array, up: Array, dy: Array) -> tuple[Array, Array]:
    """With respect to ``gate`` and ``up``."""
    dgate, dup = _each(formulas.swiglu_gradients, (gate, up, dy), (gate, up))
    return dgate, dup


def add(x: Array, y: Array) -> Array:
    """``x + y`` in f32, rounded once to the dtype of ``x``."""
    (total,) = _each(formulas.add, (x, y), (x,))
    return total


def _each(f: Callable[..., Any], inputs: tuple[Array, ...], like: tuple[Array, ...]) -> tuple[Array, ...]:
    """``f`` element by element; results have the shapes and dtypes of ``like``."""
    size = inputs[0].size
    out = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like)
    if not size:
        return tuple(jnp.zeros(x.shape, x.dtype) for x in like)
    chunk = math.gcd(size, _CHUNK)
    program = partial(_map, f=f, size=size, chunk=chunk, inputs=len(inputs))
    blocks = -(-size // (simt.THREADS * chunk * _UNROLL))
    return tuple(simt.launch(program, blocks, inputs, out))


def _map(m: Any, *refs: Any, f: Callable[..., Any], size: int, chunk: int, inputs: int) -> None:
    first = m.wide(m.block) * (simt.THREADS * chunk * _UNROLL) + m.thread * chunk
    places = [first + i * simt.THREADS * chunk for i in range(_UNROLL)]
    inside = [place < size for place in places]
    if size % (simt.THREADS * chunk * _UNROLL) == 0:
        inside = [True] * _UNROLL
    loaded = [
        [m.load(ref, place, chunk, where) for ref in refs[:inputs]] for place, where in zip(places, inside, strict=True)
    ]
    for place, where, arguments in zip(places, inside, loaded, strict=True):
        results = zip(*(f(m, *elements) for elements in zip(*arguments, strict=True)), strict=True)
        for ref, values in zip(refs[inputs:], results, strict=True):
            m.store(ref, place, values, where)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """``x [..., heads, D]`` rotated by tables ``[..., D / 2]``; see :func:`tbik_jax.kernels.rope.rope`."""
    *leading, heads, dim = x.shape
    cos, sin = (jnp.broadcast_to(table, (*leading, dim // 2)) for table in (cos, sin))
    tokens, half = math.prod(leading), dim // 2
    if not x.size:
        return x
    chunk = math.gcd(half, _CHUNK)
    groups = -(-heads // _HEADS)
    program = partial(_rope, tokens=tokens, heads=heads, half=half, chunk=chunk, groups=groups)
    blocks = -(-tokens * groups * (half // chunk) // simt.THREADS)
    return simt.launch(program, blocks, (x, cos, sin), jax.ShapeDtypeStruct(x.shape, x.dtype))


def _rope(
    m: Any, x: Any, cos: Any, sin: Any, y: Any, *, tokens: int, heads: int, half: int, chunk: int, groups: int
) -> None:
    """A thread has a chunk of either half, of every ``groups``-th head of a token."""
    chunks = half // chunk
    item = m.block * simt.THREADS + m.thread
    column = (item % chunks) * chunk
    group = (item // chunks) % groups
    token = item // (chunks * groups)
    inside = token < tokens
    place = m.wide(token) * half + column
    angles = list(zip(m.load(cos, place, chunk, inside), m.load(sin, place, chunk, inside), strict=True))
    base = m.wide(token) * (heads * 2 * half) + group * (2 * half) + column
    here = [
        (base + i * groups * 2 * half, inside if (i + 1) * groups <= heads else inside & (group < heads - i * groups))
        for i in range(-(-heads // groups))
    ]
    loaded = [(m.load(x, at, chunk, where), m.load(x, at + half, chunk, where)) for at, where in here]
    for (at, where), (x1, x2) in zip(here, loaded, strict=True):
        turned = [formulas.rotate(a, b, c, s) for a, b, (c, s) in zip(x1, x2, angles, strict=True)]
        m.store(y, at, [a for a, _ in turned], where)
        m.store(y, at + half, [b for _, b in turned], where)
