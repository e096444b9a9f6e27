"""Causal grouped-query attention whose sums are cut in fixed blocks of keys, counted from position 0.

`unfused` is family ``cpu``; `hopper` is ``sm90``.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tbik_jax._axes import vary_like
from tbik_jax._problems import Problems
from tbik_jax.kernels import backend, exact
from tbik_jax.kernels.attention import unfused, unfused_backward
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.matmul import cpu

__all__ = ["attention", "paged_attention"]

Array = jax.Array


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

    Both sums over j run inside blocks of ``kv_block`` keys and over the blocks in order, as ``docs/contract.md`` writes out
    for each family. Blocks behind a query's position add exact zeros, so neither the length of the cache nor what it holds
    there can be seen, as long as it is finite.

    Args:
        q: ``[B, T, heads, D]``, f32, bf16 or f16.
        k, v: ``[B, kv_heads, S, D]``, the cache; entries behind a query's position may hold anything finite.
        positions: ``[B, T]`` integers in 0..S-1, in any order.
        scale: Factor of the scores, usually ``1 / sqrt(D)``.
        kv_block: Keys per block. Numerics-bearing (:class:`tbik_jax.Contract`). A multiple of 64; on Hopper GPUs 128.
        kv_head_of: ``[heads]`` integers, the KV head of every query head; by default consecutive groups of equal size.

    Returns:
        ``[B, T, heads, D]`` in the dtype of ``q``, rounded once.

    Guarantee: the bits of a (query, head) depend on that query, its head's keys and values up to its position, ``scale``
    and ``kv_block``: prefill, chunked prefill and decode agree; so do any batch, any heads beside it, any cache length.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: On the CPU: D or kv_block above 256; their product, D rounded up to 64, above
            32768. On Hopper GPUs: another kv_block than 128; D other than 64 and 128, in f32 above 256; scale <= 0; f32 caches
            above 32768 positions.

    The running maximum and sum are Milakov and Gimelshein's (arXiv:1805.02867), tiles on a GPU FlashAttention's
    (arXiv:2205.14135), the cut of a long context Flash-Decoding's.
    """
    with Problems("attention") as problems:
        family = backend.family()
        fits = problems.check(q.ndim == 4, f"q has shape {q.shape}, not [B, T, heads, D]")
        fits &= problems.check(k.ndim == 4, f"k has shape {k.shape}, not [B, kv_heads, S, D]")
        problems.check(k.shape == v.shape, f"k and v differ in shape: {k.shape} and {v.shape}")
        _check_dtypes(problems, q=q, k=k, v=v)
        if fits:
            problems.check(q.shape[0] == k.shape[0], f"q has batch {q.shape[0]}, k has {k.shape[0]}")
            _check_queries(problems, q, k, positions, kv_head_of)
        _check_limits(problems, family, q, k, v, scale, kv_block)
    _self_test(family)
    return _attention(_Options(family, float(scale), kv_block), q, k, v, positions, kv_head_of, None)


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    *,
    positions: Array,
    scale: float,
    kv_block: int,
    kv_head_of: Array | None = None,
) -> Array:
    """:func:`attention` over a cache in pages that sequences share or take in any order.

    Keys of positions ``i * page_size ...`` of sequence b are page ``page_table[b, i]``. A layer of a stacked cache
    ``[layers, B, kv_heads, S, D]`` is a page too, and read where it lies: reshape to ``[layers * B, kv_heads, S, D]``, with
    ``page_table[b] = [layer * B + b]``.

    Args:
        q: ``[B, T, heads, D]``.
        k_pages, v_pages: ``[pages, kv_heads, page_size, D]``; ``page_size`` is a multiple of 8 that divides 128, or a multiple
            of 128.
        page_table: ``[B, most_pages]`` integers in 0..pages-1. Entries behind a query's position may name any page that is
            finite.
        positions, scale, kv_block, kv_head_of: As for :func:`attention`.

    Returns:
        ``[B, T, heads, D]``.

    Guarantee: the bits are those of :func:`attention` over the same keys and values side by side. Pages are
    performance-only.

    Raises:
        ValueError, NotImplementedError: as :func:`attention`; ValueError for another ``page_size``.

    Pages are those of PagedAttention (arXiv:2309.06180).
    """
    with Problems("paged_attention") as problems:
        family = backend.family()
        fits = problems.check(q.ndim == 4, f"q has shape {q.shape}, not [B, T, heads, D]")
        problems.check(
            k_pages.shape == v_pages.shape, f"k_pages and v_pages differ in shape: {k_pages.shape} and {v_pages.shape}"
        )
        if problems.check(k_pages.ndim == 4, f"k_pages has shape {k_pages.shape}, not [pages, kv_heads, page_size, D]"):
            size = k_pages.shape[2]
            problems.check(
                size > 0 and size % 8 == 0 and (128 % size == 0 or size % 128 == 0),
                f"page_size = {size}; use 8, 16, 32, 64 or a multiple of 128",
            )
            if fits:
                _check_queries(problems, q, k_pages, positions, kv_head_of)
        problems.check(
            page_table.ndim == 2 and page_table.shape[:1] == q.shape[:1],
            f"page_table has shape {page_table.shape}, not [{q.shape[0]}, most_pages]",
        )
        problems.check(jnp.issubdtype(page_table.dtype, jnp.integer), f"page_table is {page_table.dtype}; use integers")
        _check_dtypes(problems, q=q, k_pages=k_pages, v_pages=v_pages)
        _check_limits(problems, family, q, k_pages, v_pages, scale, kv_block)
    _self_test(family)
    options = _Options(family, float(scale), kv_block)
    return _attention(options, q, k_pages, v_pages, positions, kv_head_of, page_table)


class _Options(NamedTuple):
    family: backend.Family
    scale: float
    kv_block: int


def _check_dtypes(problems: Problems, **arrays: Array) -> None:
    for name, x in arrays.items():
        problems.check(
            x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16), f"{name} is {x.dtype}; use f32, bf16 or f16"
        )


def _check_queries(problems: Problems, q: Array, k: Array, positions: Array, kv_head_of: Array | None) -> None:
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


def _check_limits(
    problems: Problems, family: backend.Family, q: Array, k: Array, v: Array, scale: float, kv_block: int
) -> None:
    """What a family cannot do."""
    problems.check(kv_block > 0 and kv_block % 64 == 0, f"kv_block = {kv_block} is not a positive multiple of 64")
    dim = q.shape[-1]
    if family == "sm90":
        from tbik_jax.kernels.attention import hopper

        hopper.check(problems, q, k, v, scale, kv_block)
        return
    if dim > cpu.K_STEP:
        problems.unsupported(f"head_dim {dim} is above {cpu.K_STEP}, the longest chain of the CPU's products")
    if kv_block > cpu.K_STEP or kv_block * -(-dim // 64) * 64 > cpu.PANEL_ELEMENTS:
        problems.unsupported(
            f"kv_block = {kv_block} with head_dim {dim}: the CPU's products are chains up to {cpu.K_STEP} "
            f"keys, and {cpu.PANEL_ELEMENTS} keys times dimensions; a smaller kv_block fits (and has other bits)"
        )


def _self_test(family: backend.Family) -> None:
    exact.self_test()
    if family == "cpu":
        cpu.self_test()


def side_by_side(pages: Array, page_table: Array) -> Array:
    """``[pages, kv_heads, page_size, D]`` in the order of ``page_table [B, n]``: ``[B, kv_heads, n * page_size, D]``."""
    batch, count = page_table.shape
    _, heads, size, dim = pages.shape
    found = jnp.take(pages, page_table, axis=0)  # [B, n, kv_heads, page_size, D]
    return found.swapaxes(1, 2).reshape(batch, heads, count * size, dim)


def _run(
    options: _Options,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv_head_of: Array | None,
    page_table: Array | None,
) -> Array:
    given = [x for x in (q, k, v, positions, kv_head_of, page_table) if x is not None]
    products = unfused.CPU
    if options.family == "sm90":
        from tbik_jax.kernels.attention import hopper

        if hopper.is_fused(q, k, v):
            # Kernels say nothing of the mesh that their results vary over.
            return vary_like(hopper.attention(options.scale, q, k, v, positions, kv_head_of, page_table), *given)
        products = hopper.PRODUCTS
    if page_table is not None:
        k, v = side_by_side(k, page_table), side_by_side(v, page_table)
    if kv_head_of is not None:
        k, v = jnp.take(k, kv_head_of, axis=1), jnp.take(v, kv_head_of, axis=1)
    return vary_like(unfused.attention(products, options.scale, options.kv_block, q, k, v, positions), *given)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: _Options,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv_head_of: Array | None,
    page_table: Array | None,
) -> Array:
    return one_by_one(partial(_run, options))(q, k, v, positions, kv_head_of, page_table)


def _forward(options: _Options, *arrays: Array) -> tuple[Array, tuple[Array | None, ...]]:
    q, k, v, positions, kv_head_of, page_table = arrays
    with Problems("attention, to be differentiated") as problems:
        if page_table is not None:
            problems.unsupported("a paged cache has no gradient; give k and v side by side")
        if options.family == "sm90":
            from tbik_jax.kernels.attention import hopper

            if not hopper.is_fused(q, k, v):
                problems.unsupported(f"gradients in {q.dtype}: Hopper kernels have them in bfloat16 and float16")
            if kv_head_of is not None:
                problems.unsupported(
                    "gradients with kv_head_of: Hopper kernels have them where query heads come in equal groups; use a mesh "
                    "that divides the KV heads"
                )
    if options.family == "cpu":
        return _attention(options, *arrays), (q, k, v, positions, kv_head_of)
    y, lse = one_by_one(partial(hopper.attention_with_lse, options.scale))(q, k, v, positions)
    y = vary_like(y, q, k, v, positions)
    return y, (q, k, v, positions, y, lse)


def _backward(options: _Options, saved: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    if options.family == "cpu":
        q, k, v, positions, kv_head_of = saved
        gradients = unfused_backward.attention_backward(
            dy,
            q,
            k,
            v,
            positions=positions,
            scale=options.scale,
            kv_block=options.kv_block,
            kv_head_of=kv_head_of,
        )
    else:
        from tbik_jax.kernels.attention.hopper.backward import attention_backward

        q, k, v, positions, y, lse = saved
        run = partial(attention_backward, scale=options.scale)
        run_one = one_by_one(lambda dy, q, k, v, y, lse, offset: run(dy, q, k, v, y, lse, offset=offset))
        gradients = run_one(dy.astype(q.dtype), q, k, v, y, lse, positions[:, 0])
    dq, dk, dv = (vary_like(g, q, k, v, dy) for g in gradients)
    return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
