"""Root-mean-square normalisation, alone or behind the residual sum."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tbik_jax.kernels import backend
from tbik_jax.kernels.elementary import rsqrt
from tbik_jax.kernels.exact import cast, product, tree_sum
from tbik_jax.kernels.residual import add

Array = jax.Array


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """Normalise the last dimension.

        y = (x * rsqrt(mean(x^2) + eps)) * scale

    in f32, rounded once to the dtype of ``x``. ``x [..., D]``, ``scale [D]``.

    Guarantee: a row's bits depend on that row alone; the sum of squares is a fixed tree over D. In the backward pass the
    gradient of ``scale`` is a fixed tree over all rows at hand, so it depends on how rows are split over ranks.

    Raises:
        NotImplementedError: on a GPU, rows of more than 16384 elements or of another dtype than f32, bf16, f16.

    References: Zhang and Sennrich, arXiv 1910.07467.
    """
    return _rms_norm(float(eps), x, scale)


def add_rms_norm(x: Array, y: Array, scale: Array, *, eps: float) -> tuple[Array, Array]:
    """The residual sum and its norm, in one pass over memory where there is a kernel for it.

        total = x + y   (rounded to the dtype of x)
        normal = rms_norm(total, scale)

    ``x``, ``y`` ``[..., D]``, ``scale [D]``; returns ``(total, normal)``.

    Guarantee: the bits of :func:`tbik_jax.kernels.residual.add` and of :func:`rms_norm` behind it, forward; backward those
    of both gradients, each rounded to the dtype of ``x`` and then added. Raises what :func:`rms_norm` raises.
    """
    if backend.family() == "cpu":
        total = add(x, y)
        return total, rms_norm(total, scale, eps=eps)
    return _add_rms_norm(float(eps), x, y, scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: Array, scale: Array) -> Array:
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, norms

        return call("rms_norm", lambda x, scale: norms.rms_norm(x, scale, eps)[1], x, scale)
    normal, _ = _normalise(eps, x)
    return cast(product(normal, scale.astype(jnp.float32)), x.dtype)


def _normalise(eps: float, x: Array) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    mean = product(tree_sum(product(x, x), keepdims=True), 1.0 / x.shape[-1])
    inverse = rsqrt(mean + eps)
    return product(x, inverse), inverse


def _forward(eps: float, x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rms_norm(eps, x, scale), (x, scale)


def _backward(eps: float, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, scale = saved
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, norms_backward

        return call("rms_norm", lambda x, scale, dy: norms_backward.rms_norm_gradients(x, scale, dy, eps), x, scale, dy)
    normal, inverse = _normalise(eps, x)
    dy = dy.astype(jnp.float32)
    dnormal = product(dy, scale.astype(jnp.float32))
    along = product(tree_sum(product(dnormal, normal), keepdims=True), 1.0 / x.shape[-1])
    dx = product(dnormal - product(normal, along), inverse)
    dscale = tree_sum(product(dy, normal).reshape(-1, x.shape[-1]), axis=0)
    return cast(dx, x.dtype), cast(dscale, scale.dtype)


_rms_norm.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_rms_norm(eps: float, x: Array, y: Array, scale: Array) -> tuple[Array, Array]:
    from tbik_jax.kernels.hopper import call, norms

    return call("add_rms_norm", lambda x, y, scale: norms.rms_norm(x, scale, eps, y), x, y, scale)


def _add_forward(
    eps: float, x: Array, y: Array, scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    total, normal = _add_rms_norm(eps, x, y, scale)
    return (total, normal), (total, scale, jnp.zeros((), y.dtype))


def _add_backward(
    eps: float, saved: tuple[Array, Array, Array], given: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    from tbik_jax.kernels.hopper import call, norms_backward

    total, scale, like_y = saved
    beside, dy = given

    def gradients(total: Array, scale: Array, dy: Array, beside: Array) -> tuple[Array, Array]:
        return norms_backward.rms_norm_gradients(total, scale, dy, eps, beside)

    dx, dscale = call("add_rms_norm", gradients, total, scale, dy, beside)
    return dx, cast(dx, like_y.dtype), dscale


_add_rms_norm.defvjp(_add_forward, _add_backward)
