"""Causal grouped-query attention whose sums are cut in fixed blocks of keys, counted from position 0."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.elementary import exp
from tbik_jax.kernels.exact import cast, product, quotient, self_test, tree_sum
from tbik_jax.kernels.matmul import cpu

Array = jax.Array

#: Scores of one piece of the queries take at most this many bytes; longer prompts go piece by piece. Performance-only.
_SCORE_BYTES = 64 << 20


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    scale: float,
    kv_block: int,
    kv_head_of: Array | None = None,
) -> Array:
    """Attention of queries at ``positions`` over a cache that holds the keys of positions 0, 1, 2, ...

        s[j] = (q . k[j]) * scale               for j <= position, else -inf
        p[j] = exp(s[j] - max(s))
        y    = (sum_j p[j] v[j]) / (sum_j p[j])

    Dot products are ascending fma chains. Both sums over j run inside blocks of ``kv_block`` keys (a chain for the values,
    a fixed tree for the weights), and over the blocks left-deep. Blocks behind a query's position add exact zeros, so
    neither the length of the cache nor what it holds there can be seen, as long as it is finite.

    Args:
        q: ``[B, T, heads, D]``, f32, bf16 or f16; D at most 256.
        k, v: ``[B, kv_heads, S, D]``, the cache; entries behind a query's position may hold anything finite.
        positions: ``[B, T]`` integers in 0..S-1.
        scale: Factor of the scores, usually ``1 / sqrt(D)``.
        kv_block: Keys per block, a multiple of 64. Numerics-bearing (:class:`tbik_jax.Contract`).
        kv_head_of: ``[heads]``, the KV head of every query head; by default consecutive groups of equal size.

    Returns:
        ``[B, T, heads, D]`` in the dtype of ``q``, rounded once.

    Guarantee: the bits of a (query, head) depend on that query, its head's keys and values up to its position, ``scale``
    and ``kv_block``: prefill, chunked prefill and decode agree; so do any batch, any heads beside it, any cache length.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: D or kv_block above 256; their product, D rounded up to 64, above 32768; differentiation.
    """
    _check(q, k, v, positions, kv_block, kv_head_of)
    backend.require_cpu("attention")
    self_test()
    cpu.self_test()
    if kv_head_of is not None:
        k, v = jnp.take(k, kv_head_of, axis=1), jnp.take(v, kv_head_of, axis=1)
    return _attention(float(scale), kv_block, q, k, v, positions)


def _check(q: Array, k: Array, v: Array, positions: Array, kv_block: int, kv_head_of: Array | None) -> None:
    with Problems("attention") as problems:
        fits = problems.check(q.ndim == 4, f"q has shape {q.shape}, not [B, T, heads, D]")
        fits &= problems.check(k.ndim == 4, f"k has shape {k.shape}, not [B, kv_heads, S, D]")
        problems.check(k.shape == v.shape, f"k and v differ in shape: {k.shape} and {v.shape}")
        problems.check(kv_block > 0 and kv_block % 64 == 0, f"kv_block = {kv_block} is not a positive multiple of 64")
        for name, x in (("q", q), ("k", k), ("v", v)):
            problems.check(
                x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16), f"{name} is {x.dtype}; use f32, bf16 or f16"
            )
        if fits:
            problems.check(q.shape[0] == k.shape[0], f"q has batch {q.shape[0]}, k has {k.shape[0]}")
            problems.check(q.shape[3] == k.shape[3], f"q has head_dim {q.shape[3]}, k has {k.shape[3]}")
            problems.check(positions.shape == q.shape[:2], f"positions have shape {positions.shape}, not {q.shape[:2]}")
            if kv_head_of is None:
                problems.check(
                    q.shape[2] % k.shape[1] == 0,
                    f"{q.shape[2]} query heads are not a multiple of {k.shape[1]} KV heads; pass kv_head_of",
                )
            else:
                problems.check(
                    kv_head_of.shape == (q.shape[2],), f"kv_head_of has shape {kv_head_of.shape}, not {(q.shape[2],)}"
                )
            if q.shape[3] > cpu.K_STEP:
                problems.unsupported(
                    f"head_dim {q.shape[3]} is above {cpu.K_STEP}, the longest chain of the CPU's products"
                )
            if kv_block > cpu.K_STEP or kv_block * -(-q.shape[3] // 64) * 64 > cpu.PANEL_ELEMENTS:
                problems.unsupported(
                    f"kv_block = {kv_block} with head_dim {q.shape[3]}: the CPU's products are chains up to {cpu.K_STEP} "
                    f"keys, and {cpu.PANEL_ELEMENTS} keys times dimensions; a smaller kv_block fits (and has other bits)"
                )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array) -> Array:
    return one_by_one(partial(_all_queries, scale, kv_block))(q, k, v, positions)


def _all_queries(scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array) -> Array:
    batch, queries, heads, dim = q.shape
    kv_heads, size = k.shape[1], -(-k.shape[2] // kv_block) * kv_block
    # Whole blocks of keys; values with a multiple of 64 columns, as the chain wants them.
    k = _pad(k.astype(jnp.float32), 2, size)
    v = _pad(_pad(v.astype(jnp.float32), 2, size), 3, -(-dim // 64) * 64)
    v = v.reshape(batch, kv_heads, -1, kv_block, v.shape[-1])
    # Behind a barrier: XLA evaluates a dot of constants itself while it compiles, in another order.
    grouped = lax.optimization_barrier(q.astype(jnp.float32)).reshape(batch, queries, kv_heads, heads // kv_heads, dim)

    def piece(queries_and_positions: tuple[Array, Array]) -> Array:
        q, at = queries_and_positions
        return _some_queries(scale, kv_block, q, k, v, at)[..., :dim]

    fits = max(1, _SCORE_BYTES // (4 * batch * heads * size))
    if queries <= fits:
        y = piece((grouped, positions))
    else:
        count = -(-queries // fits)
        pieces = [_pad(a, 1, count * fits).reshape(batch, count, fits, *a.shape[2:]) for a in (grouped, positions)]
        y = lax.map(piece, tuple(jnp.moveaxis(a, 1, 0) for a in pieces))
        y = jnp.moveaxis(y, 0, 1).reshape(batch, count * fits, *y.shape[3:])[:, :queries]
    return cast(y.reshape(batch, queries, heads, dim), q.dtype)


def _pad(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def _some_queries(scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array) -> Array:
    """``q [B, T, KV, G, D]``, ``k [B, KV, S, D]``, ``v [B, KV, blocks, kv_block, D']`` -> ``[B, T, KV, G, D']``."""
    batch, queries, kv_heads, group, dim = q.shape
    rows = queries * group
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows, dim)
    scores = lax.dot_general(
        _pad(q, 2, max(2, rows)),  # one row alone takes a matrix-vector path with another order
        k,
        (((3,), (3,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )[:, :, :rows]
    scores = product(scores, scale)
    last = jnp.repeat(positions, group, axis=1)[:, None, :, None]
    visible = jnp.arange(k.shape[2]) <= last
    scores = jnp.where(visible, scores, -jnp.inf)
    weights = exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights.reshape(batch, kv_heads, rows, -1, kv_block)
    total = _left_deep(tree_sum(weights), axis=3)
    values = lax.dot_general(
        weights.transpose(0, 1, 3, 2, 4),
        v,
        (((4,), (3,)), ((0, 1, 2), (0, 1, 2))),
        preferred_element_type=jnp.float32,
    )
    y = quotient(_left_deep(values, axis=2), total[..., None])
    y = jnp.where(y == 0, 0.0, y)  # a block of zeros more or less may have turned -0 into +0
    return y.reshape(batch, kv_heads, queries, group, -1).transpose(0, 2, 1, 3, 4)


def _left_deep(x: Array, axis: int) -> Array:
    total = lax.index_in_dim(x, 0, axis, keepdims=False)
    if (count := x.shape[axis]) <= 16:
        for i in range(1, count):
            total = total + lax.index_in_dim(x, i, axis, keepdims=False)
        return total
    return lax.fori_loop(1, count, lambda i, t: t + lax.dynamic_index_in_dim(x, i, axis, keepdims=False), total)


def _forward(scale: float, kv_block: int, q: Array, k: Array, v: Array, positions: Array) -> tuple[Array, None]:
    return _attention(scale, kv_block, q, k, v, positions), None


def _backward(scale: float, kv_block: int, saved: None, dy: Array) -> tuple[Array, ...]:
    raise NotImplementedError(
        "attention: the backward pass has no invariant implementation yet; differentiate other ops only"
    )


_attention.defvjp(_forward, _backward)
