"""Gradients of causal grouped-query attention on the CPU: every sum in an order that positions alone decide."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax._axes import vary_like
from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.attention.unfused import left_deep, pad
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.elementary import exp
from tbik_jax.kernels.exact import cast, product, quotient, self_test, tree_sum
from tbik_jax.kernels.matmul import cpu

Array = jax.Array

#: Scores of the (sequence, KV head) pairs that are worked on together take at most this many bytes. Performance-only.
_SCORE_BYTES = 32 << 20


def attention_backward(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    scale: float,
    kv_block: int,
    kv_head_of: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients of :func:`tbik_jax.kernels.attention.attention` by ``q``, ``k`` and ``v``, in their dtypes.

    :func:`attention_backward_by_head`, and behind it the sum over the query heads of each KV head, left-deep in the order of
    the heads. Where a mesh cuts a group of query heads, the ranks need the gradients by head, and this very sum over all.

    Args:
        dy: ``[B, T, heads, D]``, the gradient by the result.
        q, k, v, positions, scale, kv_block, kv_head_of: As given to ``attention``.

    Returns:
        ``dq [B, T, heads, D]``, ``dk`` and ``dv [B, kv_heads, S, D]``, each rounded once. With ``kv_head_of`` a KV head that
        no query head reads has zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: as ``attention``.
    """
    dq, dk, dv = attention_backward_by_head(
        dy, q, k, v, positions=positions, scale=scale, kv_block=kv_block, kv_head_of=kv_head_of
    )
    dk, dv = (cast(sum_of_heads(x, of.shape[1], kv_head_of), of.dtype) for x, of in ((dk, k), (dv, v)))
    return dq, dk, dv


def attention_backward_by_head(
    dy: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    scale: float,
    kv_block: int,
    kv_head_of: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``dq [B, T, heads, D]`` in the dtype of ``q``, and f32 ``dk, dv [B, heads, S, D]`` of every query head apart.

        p[i, j]  = exp(s[i, j] - max s[i]) * (1 / sum_j exp(s[i, j] - max s[i]))       s as in `attention`
        dp[i, j] = dy[i] . v[j]
        ds[i, j] = p[i, j] * (dp[i, j] - sum_j p[i, j] dp[i, j])
        dq[i]    = scale * sum_j ds[i, j] k[j]
        dk[j]    = scale * sum_i ds[i, j] q[i]
        dv[j]    = sum_i p[i, j] dy[i]

    Dot products over D are ascending fma chains. Sums over keys j run in blocks of ``kv_block`` keys, sums over queries i in
    blocks of ``kv_block`` positions, both counted from position 0: a chain inside a block (for numbers, a halving sum),
    left-deep over the blocks. Each product by ``scale`` is rounded, a zero is +0.

    Guarantee: with consecutive positions in every sequence, the bits of a sequence and head are a function of that
    sequence's and head's arguments: not of the batch, the heads beside it, the length of the cache, or queries behind whose
    ``dy`` is zero. Other positions have right gradients, whose sums over i run by index, from the first position's place in
    its block.

    Tiling, recomputation and the row sum that replaces the softmax's Jacobian: FlashAttention-2, arXiv 2307.08691; the row
    sum is taken over keys here, not as ``dy . y``, so ``y`` and its rounding stay out of it.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: as ``attention``.
    """
    with Problems("attention_backward") as problems:
        problems.check(dy.shape == q.shape, f"dy has shape {dy.shape}, q has {q.shape}")
        problems.check(jnp.issubdtype(dy.dtype, jnp.floating), f"dy is {dy.dtype}, not a float")
    backend.require_cpu("attention_backward")
    self_test()
    cpu.self_test()
    if kv_head_of is not None:
        k, v = jnp.take(k, kv_head_of, axis=1), jnp.take(v, kv_head_of, axis=1)
    return one_by_one(partial(_all_heads, float(scale), kv_block))(dy, q, k, v, positions)


def sum_of_heads(x: Array, kv_heads: int, kv_head_of: Array | None = None) -> Array:
    """``x [B, heads, S, D]`` by query head, f32 -> ``[B, kv_heads, S, D]``: left-deep over the heads of a group, in order."""
    batch, heads, *rest = x.shape
    if kv_head_of is None:
        return left_deep(x.reshape(batch, kv_heads, heads // kv_heads, *rest), axis=2)

    def add(head: Array, total: Array) -> Array:
        of = kv_head_of[head]
        value = lax.dynamic_index_in_dim(total, of, 1) + lax.dynamic_index_in_dim(x, head, 1)
        return lax.dynamic_update_index_in_dim(total, value, of, 1)

    zeros = vary_like(jnp.zeros((batch, kv_heads, *rest), x.dtype), x, kv_head_of)
    return lax.fori_loop(0, heads, add, zeros)


def _all_heads(
    scale: float, kv_block: int, dy: Array, q: Array, k: Array, v: Array, positions: Array
) -> tuple[Array, Array, Array]:
    batch, queries, heads, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    pairs, group = batch * kv_heads, heads // kv_heads

    def by_pair(x: Array) -> Array:
        # Behind a barrier: XLA evaluates a dot of constants itself while it compiles, in another order.
        x = lax.optimization_barrier(x.astype(jnp.float32)).reshape(batch, queries, kv_heads, group, dim)
        return x.transpose(0, 2, 3, 1, 4).reshape(pairs, group, queries, dim)

    size = -(-length // kv_block) * kv_block
    k, v = (lax.optimization_barrier(pad(x.astype(jnp.float32), 2, size)).reshape(pairs, size, dim) for x in (k, v))
    arguments = by_pair(dy), by_pair(q), k, v, jnp.repeat(positions.astype(jnp.int32), kv_heads, axis=0)
    fits = max(1, _SCORE_BYTES // (4 * group * kv_block * size))
    together = max(n for n in range(1, pairs + 1) if pairs % n == 0 and n <= fits)
    pieces = [x.reshape(-1, together, *x.shape[1:]) for x in arguments]
    some = partial(_some_pairs, scale, kv_block)
    if together == pairs:
        dq, dk, dv = some(*arguments)
    else:
        dq, dk, dv = lax.map(lambda piece: some(*piece), tuple(pieces))
    dq = dq.reshape(batch, kv_heads, group, queries, dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    dk, dv = (x.reshape(batch, heads, size, dim)[:, :, :length] for x in (dk, dv))
    return cast(dq, q.dtype), dk, dv


def _some_pairs(
    scale: float, kv_block: int, dy: Array, q: Array, k: Array, v: Array, positions: Array
) -> tuple[Array, Array, Array]:
    """``dy, q [P, G, T, D]``, ``k, v [P, S, D]``, ``positions [P, T]``, for P pairs of a sequence and a KV head."""
    pairs, group, queries, dim = q.shape
    size, wide = k.shape[1], -(-dim // 64) * 64  # columns in multiples of 64, as the chain wants them
    rows = group * kv_block

    # Queries take the places of their positions in whole blocks; a place without a query sees no key.
    before = positions[:, :1] % kv_block
    places = -(-(queries + kv_block - 1) // kv_block) * kv_block
    index = jnp.arange(places) - before
    taken = (index >= 0) & (index < queries)
    index = jnp.clip(index, 0, queries - 1)
    positions = jnp.where(taken, jnp.take_along_axis(positions, index, axis=1), -1)
    dy, q = (
        jnp.where(taken[:, None, :, None], jnp.take_along_axis(x, index[:, None, :, None], axis=2), 0.0)
        for x in (dy, q)
    )
    keys = pad(k, 2, wide).reshape(pairs, -1, kv_block, wide)

    def over_dim(x: Array, y: Array) -> Array:
        return lax.dot_general(x, y, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)

    def over_block(x: Array, y: Array) -> Array:
        return lax.dot_general(x, y, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)

    def by_key_block(x: Array) -> Array:
        return x.reshape(pairs, rows, -1, kv_block)

    def over_keys(x: Array) -> Array:
        return left_deep(tree_sum(by_key_block(x)), axis=2)[..., None]

    def by_key(x: Array) -> Array:
        # Behind a barrier: XLA folds a transpose into the dot, which then takes a path with another order.
        return lax.optimization_barrier(x.reshape(pairs, group, kv_block, size).swapaxes(2, 3))

    def block(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq, dk, dv = sums
        q_block, dy_block = (lax.dynamic_slice_in_dim(x, number * kv_block, kv_block, axis=2) for x in (q, dy))
        last = jnp.tile(lax.dynamic_slice_in_dim(positions, number * kv_block, kv_block, axis=1), (1, group))
        visible = jnp.arange(size) <= last[..., None]
        scores = product(over_dim(q_block.reshape(pairs, rows, dim), k), scale)
        scores = jnp.where(visible, scores, -jnp.inf)
        weights = jnp.where(visible, exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
        p = jnp.where(visible, quotient(weights, over_keys(weights)), 0.0)
        dp = jnp.where(visible, over_dim(dy_block.reshape(pairs, rows, dim), v), 0.0)
        ds = product(p, dp - over_keys(product(p, dp)))
        dq_block = left_deep(over_block(by_key_block(ds).swapaxes(1, 2), keys), axis=1)
        dq_block = dq_block.reshape(pairs, group, kv_block, wide)
        dq = lax.dynamic_update_slice_in_dim(dq, dq_block, number * kv_block, axis=2)
        dk = dk + over_block(by_key(ds), pad(q_block, 3, wide))
        dv = dv + over_block(by_key(p), pad(dy_block, 3, wide))
        return dq, dk, dv

    used = (jnp.max(before) + queries + kv_block - 1) // kv_block
    zeros = (jnp.zeros((pairs, group, n, wide), jnp.float32) for n in (places, size))
    by_query, of_keys = (vary_like(x, dy, q, k, v, positions) for x in zeros)
    dq, dk, dv = lax.fori_loop(0, used, block, (by_query, of_keys, of_keys))
    dq = jnp.take_along_axis(dq, (jnp.arange(queries) + before)[:, None, :, None], axis=2)
    dq, dk, dv = (jnp.where(x == 0, 0.0, x)[..., :dim] for x in (product(dq, scale), product(dk, scale), dv))
    return dq, dk, dv
