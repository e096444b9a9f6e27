"""Rotary position embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.exact import cast, product

Array = jax.Array


@jax.custom_vjp
def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the halves of the last dimension against each other.

        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin

    with ``x = [x1, x2] [..., heads, D]`` and ``cos``, ``sin`` f32 ``[..., D / 2]`` per position (broadcast over heads). Every
    product and every sum is rounded to f32, the result once to the dtype of ``x``. The tables carry any scaling of the
    frequencies; they get no gradient.

    Guarantee: elementwise. References: Su et al., arXiv 2104.09864; pairs (i, i + D / 2) as in Llama's published weights.
    """
    return _rotate(x, cos, sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, maps

        return call("rope", maps.rope, x, cos, sin)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    y1 = product(x1, cos) - product(x2, sin)
    y2 = product(x2, cos) + product(x1, sin)
    return cast(jnp.concatenate([y1, y2], axis=-1), x.dtype)


def _forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rotate(x, cos, sin), (cos, sin)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array, Array]:
    cos, sin = saved
    return _rotate(dy, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


rope.defvjp(_forward, _backward)
