"""What a product's bits are, in plain NumPy: the specification that every CPU form must equal.

    leaf(x, w)[m, n] = ((chunk_0 + chunk_1) + chunk_2) + ...
    chunk_c[m, n]    = fma(x[m, k], w[n, k], ...) over k in ascending order, from +0

The leaf's K is cut in the fewest equal chunks of at most ``k_step``; the last is completed by zeros.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def k_chunks(k: int, k_step: int) -> tuple[int, int]:
    """``(count, size)`` of the chunks of a leaf: count = ceil(k / k_step), size = ceil(k / count)."""
    count = max(1, -(-k // k_step))
    return count, -(-k // count)


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Float32:
    """``a * b + c`` in float32 with one rounding, for finite values.

    The product is exact in float64. The sum is not, so it is rounded to odd there (Boldo and Melquiond 2008): the last
    bit then remembers that something was cut, and the final rounding to float32 is the only one that shows.
    """
    p = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    p, c = np.broadcast_arrays(p, np.asarray(c, np.float64))
    total = p + c
    back = total - p
    error = (p - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & even, np.nextafter(total, toward), total)
    return odd.astype(np.float32)


def chain(x: npt.ArrayLike, w: npt.ArrayLike) -> Float32:
    """``x [M, K]`` times ``w [N, K]`` transposed, as one ascending fma chain per element. Returns ``[M, N]``."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    acc = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        acc = fma(x[:, k, None], w[None, :, k], acc)
    return acc


def leaf_product(x: npt.ArrayLike, w: npt.ArrayLike, k_step: int) -> Float32:
    """One leaf: chunks of the contraction as chains, added left-deep. ``x [M, K]``, ``w [N, K]`` -> ``[M, N]``."""
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    count, size = k_chunks(x.shape[1], k_step)
    pad = [(0, 0), (0, count * size - x.shape[1])]
    x, w = np.pad(x, pad), np.pad(w, pad)
    total = chain(x[:, :size], w[:, :size])
    for start in range(size, count * size, size):
        total = total + chain(x[:, start : start + size], w[:, start : start + size])
    return total
