"""Sums of rows that belong together, without atomics: every sum is a balanced tree over its rows, in their order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def tree_segment_sum(x: Array, segment_ids: Array, num_segments: int) -> Array:
    """``y[s] = sum of x[i] over all i with segment_ids[i] == s``, f32.

        n rows of a segment, in ascending order of i:      x0 x1 x2 x3 x4 ...
        step 1, 2, 4, ... while it is less than n:         x[j] += x[j + step]   for every j divisible by 2 * step
        y[s] = x0, where a zero is +0

    Args:
        x: ``[T, D]``, f32.
        segment_ids: ``[T]`` integers; a row whose number is not in ``[0, num_segments)`` belongs to no segment.
        num_segments: S.

    Returns:
        ``[S, D]``, zeros where a segment has no rows.

    Guarantee: a segment's bits are a function of its own rows in their order: not of what stands between or behind them, or of
    the other segments. XLA is left no choice: rows are moved by integers, every addition stands alone inside its step, and no
    two updates meet, as those of a scatter-add may on a GPU, in the order of the moment.
    """
    x, segment_ids = jnp.asarray(x), jnp.asarray(segment_ids)
    if not x.shape[0]:
        return jnp.zeros((num_segments, x.shape[1]), x.dtype)
    order = jnp.argsort(segment_ids, stable=True)
    ids, x = segment_ids[order], x[order]
    at = jnp.arange(x.shape[0])
    place = at - jnp.searchsorted(ids, ids)  # of a row inside its segment

    def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        step, x = carry
        other = jnp.minimum(at + step, x.shape[0] - 1)
        adds = ((place & (2 * step - 1)) == 0) & (at + step < x.shape[0]) & (ids[other] == ids)
        return 2 * step, jnp.where(adds[:, None], x + x[other], x)

    longest = jnp.max(jnp.where((ids >= 0) & (ids < num_segments), place, 0))
    step = jnp.ones_like(longest)  # varies over a mesh as the rows do
    _, x = lax.while_loop(lambda carry: carry[0] <= longest, halve, (step, x))
    segments = jnp.arange(num_segments)
    first = jnp.minimum(jnp.searchsorted(ids, segments), x.shape[0] - 1)
    y = jnp.where((ids[first] == segments)[:, None], x[first], 0.0)
    return jnp.where(y == 0, 0.0, y)
