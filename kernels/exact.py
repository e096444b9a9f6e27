"""Floating-point steps whose bits no compiler decides.

XLA contracts ``a * b + c`` into one fused multiply-add where it sees fit (on the CPU it depends on the local shape, down
to the last element of a vector), and drops a rounding to bf16 between two fusions. Each helper here pins one such choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Array = jax.Array

_EXPONENT_AND_MANTISSA = {"bfloat16": (8, 7), "float16": (5, 10)}


def rounded(x: Array) -> Array:
    """``x`` as a value of its own: no add behind it contracts with the product that may have made it.

    The select keeps LLVM from contracting: it may not assume that a value is not NaN. ``lax.optimization_barrier`` and
    ``lax.reduce_precision`` do not do this on XLA:CPU. Nor does the select where LLVM knows better: an integer converted
    to float is no NaN, nor is its product with a constant.
    """
    return jnp.where(x == x, x, jnp.nan)


def product(a: Array, b: Array | float) -> Array:
    """``a * b``, rounded before anyone adds to it."""
    return rounded(a * b)


def quotient(a: Array, b: Array) -> Array:
    """``a * (1 / b)``, both steps rounded.

    XLA makes this of ``a / b`` where it sees that b is broadcast, under ``jit`` alone, and not for a single element.
    Written out, it is the same everywhere.
    """
    return product(a, 1.0 / b)


def cast(x: Array, dtype: DTypeLike) -> Array:
    """Round to ``dtype`` in any case.

    ``xla_allow_excess_precision`` (on by default) lets XLA delete an f32 -> bf16 -> f32 round trip. ``reduce_precision``
    is never deleted, and after it the round trip is exact, so deleting it changes nothing. It also makes zeros of what
    float16 would hold as subnormal (below 2**-14).
    """
    dtype = jnp.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtype.name in _EXPONENT_AND_MANTISSA:
        exponent, mantissa = _EXPONENT_AND_MANTISSA[dtype.name]
        x = lax.reduce_precision(x, exponent_bits=exponent, mantissa_bits=mantissa)
    return x.astype(dtype)


def tree_sum(x: Array, axis: int = -1, *, keepdims: bool = False) -> Array:
    """Sum over one axis by halving: element i of the lower half plus element i of the upper half, until one is left.

    An odd element in the middle is carried to the next round. Additions only, element by element, so the order is a
    function of the axis length alone (``jnp.sum`` on XLA:CPU also looks at the number of rows).
    """
    axis = axis % x.ndim
    while (n := x.shape[axis]) > 1:
        half = n // 2
        low = lax.slice_in_dim(x, 0, half, axis=axis)
        high = lax.slice_in_dim(x, n - half, n, axis=axis)
        total = low + high
        if n % 2:
            total = lax.concatenate([total, lax.slice_in_dim(x, half, half + 1, axis=axis)], axis)
        x = total
    return x if keepdims else lax.squeeze(x, (axis,))
