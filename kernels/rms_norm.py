"""Root-mean-square normalisation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tbik_jax.kernels.elementary import rsqrt
from tbik_jax.kernels.exact import cast, product, tree_sum

Array = jax.Array


def rms_norm(x: Array, scale: Array, *, eps: float) -> Array:
    """Normalise the last dimension.

        y = (x * rsqrt(mean(x^2) + eps)) * scale

    in f32, rounded once to the dtype of ``x``. ``x [..., D]``, ``scale [D]``.

    Guarantee: a row's bits depend on that row alone; the sum of squares is a fixed tree over D. In the backward pass the
    gradient of ``scale`` is a fixed tree over all rows at hand, so it depends on how rows are split over ranks.

    References: Zhang and Sennrich, arXiv 1910.07467.
    """
    return _rms_norm(float(eps), x, scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: Array, scale: Array) -> Array:
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
    normal, inverse = _normalise(eps, x)
    dy = dy.astype(jnp.float32)
    dnormal = product(dy, scale.astype(jnp.float32))
    along = product(tree_sum(product(dnormal, normal), keepdims=True), 1.0 / x.shape[-1])
    dx = product(dnormal - product(normal, along), inverse)
    dscale = tree_sum(product(dy, normal).reshape(-1, x.shape[-1]), axis=0)
    return cast(dx, x.dtype), cast(dscale, scale.dtype)


_rms_norm.defvjp(_forward, _backward)
