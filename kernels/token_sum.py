"""The sum over the tokens of a loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax.kernels.exact import cast, rounded, tree_sum

Array = jax.Array


@jax.custom_vjp
def token_sum(x: Array) -> Array:
    """``sum(x)`` over all elements, an f32 scalar.

        out = (x[0] + x[n/2]) + ...   by halving, see :func:`tbik_jax.kernels.exact.tree_sum`

    Guarantee: the order is a function of the number of elements. (``jnp.sum`` also looks at what XLA fuses with it.) The
    gradient of every element is that of the sum.
    """
    if not x.size:
        return jnp.zeros((), jnp.float32)
    return tree_sum(rounded(x.astype(jnp.float32)).reshape(-1))


def _forward(x: Array) -> tuple[Array, Array]:
    return token_sum(x), x


def _backward(x: Array, d: Array) -> tuple[Array]:
    return (jnp.broadcast_to(cast(d, x.dtype), x.shape),)


token_sum.defvjp(_forward, _backward)
