"""Attention: a query of a head sees its keys and values; not the chunk, the batch, the cache or the heads beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.kernels.attention import attention, unfused
from tbik_jax.testing import assert_bitwise_equal, bits

HEADS, KV_HEADS = 6, 2


def inputs(
    rng: np.random.Generator, batch: int, length: int, dim: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``q``, ``k``, ``v`` of a whole sequence, and its positions; scores spread over several units."""
    q = 2 * rng.standard_normal((batch, length, HEADS, dim))
    k, v = rng.standard_normal((2, batch, KV_HEADS, length, dim))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), positions


def run_with(dim: int, kv_block: int = 64, **options: Any) -> Any:
    """A fresh compiled attention; compiled once per shape."""

    @jax.jit
    def run(q, k, v, positions):
        return attention(q, k, v, positions=positions, scale=dim**-0.5, kv_block=kv_block, **options)

    return run


def longer(x: np.ndarray, length: int, fill: float) -> np.ndarray:
    """A cache of ``length`` entries that begins with ``x`` and holds garbage behind."""
    out = np.full((*x.shape[:2], length, x.shape[3]), fill, x.dtype)
    out[:, :, : x.shape[2]] = x
    return out


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize(
    "dim, dtype, length, kv_block, chunks",
    [
        (16, "float32", 137, 64, (1, 7)),
        (32, "bfloat16", 137, 64, (1, 64)),
        (64, "float32", 289, 128, (1, 7, 64, 256)),
        (64, "float16", 73, 64, (1, 7)),
        (80, "float32", 137, 64, (1, 64)),
        (128, "bfloat16", 289, 256, (1, 256)),
        (256, "float32", 137, 128, (1, 7)),
    ],
)
def test_prefill_chunks_and_decode_agree(rng, dim, dtype, length, kv_block, chunks):
    """Chunks of one query are decoding. Every chunk sees a cache that is filled as far as its last query only."""
    q, k, v, positions = inputs(rng, 2, length, dim, dtype)
    run = run_with(dim, kv_block)
    whole = np.asarray(run(q, k, v, positions))
    garbage = np.array(6e4, dtype)  # finite in float16 as well
    for chunk in chunks:
        for start in range(0, length, chunk):
            part = slice(min(start, length - chunk), min(start, length - chunk) + chunk)
            filled_k, filled_v = k.copy(), v.copy()
            filled_k[:, :, part.stop :] = filled_v[:, :, part.stop :] = garbage
            got = run(q[:, part], filled_k, filled_v, positions[:, part])
            assert_bitwise_equal(got, whole[:, part], f"queries {part}")


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_caches_length_and_what_it_holds_behind_cannot_be_seen(rng, dtype):
    """Up to 19 blocks: more than 16 are added in a loop."""
    q, k, v, positions = inputs(rng, 2, 100, 32, dtype)
    run = run_with(32)
    want = np.asarray(run(q, k, v, positions))
    for length, fill in ((128, 0.0), (128, -1e30), (384, 1e30), (1000, 0.0), (1200, 1e30)):
        got = run(q, longer(k, length, fill), longer(v, length, -fill), positions)
        assert_bitwise_equal(got, want, f"cache of {length} with {fill}")
        last = run(q[:, 99:], longer(k, length, fill), longer(v, length, fill), positions[:, 99:])
        assert_bitwise_equal(last, want[:, 99:], f"the last query, cache of {length} with {fill}")


@pytest.mark.invariance
def test_sequences_of_a_batch_do_not_see_each_other(rng):
    """Each at positions of its own, as a server batches them."""
    q, k, v, _ = inputs(rng, 5, 137, 64)
    starts = np.array([0, 3, 64, 100, 128])
    positions = starts[:, None] + np.arange(9)
    queries = np.take_along_axis(q, positions[:, :, None, None], axis=1)
    run = run_with(64)
    together = np.asarray(run(queries, k, v, positions))
    for rows in (slice(0, 1), slice(3, 4), slice(1, 3), slice(0, 4)):
        assert_bitwise_equal(run(queries[rows], k[rows], v[rows], positions[rows]), together[rows], f"sequences {rows}")


@pytest.mark.invariance
@pytest.mark.parametrize("queries", [1, 9, 41])
def test_heads_do_not_see_each_other(rng, queries):
    q, k, v, positions = inputs(rng, 2, 41, 64)
    q, positions = q[:, -queries:], positions[:, -queries:]
    run = run_with(64)
    together = np.asarray(run(q, k, v, positions))
    assert_bitwise_equal(run(q[:, :, 4:5], k[:, 1:], v[:, 1:], positions), together[:, :, 4:5], "one head")
    assert_bitwise_equal(run(q[:, :, :3], k[:, :1], v[:, :1], positions), together[:, :, :3], "one group")
    # A KV head repeated for two of its query heads, as on a mesh with more ranks than KV heads.
    for heads in ([0, 1, 2, 3, 4, 5], [5], [1, 2, 3], [4, 0]):
        of = jnp.array([head // (HEADS // KV_HEADS) for head in heads])
        got = run_with(64, kv_head_of=of)(q[:, :, heads], k, v, positions)
        assert_bitwise_equal(got, together[:, :, heads], f"heads {heads} by kv_head_of")


@pytest.mark.invariance
@pytest.mark.parametrize("queries_a_piece", [1, 5, 8])
def test_long_prompts_go_in_pieces(rng, monkeypatch, queries_a_piece):
    q, k, v, positions = inputs(rng, 2, 41, 32)
    want = run_with(32)(q, k, v, positions)
    monkeypatch.setattr(unfused, "_SCORE_BYTES", 4 * 2 * HEADS * 64 * queries_a_piece)
    run = run_with(32)
    assert_bitwise_equal(run(q, k, v, positions), want)
    assert "while" in run.lower(q, k, v, positions).as_text()  # it did go in pieces


@pytest.mark.invariance
def test_jit_and_what_surrounds_it_cannot_be_seen(rng):
    q, k, v, positions = inputs(rng, 1, 33, 64)
    call = partial(attention, scale=0.125, kv_block=64)
    want = np.asarray(call(q, k, v, positions=positions))
    scale, rest = rng.uniform(0.5, 2, (2, 1, 33, HEADS, 64)).astype(np.float32)
    inside = jax.jit(lambda q, k, v, at, scale, rest: call(q * scale, k, v, positions=at) + rest)
    assert_bitwise_equal(jax.jit(call)(q, k, v, positions=positions), want, "jit")
    # Constants: XLA may not evaluate the products itself.
    assert_bitwise_equal(jax.jit(lambda: call(*map(jnp.asarray, (q, k, v)), positions=positions))(), want, "constants")
    scaled = np.asarray(jax.jit(call)(q * scale, k, v, positions=positions))
    assert_bitwise_equal(inside(q, k, v, positions, scale, rest), scaled + rest, "fused")


def test_a_zero_has_no_sign():
    """Blocks of exact zeros may be added or not; 0 is +0 either way."""
    q = k = np.ones((1, 1, 1, 64), np.float32)
    for length in (1, 200):
        cache = np.full((1, 1, length, 64), -0.0, np.float32)
        y = run_with(64)(q, np.broadcast_to(k, cache.shape), cache, np.zeros((1, 1), np.int32))
        assert_bitwise_equal(y, np.zeros_like(q))


@pytest.mark.invariance
def test_twin_plain_attention_tells_prefill_from_decode(rng):
    q, k, v, _ = inputs(rng, 2, 137, 64)
    k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))

    @jax.jit
    def plain(q, k, v, positions):
        s = jnp.einsum("bthd,bhsd->bhts", q, k) * 64**-0.5
        s = jnp.where(jnp.arange(k.shape[2]) <= positions[:, None], s, -jnp.inf)
        return jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(s, -1), v)

    at = np.arange(137)
    whole = np.asarray(plain(q, k, v, at))
    assert any(
        (bits(plain(q[:, t : t + 1], k, v, at[t : t + 1])) != bits(whole[:, t : t + 1])).any() for t in (70, 136)
    )


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, dtype", [(16, "float32"), (128, "float32"), (80, "bfloat16"), (128, "bfloat16"), (80, "float16")]
)
def test_accuracy(rng, dim, dtype):
    """Against softmax attention in float64 on the same, already rounded inputs."""
    length = 137
    q, k, v, positions = inputs(rng, 2, length, dim, dtype)
    got = np.asarray(run_with(dim)(q, k, v, positions))
    assert got.dtype == np.dtype(dtype)

    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
    s = np.einsum("bthd,bhsd->bhts", q, k) * dim**-0.5
    s = np.where(np.tril(np.ones((length, length), bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("bhts,bhsd->bthd", p / p.sum(-1, keepdims=True), v)

    # Sums of a few hundred terms in float32, seen to err by up to 7e-7 of the largest value; then the last rounding.
    roundoff = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    smallest = 2.0**-14 if dtype == "float16" else 0.0  # what is subnormal there becomes zero
    tolerance = 2e-6 * np.abs(v).max() + np.maximum(smallest, 1.01 * roundoff * np.abs(want))
    assert (np.abs(got.astype(np.float64) - want) <= tolerance).all()


def test_scale_and_block_are_what_the_caller_says(rng):
    q, k, v, positions = inputs(rng, 1, 137, 32)
    want = run_with(32)(q, k, v, positions)
    doubled = jax.jit(partial(attention, scale=2 * 32**-0.5, kv_block=64))
    assert_bitwise_equal(doubled(q / 2, k, v, positions=positions), want)
    # Numerics-bearing: other blocks, other order.
    assert (bits(run_with(32, 128)(q, k, v, positions)) != bits(want)).any()


# Refusals ------------------------------------------------------------------------------------------------------------


def call(**changes: Any) -> jax.Array:
    arguments = {
        "q": jnp.ones((2, 3, 4, 8)),
        "k": jnp.ones((2, 2, 5, 8)),
        "v": jnp.ones((2, 2, 5, 8)),
        "positions": jnp.zeros((2, 3), jnp.int32),
        "scale": 1.0,
        "kv_block": 64,
    } | changes
    return attention(**arguments)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": jnp.ones((2, 3, 8))}, "q has shape (2, 3, 8), not [B, T, heads, D]"),
        ({"k": jnp.ones((2, 5, 8))}, "k has shape (2, 5, 8), not [B, kv_heads, S, D]"),
        ({"v": jnp.ones((2, 2, 6, 8))}, "k and v differ in shape: (2, 2, 5, 8) and (2, 2, 6, 8)"),
        ({"kv_block": 96}, "kv_block = 96 is not a positive multiple of 64"),
        ({"kv_block": 0}, "kv_block = 0 is not a positive multiple of 64"),
        ({"q": jnp.ones((2, 3, 4, 8), jnp.int32)}, "q is int32; use f32, bf16 or f16"),
        ({"q": jnp.ones((1, 3, 4, 8))}, "q has batch 1, k has 2"),
        ({"q": jnp.ones((2, 3, 4, 16))}, "q has head_dim 16, k has 8"),
        ({"positions": jnp.zeros((2, 4), jnp.int32)}, "positions have shape (2, 4), not (2, 3)"),
        ({"q": jnp.ones((2, 3, 5, 8))}, "5 query heads are not a multiple of 2 KV heads; pass kv_head_of"),
        ({"kv_head_of": jnp.zeros(3, jnp.int32)}, "kv_head_of has shape (3,), not (4,)"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=r"^attention: ") as error:
        call(**changes)
    assert message in str(error.value)


def test_everything_wrong_at_once():
    with pytest.raises(ValueError, match=r"^attention: 5 problems") as error:
        call(q=jnp.ones((1, 3, 5, 16)), kv_block=1)
    for message in (
        "batch 1",
        "head_dim 16",
        "kv_block = 1 ",
        "positions have shape (2, 3), not (1, 3)",
        "5 query heads",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize("dim, kv_block", [(320, 64), (64, 512), (192, 256), (256, 192)])
def test_what_the_cpu_cannot_do_invariantly(dim, kv_block):
    shapes = {"q": jnp.ones((2, 3, 4, dim)), "k": jnp.ones((2, 2, 5, dim)), "v": jnp.ones((2, 2, 5, dim))}
    with pytest.raises(NotImplementedError, match=rf"head_dim {dim}\b.* 256"):
        call(**shapes, kv_block=kv_block)


def test_there_is_no_backward_pass_yet(rng):
    q, k, v, positions = inputs(rng, 1, 9, 16)
    with pytest.raises(NotImplementedError, match="the backward pass has no invariant implementation yet"):
        jax.grad(lambda q: attention(q, k, v, positions=positions, scale=1.0, kv_block=64).sum())(jnp.asarray(q))
