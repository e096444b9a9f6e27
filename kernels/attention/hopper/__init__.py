"""Attention on Hopper GPUs (compute capability 9.0), with Pallas' Mosaic GPU kernels.

`formula` is the arithmetic, the same in every kernel; `prefill` and `decode` are the kernels, for many queries and for few,
with the same bits; `cache` says where keys and values lie. float32 goes by `unfused`, with this family's products.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.attention import unfused
from tbik_jax.kernels.attention.hopper import decode, formula, prefill
from tbik_jax.kernels.attention.hopper.cache import Cache
from tbik_jax.kernels.attention.hopper.decode import DecodeTiles
from tbik_jax.kernels.attention.hopper.prefill import PrefillTiles
from tbik_jax.kernels.matmul import hopper as matmul
from tbik_jax.tree import MAX_LEAVES, Tree

__all__ = ["PRODUCTS", "DecodeTiles", "PrefillTiles", "attention", "check", "is_fused"]

Array = jax.Array

HEAD_DIMS = (64, 128)


def is_fused(q: Array, k: Array, v: Array) -> bool:
    """Whether the kernels of this package serve; float32, and operands of different dtypes, go by `unfused`."""
    return q.dtype != jnp.float32 and q.dtype == k.dtype == v.dtype


def check(problems: Problems, q: Array, k: Array, v: Array, scale: float, kv_block: int) -> None:
    """What this family cannot do."""
    if kv_block != formula.BLOCK:
        problems.unsupported(
            f"kv_block = {kv_block}: Hopper kernels cut keys in blocks of {formula.BLOCK}; use Contract(kv_block="
            f"{formula.BLOCK}), the default (other blocks have other bits)"
        )
    dim = q.shape[-1]
    if is_fused(q, k, v):
        if dim not in HEAD_DIMS:
            problems.unsupported(
                f"head_dim {dim} in {q.dtype}: Hopper kernels take {' and '.join(map(str, HEAD_DIMS))}; float32 takes any "
                f"up to 256"
            )
        if scale <= 0:
            problems.unsupported(f"scale = {scale}: Hopper kernels take scales above 0")
    elif dim > 256:
        problems.unsupported(f"head_dim {dim} is above 256")


def attention(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv_head_of: Array | None = None,
    page_table: Array | None = None,
    *,
    tiles: PrefillTiles | DecodeTiles | None = None,
) -> Array:
    """See :func:`tbik_jax.kernels.attention.attention`; ``tiles`` chooses the kernel and its performance-only settings."""
    k, v, cache = _stored(k, v, page_table)
    group = 1 if kv_head_of is not None else q.shape[2] // k.shape[1]
    options = {"c": formula.base2(scale), "cache": cache, "multiprocessors": backend.multiprocessors()}
    if tiles is None:
        tiles = DecodeTiles() if q.shape[1] * group <= decode.MOST_ROWS else prefill_tiles(cache)
    if isinstance(tiles, DecodeTiles):
        return decode.attention(q, k, v, positions, kv_head_of, page_table, tiles=tiles, **options)
    return prefill.attention(q, k, v, positions, kv_head_of, page_table, tiles=tiles, with_lse=False, **options)[0]


def attention_with_lse(
    scale: float, q: Array, k: Array, v: Array, positions: Array, kv_head_of: Array | None = None
) -> tuple[Array, Array]:
    """The results, and ``log2 sum_j 2^(c s_j)`` per row ``[B, heads, T]`` f32, ``c = scale * log2(e)``: for a backward pass."""
    k, v, cache = _stored(k, v, None)
    y, lse = prefill.attention(
        q,
        k,
        v,
        positions,
        kv_head_of,
        None,
        c=formula.base2(scale),
        cache=cache,
        tiles=prefill_tiles(cache),
        multiprocessors=backend.multiprocessors(),
        with_lse=True,
    )
    assert lse is not None
    return y, lse


def prefill_tiles(cache: Cache) -> PrefillTiles:
    """Performance-only."""
    # The warpgroup that loads holds the numbers of all pages of a block.
    return PrefillTiles(registers=(232, 40) if cache.copies > 8 else (240, 24))


def _stored(k: Array, v: Array, page_table: Array | None) -> tuple[Array, Array, Cache]:
    if page_table is not None:
        page = k.shape[2]
        return k, v, Cache(page_table.shape[1] * page, page)
    size = k.shape[2]
    if size > 8 and size % 8:  # TMA wants whole tiles of 8 rows; a cache of whole blocks is never copied
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -size % 8), (0, 0))) for x in (k, v))
    return k, v, Cache(size)


# float32 --------------------------------------------------------------------------------------------------------------


def _scores(q: Array, k: Array) -> Array:
    batch, heads, rows, dim = q.shape
    q, k = (x.reshape(batch * heads, -1, dim) for x in (q, k))
    s = matmul.product("bmk,bnk->bmn", q, k, (Tree(1).root,))
    return s.reshape(batch, heads, rows, -1)


def _values(weights: Array, v: Array) -> Array:
    batch, heads, rows, blocks, size = weights.shape
    if blocks > MAX_LEAVES:
        raise NotImplementedError(
            f"attention: a cache of {blocks * size} positions in float32; Hopper GPUs add up to {MAX_LEAVES} blocks of {size}. "
            f"bfloat16 and float16 have no such limit"
        )
    weights, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (weights, v))
    y = matmul.product("bmlk,blkn->bmn", weights, v, (Tree.chain(blocks).root,))
    return y.reshape(batch, heads, rows, -1)


#: A block of keys is a leaf, and the blocks are a chain.
PRODUCTS = unfused.Products(_scores, _values)
