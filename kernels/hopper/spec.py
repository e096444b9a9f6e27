"""What the stages of family ``sm90`` compute, in NumPy, which rounds after every operation.

Sums of exponentials and SwiGLU have the orders and formulas of this package too, but their exp2 and reciprocal are the
hardware's instructions (`formulas`): `exp_sum` is told its exponential.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
f32 = np.float32


def pairwise(x: Array) -> Array:
    """Sum over the last axis: neighbours, then neighbours of neighbours; an odd last one goes on to the next level."""
    while (n := x.shape[-1]) > 1:
        x = np.concatenate([x[..., : n - 1 : 2] + x[..., 1::2], x[..., n - n % 2 :]], axis=-1)
    return x[..., 0]


def row_sum(x: Array, lanes: int, chunk: int) -> Array:
    """``[..., D]``: chunks dealt out to lanes; pairwise in a chunk, a lane's chunks in order from +0, pairwise over lanes."""
    short = -x.shape[-1] % (lanes * chunk)
    x = np.concatenate([x, np.zeros((*x.shape[:-1], short), f32)], axis=-1).reshape(*x.shape[:-1], -1, lanes, chunk)
    chunks, total = pairwise(x), np.zeros((*x.shape[:-3], lanes), f32)
    for i in range(chunks.shape[-2]):
        total = total + chunks[..., i, :]
    return pairwise(total)


def exp_sum(x: Array, exp: Callable[[Array], Array]) -> tuple[Array, Array]:
    """``[..., D]``: the maximum m, and the sum of ``exp(x - m)`` as 128 lanes add it, each in groups of 4 chunks of 4."""
    short = -x.shape[-1] % (4 * 128 * 4)
    x = np.concatenate([x, np.full((*x.shape[:-1], short), -np.inf, f32)], axis=-1)
    x = x.reshape(*x.shape[:-1], -1, 4, 128, 4)
    top, total = np.full((*x.shape[:-4], 128), np.finfo(f32).min), np.zeros((*x.shape[:-4], 128), f32)
    for i in range(x.shape[-4]):
        group = x[..., i, :, :, :]
        before, top = top, np.maximum(top, group.max((-3, -1)))
        total = total * exp(before - top)
        chunks = pairwise(exp(group - top[..., None, :, None]))
        for j in range(4):
            total = total + chunks[..., j, :]
    largest = top.max(-1)
    return largest, pairwise(total * exp(top - largest[..., None]))


def lanes(d: int) -> int:
    """Of a row of ``d`` elements: the smallest power of two with at most 32 elements a lane, and at most 128."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n == 128 or 32 * n >= d)


def norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm of rows."""
    wide = x.astype(f32)
    return ((wide * _inverse(wide, eps)) * scale.astype(f32)).astype(x.dtype)


def norm_gradients(x: Array, scale: Array, dy: Array, eps: float) -> tuple[Array, Array]:
    """Of ``x [tokens, D]`` and of ``scale``."""
    dtype, d = x.dtype, x.shape[-1]
    x, s, dy = x.astype(f32), scale.astype(f32), dy.astype(f32)
    inverse = _inverse(x, eps)
    along = row_sum((dy * s) * x, lanes(d), 8)[..., None] * inverse * f32(1 / d)
    dx = ((dy * s) - (x * inverse) * along) * inverse
    terms = dy * (x * inverse)
    terms = np.concatenate([terms, np.zeros((-len(terms) % 16, d), f32)]).reshape(-1, 16, d)
    blocks = np.zeros_like(terms[:, 0])
    for i in range(16):
        blocks = blocks + terms[:, i]
    return dx.astype(dtype), pairwise(blocks.T).astype(scale.dtype)


def _inverse(x: Array, eps: float) -> Array:
    d = x.shape[-1]
    return f32(1) / np.sqrt(row_sum(x * x, lanes(d), 8) * f32(1 / d) + f32(eps))[..., None]


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE of ``x [tokens, heads, D]`` by tables ``[tokens, D / 2]``."""
    x1, x2 = np.split(x.astype(f32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
