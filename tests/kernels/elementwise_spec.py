"""What the stages of family ``sm90`` compute, in NumPy, which rounds after every operation."""

from __future__ import annotations

import numpy as np

f32 = np.float32
EPS = 1e-5


def pairwise(x: np.ndarray) -> np.ndarray:
    """Over the last axis: neighbours, then neighbours of neighbours; an odd last one goes on."""
    while (n := x.shape[-1]) > 1:
        x = np.concatenate([x[..., : n - 1 : 2] + x[..., 1::2], x[..., n - n % 2 :]], axis=-1)
    return x[..., 0]


def row_sum(x: np.ndarray, lanes: int, chunk: int) -> np.ndarray:
    """``[..., D]``: chunks dealt out to lanes; pairwise in a chunk, a lane's chunks in order from +0, pairwise over lanes."""
    short = -x.shape[-1] % (lanes * chunk)
    x = np.concatenate([x, np.zeros((*x.shape[:-1], short), f32)], axis=-1).reshape(*x.shape[:-1], -1, lanes, chunk)
    chunks, total = pairwise(x), np.zeros((*x.shape[:-3], lanes), f32)
    for i in range(chunks.shape[-2]):
        total = total + chunks[..., i, :]
    return pairwise(total)


def lanes(d: int) -> int:
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n == 128 or 32 * n >= d)


def inverse_of(x: np.ndarray) -> np.ndarray:
    d = x.shape[-1]
    return f32(1) / np.sqrt(row_sum(x * x, lanes(d), 8) * f32(1 / d) + f32(EPS))[..., None]


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = x.astype(f32)
    return ((wide * inverse_of(wide)) * scale.astype(f32)).astype(x.dtype)


def norm_gradients(x: np.ndarray, scale: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    dtype, d = x.dtype, x.shape[-1]
    x, s, dy = x.astype(f32), scale.astype(f32), dy.astype(f32)
    inverse = inverse_of(x)
    along = row_sum((dy * s) * x, lanes(d), 8)[..., None] * inverse * f32(1 / d)
    dx = ((dy * s) - (x * inverse) * along) * inverse
    terms = dy * (x * inverse)
    terms = np.concatenate([terms, np.zeros((-len(terms) % 16, d), f32)]).reshape(-1, 16, d)
    blocks = np.zeros_like(terms[:, 0])
    for i in range(16):
        blocks = blocks + terms[:, i]
    return dx.astype(dtype), pairwise(blocks.T).astype(scale.dtype)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    x1, x2 = np.split(x.astype(f32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
