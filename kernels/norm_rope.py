"""RMSNorm of queries and keys and their rotation, as Qwen3 has them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.rms_norm import rms_norm
from tbik_jax.kernels.rope import rope

Array = jax.Array


def norm_rope(
    q: Array, k: Array, q_scale: Array, k_scale: Array, cos: Array, sin: Array, *, eps: float
) -> tuple[Array, Array]:
    """``rope(rms_norm(x, scale), cos, sin)`` of queries and of keys, in one pass over memory where there is a kernel for it.

    Args:
        q, k: ``[..., heads, D]`` and ``[..., kv_heads, D]``, one dtype.
        q_scale, k_scale: ``[D]``.
        cos, sin: ``[..., D / 2]`` f32, as for :func:`tbik_jax.kernels.rope.rope`.
        eps: Of the norms.

    Returns:
        Both, in their shapes and dtype.

    Guarantee: the bits of :func:`tbik_jax.kernels.rms_norm.rms_norm` and :func:`tbik_jax.kernels.rope.rope` one after the
    other, forward and backward, rounded to the dtype of ``x`` between them. Raises what they raise.
    """
    if backend.family() == "cpu":
        return _apart(float(eps), q, k, q_scale, k_scale, cos, sin)
    return _norm_rope(float(eps), q, k, q_scale, k_scale, cos, sin)


def _apart(
    eps: float, q: Array, k: Array, q_scale: Array, k_scale: Array, cos: Array, sin: Array
) -> tuple[Array, Array]:
    return rope(rms_norm(q, q_scale, eps=eps), cos, sin), rope(rms_norm(k, k_scale, eps=eps), cos, sin)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_rope(
    eps: float, q: Array, k: Array, q_scale: Array, k_scale: Array, cos: Array, sin: Array
) -> tuple[Array, Array]:
    from tbik_jax.kernels.hopper import call, norms

    fits = q.shape[-1] in norms.ROTATED and q.dtype == k.dtype and q.shape[:-2] == k.shape[:-2]
    if not fits or q.shape[-1] != k.shape[-1]:
        return _apart(eps, q, k, q_scale, k_scale, cos, sin)

    def both(q: Array, k: Array, q_scale: Array, k_scale: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        q, k = norms.rms_norm_rope((q, k), (q_scale, k_scale), cos, sin, eps)
        return q, k

    return call("norm_rope", both, q, k, q_scale, k_scale, cos, sin)


_Saved = tuple[Array, Array, Array, Array, Array, Array]


def _forward(
    eps: float, q: Array, k: Array, q_scale: Array, k_scale: Array, cos: Array, sin: Array
) -> tuple[tuple[Array, Array], _Saved]:
    return _norm_rope(eps, q, k, q_scale, k_scale, cos, sin), (q, k, q_scale, k_scale, cos, sin)


def _backward(eps: float, saved: _Saved, given: tuple[Array, Array]) -> _Saved:
    q, k, q_scale, k_scale, cos, sin = saved
    dq, dq_scale = norm_rope_gradients(q, q_scale, given[0], cos, sin, eps=eps)
    dk, dk_scale = norm_rope_gradients(k, k_scale, given[1], cos, sin, eps=eps)
    return dq, dk, dq_scale, dk_scale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_norm_rope.defvjp(_forward, _backward)


def norm_rope_gradients(
    x: Array, scale: Array, dy: Array, cos: Array, sin: Array, *, eps: float
) -> tuple[Array, Array]:
    """``(dx, dscale)`` of ``y = rope(rms_norm(x, scale), cos, sin)``, ``x`` and ``dy`` ``[..., heads, D]``.

    Guarantee: the bits of the gradients of both stages, one after the other; ``dscale`` has the dtype of ``scale``.
    """
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, norms

        def turned_back(x: Array, scale: Array, dy: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
            return norms.rms_norm_gradients(x, scale, dy, eps, angles=(cos, sin))

        if x.shape[-1] in norms.ROTATED:
            dx, dscale = call("norm_rope", turned_back, x, scale, dy, cos, sin)
            return dx, dscale
    dx, dscale = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=eps), x, scale)[1](rope(dy, cos, -sin))
    return dx, dscale
