"""exp, log and rsqrt from additions, rounded products and exact scalings alone.

XLA:CPU lowers ``exp`` to a polynomial whose multiply-adds LLVM fuses or not, depending on the loop around it: the same
row gave other bits with 31 rows beside it than with 32 (jax 0.10.2 and 0.12). Here every product is rounded before it is
added to, so the bits are a function of the argument.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax.kernels.exact import product, quotient, rounded

Array = jax.Array

_LOG2_E = 1.44269504088896341
# ln 2 in two parts (Cody and Waite 1980); the first has nine bits, so that n times it is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# The second part in 16 bits, exact times an exponent: LLVM knows a converted integer to be no NaN and sees through `product`.
_LN2_LOW_SHORT = -56961 * 2.0**-28
# Minimax polynomials of Cephes (S. Moshier): exp on [-ln2/2, ln2/2], log on [sqrt(1/2) - 1, sqrt(2) - 1].
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LARGEST, _SMALLEST = 88.72283, -87.33654


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = product(total, x) + jnp.float32(c)
    return total


def exp(x: Array) -> Array:
    """``e**x`` for f32; 0 where the result would be subnormal, inf above 88.72. Within 2 units in the last place.

    Guarantee: elementwise, independent of shape, position and the operations around it.
    """
    inside = jnp.clip(x, _SMALLEST, _LARGEST)
    n = lax.round(product(inside, jnp.float32(_LOG2_E)), lax.RoundingMethod.TO_NEAREST_EVEN)
    r = (inside - n * jnp.float32(_LN2_HIGH)) - product(n, jnp.float32(_LN2_LOW))
    y = product(_horner(r, _EXP), product(r, r)) + r + 1.0
    # 2**n in two factors: n = 128 has no float of its own.
    half = n.astype(jnp.int32) >> 1
    y = y * _power_of_two(half) * _power_of_two(n.astype(jnp.int32) - half)
    y = jnp.where(x < _SMALLEST, 0.0, y)
    return jnp.where(x > _LARGEST, jnp.inf, y)


def _power_of_two(n: Array) -> Array:
    return lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


def log(x: Array) -> Array:
    """Natural logarithm for normal positive f32; -inf at 0, NaN below. Within 2 units in the last place.

    Guarantee: elementwise, independent of shape, position and the operations around it.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - 126
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F000000, jnp.float32)  # in [0.5, 1)
    low = mantissa < 0.70710678
    exponent = jnp.where(low, exponent - 1, exponent).astype(jnp.float32)
    f = jnp.where(low, mantissa + mantissa, mantissa) - 1.0
    square = product(f, f)
    y = product(product(_horner(f, _LOG), f), square)
    y = (y + exponent * jnp.float32(_LN2_LOW_SHORT)) - 0.5 * square
    y = (f + y) + exponent * jnp.float32(_LN2_HIGH)
    y = jnp.where(x == jnp.inf, jnp.inf, jnp.where(x == 0, -jnp.inf, y))
    return jnp.where((x < 0) | (x != x), jnp.nan, y)


def rsqrt(x: Array) -> Array:
    """``1 / sqrt(x)``, both steps correctly rounded; ``lax.rsqrt`` may start from a table.

    XLA would make ``lax.rsqrt`` of the quotient if it saw the root. For CPUs: XLA:GPU approximates both, and LLVM there sees
    through :func:`rounded`; `tbik_jax.kernels.hopper` has instructions of its own.
    """
    return quotient(jnp.ones_like(x), rounded(jnp.sqrt(x)))
