"""float32 operands as bfloat16 pieces, so that the 16-bit kernels multiply them.

    x = x0 + x1 + x2,  each piece the next 8 bits of the significand: exact for every finite x that is not subnormal
    x * w = sum of xi * wj;  all but x2 * w2, which is below 2**-30 of the product

The pieces lie side by side along k inside every leaf, small products first, so one leaf of f32 is one leaf, eight times
as long, of bfloat16: the same kernel, the same tree, and an error of about 2**-22 of the sum of magnitudes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

#: Which pieces meet, in the order of k.
_LEFT = (2, 1, 2, 0, 1, 1, 0, 0)
_RIGHT = (1, 2, 0, 2, 1, 0, 1, 0)


def left(x: Array, axis: int) -> Array:
    """``x`` f32 with k along ``axis`` -> bf16, k eight times as long."""
    return _pieces(x, axis, _LEFT)


def right(x: Array, axis: int) -> Array:
    """The partner of :func:`left`."""
    return _pieces(x, axis, _RIGHT)


def _pieces(x: Array, axis: int, order: tuple[int, ...]) -> Array:
    pieces = []
    for _ in range(3):
        # Cut, not rounded: nothing overflows, and no compiler has a rounding to drop.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
        pieces.append(high.astype(jnp.bfloat16))
        x = jnp.where(jnp.isfinite(x), x - high, 0.0)
    return jnp.concatenate([pieces[i] for i in order], axis=axis)
