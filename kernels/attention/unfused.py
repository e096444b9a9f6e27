"""Attention as two products with a softmax between them: all of family ``cpu``, and float32 on Hopper GPUs.

    s[j] = (q . k[j]) * scale               for j <= position, else -inf
    p[j] = exp(s[j] - max(s))
    y    = (sum_j p[j] v[j]) / (sum_j p[j])

Both sums over j run inside blocks of ``kv_block`` keys (the weights' as a fixed tree), and over the blocks left-deep. The
products are the family's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax.kernels.elementary import exp
from tbik_jax.kernels.exact import cast, product, quotient, tree_sum

Array = jax.Array

#: Scores of one piece of the queries take at most this many bytes; longer prompts go piece by piece. Performance-only.
_SCORE_BYTES = 64 << 20


@dataclass(frozen=True)
class Products:
    """The two products of a family, f32.

    Attributes:
        scores: ``[B, KV, rows, D], [B, KV, S, D] -> [B, KV, rows, S]``.
        values: ``[B, KV, rows, blocks, kv_block], [B, KV, blocks, kv_block, D] -> [B, KV, rows, D]``, the sum over a block's
            keys first, then left-deep over blocks.
    """

    scores: Callable[[Array, Array], Array]
    values: Callable[[Array, Array], Array]


def _cpu_scores(q: Array, k: Array) -> Array:
    rows = q.shape[2]
    q = pad(q, 2, max(2, rows))  # one row alone takes a matrix-vector path with another order
    dimensions = (((3,), (3,)), ((0, 1), (0, 1)))
    return lax.dot_general(q, k, dimensions, preferred_element_type=jnp.float32)[:, :, :rows]


def _cpu_values(weights: Array, v: Array) -> Array:
    values = lax.dot_general(
        weights.transpose(0, 1, 3, 2, 4),
        v,
        (((4,), (3,)), ((0, 1, 2), (0, 1, 2))),
        preferred_element_type=jnp.float32,
    )
    return left_deep(values, axis=2)


#: Chains of fused multiply-adds (:mod:`tbik_jax.kernels.matmul.cpu`).
CPU = Products(_cpu_scores, _cpu_values)


def attention(products: Products, scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array) -> Array:
    """``q [B, T, heads, D]``, ``k, v [B, KV, S, D]``, ``positions [B, T]`` -> ``[B, T, heads, D]``, in the dtype of ``q``."""
    batch, queries, heads, dim = q.shape
    kv_heads, size = k.shape[1], -(-k.shape[2] // kv_block) * kv_block
    # Whole blocks of keys; values with a multiple of 64 columns, as the chain wants them.
    k = pad(k.astype(jnp.float32), 2, size)
    v = pad(pad(v.astype(jnp.float32), 2, size), 3, -(-dim // 64) * 64)
    v = v.reshape(batch, kv_heads, -1, kv_block, v.shape[-1])
    # Behind a barrier: XLA evaluates a dot of constants itself while it compiles, in another order.
    grouped = lax.optimization_barrier(q.astype(jnp.float32)).reshape(batch, queries, kv_heads, heads // kv_heads, dim)

    def piece(queries_and_positions: tuple[Array, Array]) -> Array:
        q, at = queries_and_positions
        return _some_queries(products, scale, kv_block, q, k, v, at)[..., :dim]

    fits = max(1, _SCORE_BYTES // (4 * batch * heads * size))
    if queries <= fits:
        y = piece((grouped, positions))
    else:
        count = -(-queries // fits)
        pieces = [pad(a, 1, count * fits).reshape(batch, count, fits, *a.shape[2:]) for a in (grouped, positions)]
        y = lax.map(piece, tuple(jnp.moveaxis(a, 1, 0) for a in pieces))
        y = jnp.moveaxis(y, 0, 1).reshape(batch, count * fits, *y.shape[3:])[:, :queries]
    return cast(y.reshape(batch, queries, heads, dim), q.dtype)


def pad(x: Array, axis: int, size: int) -> Array:
    """Zeros behind, up to ``size`` elements along ``axis``."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _some_queries(
    products: Products, scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array
) -> Array:
    """``q [B, T, KV, G, D]``, ``k [B, KV, S, D]``, ``v [B, KV, blocks, kv_block, D']`` -> ``[B, T, KV, G, D']``."""
    batch, queries, kv_heads, group, dim = q.shape
    rows = queries * group
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows, dim)
    scores = products.scores(q, k)
    scores = product(scores, scale)
    last = jnp.repeat(positions, group, axis=1)[:, None, :, None]
    visible = jnp.arange(k.shape[2]) <= last
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights.reshape(batch, kv_heads, rows, -1, kv_block)
    total = left_deep(tree_sum(weights), axis=3)
    y = quotient(products.values(weights, v), total[..., None])
    y = jnp.where(y == 0, 0.0, y)  # a block of zeros more or less may have turned -0 into +0
    return y.reshape(batch, kv_heads, queries, group, -1).transpose(0, 2, 1, 3, 4)


def left_deep(x: Array, axis: int) -> Array:
    """The sum along ``axis`` in order."""
    total = lax.index_in_dim(x, 0, axis, keepdims=False)
    if (count := x.shape[axis]) <= 16:
        for i in range(1, count):
            total = total + lax.index_in_dim(x, i, axis, keepdims=False)
        return total
    return lax.fori_loop(1, count, lambda i, t: t + lax.dynamic_index_in_dim(x, i, axis, keepdims=False), total)
