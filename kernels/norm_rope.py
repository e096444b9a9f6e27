"""RMSNorm of queries or keys and their rotation, as Qwen3 has them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.rms_norm import rms_norm
from tbik_jax.kernels.rope import rope

Array = jax.Array


def norm_rope(x: Array, scale: Array, cos: Array, sin: Array, *, eps: float) -> Array:
    """``rope(rms_norm(x, scale), cos, sin)`` of ``x [..., heads, D]``, in one pass over memory where there is a kernel for it.

    Guarantee: the bits of :func:`tbik_jax.kernels.rms_norm.rms_norm` and :func:`tbik_jax.kernels.rope.rope` one after the
    other, forward and backward, rounded to the dtype of ``x`` between them. Raises what they raise.
    """
    if backend.family() == "cpu":
        return rope(rms_norm(x, scale, eps=eps), cos, sin)
    return _norm_rope(float(eps), x, scale, cos, sin)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rope(eps: float, x: Array, scale: Array, cos: Array, sin: Array) -> Array:
    from tbik_jax.kernels.hopper import call, norms

    if x.shape[-1] not in norms.ROTATED:
        return rope(rms_norm(x, scale, eps=eps), cos, sin)
    return call("norm_rope", partial(norms.rms_norm_rope, eps=eps), x, scale, cos, sin)


def _forward(
    eps: float, x: Array, scale: Array, cos: Array, sin: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return _norm_rope(eps, x, scale, cos, sin), (x, scale, cos, sin)


def _backward(eps: float, saved: tuple[Array, Array, Array, Array], dy: Array) -> tuple[Array, Array, Array, Array]:
    x, scale, cos, sin = saved
    _, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=eps), x, scale)
    dx, dscale = pull(rope(dy, cos, -sin))
    return dx, dscale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_norm_rope.defvjp(_forward, _backward)
