"""Keys and values go where attention reads them, bit by bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tbik_jax.dense import attention, paged_attention, write_kv
from tbik_jax.kernels import backend
from tbik_jax.testing import assert_bitwise_equal
from tests.kernels.families import family
from tests.meshes import mesh_of

__all__ = ["family"]

DTYPES = ("bfloat16", "float16", "float32")


def words(rng: np.random.Generator, *shape: int, dtype: str) -> np.ndarray:
    """Any bits, also those of NaN."""
    return rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]


def written(cache, new, positions, table=None):
    """The definition."""
    cache = cache.copy()
    for b, t in np.ndindex(positions.shape):
        at, place, size = positions[b, t], b, cache.shape[2]
        if not 0 <= at < size * (1 if table is None else table.shape[1]):
            continue
        if table is not None:
            place, at = table[b, at // size], at % size
        if 0 <= place < len(cache):
            cache[place, :, at] = new[b, t]
    return cache


@pytest.mark.invariance
@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, heads, dim", [(1, 1, 3, 64), (3, 1, 1, 33), (2, 7, 2, 128), (5, 3, 4, 8)])
def test_tokens_go_where_their_positions_say(rng, batch, tokens, heads, dim, dtype):
    """In any order; and nowhere if that is outside."""
    size = 16
    k_cache, v_cache = (words(rng, batch, heads, size, dim, dtype=dtype) for _ in range(2))
    k, v = (words(rng, batch, tokens, heads, dim, dtype=dtype) for _ in range(2))
    places = [-(2**31), -1, *range(size), size, 2**31 - 1]
    positions = np.stack([rng.permutation(places)[:tokens] for _ in range(batch)]).astype(np.int32)
    found = jax.jit(lambda *of: write_kv(*of[:4], positions=of[4]))(k_cache, v_cache, k, v, positions)
    assert_bitwise_equal(found, (written(k_cache, k, positions), written(v_cache, v, positions)))


@pytest.mark.invariance
@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages(rng, dtype):
    """In any order, shared by nobody who writes; entries of the table that name no page write nothing."""
    pages, heads, size, dim, batch, tokens = 11, 2, 8, 64, 3, 9
    k_cache, v_cache = (words(rng, pages, heads, size, dim, dtype=dtype) for _ in range(2))
    k, v = (words(rng, batch, tokens, heads, dim, dtype=dtype) for _ in range(2))
    table = rng.permutation(pages)[: 3 * batch].reshape(batch, 3).astype(np.int32)
    table[0, 1], table[2, 2] = -1, pages
    positions = np.stack([rng.permutation(np.arange(-2, 27))[:tokens] for _ in range(batch)]).astype(np.int32)
    found = jax.jit(lambda *of: write_kv(*of[:4], positions=of[4], page_table=of[5]))(
        k_cache, v_cache, k, v, positions, table
    )
    assert_bitwise_equal(found, (written(k_cache, k, positions, table), written(v_cache, v, positions, table)))


@pytest.mark.usefixtures("family")
def test_the_caches_that_came_stay_as_they_were(rng):
    cache, new = (words(rng, *shape, dtype="float32") for shape in ((2, 1, 8, 8), (2, 1, 1, 8)))
    given = jnp.asarray(cache), jnp.asarray(cache)
    after = jax.jit(lambda *of: write_kv(*of, new, new, positions=jnp.zeros((2, 1), jnp.int32)))(*given)
    assert_bitwise_equal(given, (cache, cache))
    assert_bitwise_equal(after[0], written(cache, new, np.zeros((2, 1), np.int32)))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("check_vma", [False, True])
def test_inside_a_mesh_and_under_vmap(rng, check_vma):
    cache, new = words(rng, 6, 1, 8, 8, dtype="float32"), words(rng, 6, 2, 1, 8, dtype="float32")
    positions = np.array([[3, 0], [1, 7], [2, 3], [0, 1], [5, -1], [6, 2]], np.int32)
    want = written(cache, new, positions)

    def run(cache, new, positions):
        return write_kv(cache, cache, new, new, positions=positions)

    sharded = jax.shard_map(run, mesh=mesh_of(3), in_specs=P("tp"), out_specs=P("tp"), check_vma=check_vma)
    assert_bitwise_equal(jax.jit(sharded)(cache, new, positions), (want, want))
    alone = jax.vmap(lambda *of: run(*(x[None] for x in of))[0][0])
    assert_bitwise_equal(jax.jit(alone)(cache, new, positions), want)


@pytest.mark.invariance
def test_attention_finds_them(rng):
    """Written token by token, or at once, or in pages: the bits of a cache that was there from the start."""
    batch, tokens, heads, dim, size = 2, 65, 2, 64, 256
    q, k, v = (rng.standard_normal((batch, tokens, heads, dim)).astype(np.float32).astype("bfloat16") for _ in range(3))
    positions = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens))
    options = {"positions": positions, "scale": dim**-0.5, "kv_block": 128}
    whole = (np.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - tokens), (0, 0))) for x in (k, v))
    want = jax.jit(lambda *of: attention(*of, **options))(q, *whole)
    empty = jnp.zeros((batch, heads, size, dim), "bfloat16")

    at_once = jax.jit(lambda k, v: write_kv(empty, empty, k, v, positions=positions))(k, v)
    assert_bitwise_equal(attention(q, *at_once, **options), want)
    step = jax.jit(lambda caches, k, v, at: write_kv(*caches, k, v, positions=at), donate_argnums=0)
    caches = empty, empty + 0
    for t in range(tokens):
        caches = step(caches, k[:, t : t + 1], v[:, t : t + 1], positions[:, t : t + 1])
    assert_bitwise_equal(attention(q, *caches, **options), want)
    pages, table = jnp.zeros((64, heads, 8, dim), "bfloat16"), rng.permutation(64).reshape(2, 32).astype(np.int32)
    paged = jax.jit(lambda k, v: write_kv(pages, pages, k, v, positions=positions, page_table=table))(k, v)
    assert_bitwise_equal(paged_attention(q, *paged, table, **options), want)


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)
def test_in_the_memory_of_a_donated_cache(rng):
    """In one kernel, with nothing copied."""
    from tbik_jax.kernels.hopper import compat

    assert backend.family() == "sm90"
    if not compat.CHANGES_ARRAYS:
        pytest.skip(f"XLA writes the cache under JAX {jax.__version__}")
    shape = 4, 8, 1024, 128
    caches = tuple(jnp.asarray(words(rng, *shape, dtype="bfloat16")) for _ in range(2))
    k, v = (words(rng, 4, 1, 8, 128, dtype="bfloat16") for _ in range(2))
    positions = np.array([[0], [1023], [17], [-1]], np.int32)
    want = tuple(written(np.asarray(cache), new, positions) for cache, new in zip(caches, (k, v), strict=True))
    where = [cache.unsafe_buffer_pointer() for cache in caches]
    step = jax.jit(lambda caches, k, v, at: write_kv(*caches, k, v, positions=at), donate_argnums=0)
    program = step.lower(caches, k, v, positions).compile().as_text()
    assert program.count(" custom-call(") == 1 and "copy(" not in program and "fusion(" not in program
    found = step(caches, k, v, positions)
    assert [cache.unsafe_buffer_pointer() for cache in found] == where
    assert_bitwise_equal(found, want)


def test_what_does_not_fit_is_refused():
    cache, new = jnp.zeros((2, 3, 8, 4)), jnp.zeros((2, 1, 3, 4), "bfloat16")
    with pytest.raises(
        ValueError, match=r"write_kv: 3 problems(.|\n)*dtypes differ(.|\n)*\(3, 4\)(.|\n)*positions have"
    ):
        write_kv(cache, cache, new[:, :, :2], new[:, :, :2], positions=jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match="the caches have batch 2, k and v 1"):
        write_kv(cache, cache, jnp.zeros((1, 1, 3, 4)), jnp.zeros((1, 1, 3, 4)), positions=jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="page_table has shape"):
        write_kv(
            cache,
            cache,
            cache[:, :1, :3],
            cache[:, :1, :3],
            positions=jnp.zeros((2, 1), jnp.int32),
            page_table=jnp.zeros(2, jnp.int32),
        )
    whole, one = jnp.zeros((2, 3, 8, 4), jnp.int32), jnp.zeros((2, 1, 3, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="caches of int32"):
        write_kv(whole, whole, one, one, positions=jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(ValueError, match="positions: float32; use integers"):
        write_kv(cache, cache, jnp.zeros((2, 1, 3, 4)), jnp.zeros((2, 1, 3, 4)), positions=jnp.zeros((2, 1)))
