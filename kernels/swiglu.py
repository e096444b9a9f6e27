"""The gated activation of Llama's feed-forward layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.elementary import exp
from tbik_jax.kernels.exact import cast, product, quotient

Array = jax.Array


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up`` with ``silu(g) = g / (1 + exp(-g))``, in f32, rounded once to the dtype of ``gate``.

    Guarantee: elementwise. References: Shazeer, arXiv 2002.05202.
    """
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, maps

        return call("swiglu", maps.swiglu, gate, up)
    g = gate.astype(jnp.float32)
    return cast(product(_silu(g), up.astype(jnp.float32)), gate.dtype)


def _silu(g: Array) -> Array:
    return quotient(g, 1.0 + exp(-g))


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gate, up = saved
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, maps

        return call("swiglu", maps.swiglu_gradients, gate, up, dy)
    g, u, dy = gate.astype(jnp.float32), up.astype(jnp.float32), dy.astype(jnp.float32)
    sigmoid = quotient(jnp.ones_like(g), 1.0 + exp(-g))
    silu = _silu(g)
    slope = sigmoid + product(silu, 1.0 - sigmoid)
    return cast(product(product(dy, u), slope), gate.dtype), cast(product(dy, silu), up.dtype)


swiglu.defvjp(_forward, _backward)
