"""Writing the keys and values of new tokens where :mod:`tbik_jax.kernels.attention` reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax._axes import varying_axes
from tbik_jax._problems import Problems
from tbik_jax.kernels import backend

Array = jax.Array


def write_kv(
    k_cache: Array, v_cache: Array, k: Array, v: Array, *, positions: Array, page_table: Array | None = None
) -> tuple[Array, Array]:
    """The caches of :func:`tbik_jax.dense.attention` with new tokens in them.

        k_cache[b, h, positions[b, t]] = k[b, t, h], and v_cache alike

    With ``page_table``, those of :func:`tbik_jax.dense.paged_attention`: position ``p`` of sequence ``b`` is row
    ``p % page_size`` of page ``page_table[b, p // page_size]``.

    Args:
        k_cache, v_cache: ``[B, kv_heads, S, D]``; in pages ``[pages, kv_heads, page_size, D]``. f32, bf16 or f16.
        k, v: ``[B, T, kv_heads, D]``, the new tokens, in the dtype of the caches.
        positions: ``[B, T]`` integers, in any order, no place twice. A token whose position is outside of 0..S-1, for
            instance -1, is not written.
        page_table: ``[B, most_pages]`` integers. A token whose page is outside of 0..pages-1 is not written.

    Returns:
        Both caches. On a Hopper GPU one kernel writes both, in the caches' own memory if the program donates them or does not
        use them again; a copy of them is made otherwise. XLA's operations do with JAX 0.10, and where types name the mesh axes
        that the caches vary over, which no kernel takes: ``jax.shard_map(..., check_vma=False)`` names none.

    Guarantee: bits are copied. Not differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: another dtype.
    """
    with Problems("write_kv") as problems:
        family = backend.family()
        for name, pair in (("k_cache and v_cache", (k_cache, v_cache)), ("k and v", (k, v))):
            problems.check(pair[0].shape == pair[1].shape, f"{name} differ in shape: {pair[0].shape}, {pair[1].shape}")
        dtypes = {name: x.dtype.name for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v))}
        problems.check(len(set(dtypes.values())) == 1, f"dtypes differ: {dtypes}; cast k and v to that of the caches")
        if k_cache.dtype.name not in ("float32", "bfloat16", "float16"):
            problems.unsupported(f"caches of {k_cache.dtype}; use float32, bfloat16 or float16")
        fits = problems.check(k.ndim == 4, f"k has shape {k.shape}, not [B, T, kv_heads, D]")
        fits &= problems.check(k_cache.ndim == 4, f"k_cache has shape {k_cache.shape}, not [B, kv_heads, S, D]")
        if fits:
            of_cache, of_new = (k_cache.shape[1], k_cache.shape[3]), k.shape[2:]
            problems.check(of_cache == of_new, f"the caches have (kv_heads, D) = {of_cache}, k and v {of_new}")
            problems.check(positions.shape == k.shape[:2], f"positions have shape {positions.shape}, not {k.shape[:2]}")
            if page_table is None:
                problems.check(
                    k_cache.shape[0] == k.shape[0], f"the caches have batch {k_cache.shape[0]}, k and v {k.shape[0]}"
                )
            else:
                problems.check(
                    page_table.ndim == 2 and page_table.shape[0] == k.shape[0],
                    f"page_table has shape {page_table.shape}, not [{k.shape[0]}, most_pages]",
                )
        for name, x in (("positions", positions), ("page_table", page_table)):
            if x is not None:
                problems.check(jnp.issubdtype(x.dtype, jnp.integer), f"{name}: {x.dtype}; use integers")
    typed = any(map(varying_axes, (k_cache, v_cache, k, v, positions)))
    if family == "sm90" and not typed:
        from tbik_jax.kernels.hopper import call, compat, kv_cache

        if compat.CHANGES_ARRAYS:
            integers = (positions,) if page_table is None else (positions, page_table)
            found: tuple[Array, Array] = call("write_kv", kv_cache.write_kv, k_cache, v_cache, k, v, integers=integers)
            return found
    places, rows = _places(k_cache.shape, jnp.asarray(positions), page_table)
    return _written(k_cache, k, places, rows), _written(v_cache, v, places, rows)


def _written(cache: Array, new: Array, places: Array, rows: Array) -> Array:
    """As words: XLA may change the bits of a NaN where it copies 16-bit floats on CPUs."""
    cast, word = jax.lax.bitcast_convert_type, jnp.dtype(f"uint{8 * cache.dtype.itemsize}")
    return cast(cast(cache, word).at[places, :, rows].set(cast(new, word), mode="drop"), cache.dtype)


def _places(of_cache: tuple[int, ...], positions: Array, page_table: Array | None) -> tuple[Array, Array]:
    """First index of every token, and its row there. What is not to be written lies behind the end, where JAX drops it; a
    negative index would count from there."""
    count, _, size, _ = of_cache
    batch = jnp.arange(positions.shape[0])[:, None]
    if page_table is None:
        return jnp.broadcast_to(batch, positions.shape), jnp.where(positions < 0, size, positions)
    inside = (positions >= 0) & (positions < size * page_table.shape[1])
    at = jnp.where(inside, positions, 0)
    pages = jnp.asarray(page_table)[batch, at // size]
    return jnp.where(inside & (pages >= 0), pages, count), at % size
