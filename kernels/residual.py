"""The residual sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.exact import cast

Array = jax.Array


def add(x: Array, y: Array) -> Array:
    """``x + y`` in f32, rounded once to the dtype of ``x``. Same shapes.

    Guarantee: elementwise; correctly rounded, so the bits are those of every backend.
    """
    if backend.family() == "cpu":
        return cast(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)
    if x.shape != y.shape:
        raise ValueError(f"residual.add: x has shape {x.shape} and y {y.shape}; they must be the same")
    return _add(x, y)


@jax.custom_vjp
def _add(x: Array, y: Array) -> Array:
    from tbik_jax.kernels.hopper import call, maps

    return call("residual.add", maps.add, x, y)


def _forward(x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return _add(x, y), (jnp.zeros((), x.dtype), jnp.zeros((), y.dtype))


def _backward(like: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    return cast(d, like[0].dtype), cast(d, like[1].dtype)


_add.defvjp(_forward, _backward)
