"""RMSNorm of queries and keys and their rotation, as Qwen3 has them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

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
    (dq, dk), (dq_scale, dk_scale) = _gradients(eps, None, (q, k), (q_scale, k_scale), given, cos, sin)
    return dq, dk, dq_scale, dk_scale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_norm_rope.defvjp(_forward, _backward)


def norm_rope_gradients_by_leaf(
    xs: Sequence[Array],
    scales: Sequence[Array],
    dys: Sequence[Array],
    cos: Array,
    sin: Array,
    *,
    eps: float,
    leaves: Sequence[int],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The backward pass of :func:`norm_rope` of any arrays, each in leaves: so many equal groups of consecutive heads.

    Args:
        xs, dys: ``[..., heads, D]`` each.
        scales: ``[D]`` each.
        cos, sin: ``[..., D / 2]`` f32.
        eps: Of the norms.
        leaves: Of each array.

    Returns:
        ``dx`` of every array, and f32 ``dscale [leaves, D]`` of every scale, not rounded to its dtype.

    Guarantee: the bits of a leaf are those of the gradients of :func:`norm_rope` of its heads alone, with the scale in f32.
    """
    return _gradients(eps, tuple(leaves), tuple(xs), tuple(scales), tuple(dys), cos, sin)


def _gradients(
    eps: float,
    leaves: tuple[int, ...] | None,
    xs: tuple[Array, ...],
    scales: tuple[Array, ...],
    dys: tuple[Array, ...],
    cos: Array,
    sin: Array,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, norms, norms_backward

        def turned_back(*arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            *of, cos, sin = arrays
            xs, scales, dys = (of[i : i + len(of) // 3] for i in range(0, len(of), len(of) // 3))
            return norms_backward.rms_norm_rope_gradients(xs, scales, dys, cos, sin, eps, leaves)

        shapes = {(*x.shape[:-2], x.shape[-1]) for x in xs}
        if len(shapes) == 1 and xs[0].shape[-1] in norms.ROTATED:
            dxs, dscales = call("norm_rope", turned_back, *xs, *scales, *dys, cos, sin)
            return dxs, dscales

    def one(scale: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        x, dy = both
        dx, dscale = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=eps), x, scale)[1](rope(dy, cos, -sin))
        return dx, dscale

    if leaves is None:
        found = [one(scale, (x, dy)) for x, scale, dy in zip(xs, scales, dys, strict=True)]
    else:
        found = []
        for count, x, scale, dy in zip(leaves, xs, scales, dys, strict=True):
            grouped = (*x.shape[:-2], count, -1, x.shape[-1])
            by_leaf = tuple(jnp.moveaxis(of.reshape(grouped), -3, 0) for of in (x, dy))
            dx, dscale = lax.map(partial(one, scale.astype(jnp.float32)), by_leaf)
            found.append((jnp.moveaxis(dx, 0, -3).reshape(x.shape), dscale))
    return tuple(dx for dx, _ in found), tuple(dscale for _, dscale in found)
