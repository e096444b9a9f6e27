"""Gradients of attention: of a sequence's head they see its queries and keys; not the batch, padding or heads beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.kernels import backend
from tbik_jax.kernels.attention import attention
from tbik_jax.kernels.attention import unfused_backward as cpu
from tbik_jax.kernels.attention.hopper import attention_with_lse
from tbik_jax.kernels.attention.hopper import backward as hopper
from tbik_jax.testing import assert_bitwise_equal, bits

HEADS, KV_HEADS = 6, 2
GROUP = HEADS // KV_HEADS
SETTINGS = [
    hopper.Settings(folded=True, together=1),
    hopper.Settings(folded=False),
    hopper.Settings(kv_rows=64, dkv_turns=False, dq_turns=False),
]

on_the_card = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)
interpreted = pytest.mark.skipif(
    jax.default_backend() != "cpu" or tuple(map(int, jax.__version__.split(".")[:2])) < (0, 12),
    reason=f"Mosaic GPU's interpreter runs these kernels on CPUs from JAX 0.12 on; this is {jax.__version__} on "
    f"{jax.default_backend()}",
)


def inputs(
    rng: np.random.Generator, batch: int, length: int, dim: int, dtype: Any = np.float32, cache: int | None = None
) -> tuple[np.ndarray, ...]:
    """``dy``, ``q``, ``k``, ``v`` of whole sequences, and positions; scores spread over several units."""
    dy, q = rng.standard_normal((2, batch, length, HEADS, dim))
    k, v = rng.standard_normal((2, batch, KV_HEADS, cache or length, dim))
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return dy.astype(dtype), (2 * q).astype(dtype), k.astype(dtype), v.astype(dtype), positions


def run_with(dim: int, kv_block: int = 64, of: Any = cpu.attention_backward, **options: Any) -> Any:
    """A fresh compiled backward pass; compiled once per shape."""

    @jax.jit
    def run(dy, q, k, v, positions):
        return of(dy, q, k, v, positions=positions, scale=dim**-0.5, kv_block=kv_block, **options)

    return run


def plain(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[1], axis=1) for a in (k, v))
    s = jnp.einsum("bthd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    s = jnp.where(jnp.arange(k.shape[2]) <= positions[:, None, :, None], s, -jnp.inf)
    return jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(s, -1), v)


def exact(dy: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """In float64; with the values, the sums of magnitudes that they are made of."""
    dy, q, k, v = (a.astype(np.float64) for a in (dy, q, k, v))
    scale, batch, kv_heads, group = q.shape[-1] ** -0.5, q.shape[0], k.shape[1], q.shape[2] // k.shape[1]
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    s = np.einsum("bthd,bhsd->bhts", q, k) * scale
    s = np.where(np.arange(k.shape[2]) <= positions[:, None, :, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("bthd,bhsd->bhts", dy, v)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))

    def by_kv(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, kv_heads, group, *x.shape[2:]).sum(2)

    dq = np.einsum("bhts,bhsd->bthd", ds, k)
    dk, dv = by_kv(np.einsum("bhts,bthd->bhsd", ds, q)), by_kv(np.einsum("bhts,bthd->bhsd", p, dy))
    return dq, dk, dv


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
def test_jax_differentiates_attention(rng):
    """``jax.vjp``, alone and under ``vmap``, runs the backward pass itself."""
    dy, q, k, v, positions = (jnp.asarray(x) for x in inputs(rng, 3, 70, 16))

    def gradients(dy, q, k, v, positions):
        f = partial(attention, positions=positions, scale=0.25, kv_block=64)
        return jax.vjp(f, q, k, v)[1](dy)

    want = run_with(16)(dy, q, k, v, positions)
    assert_bitwise_equal(jax.jit(gradients)(dy, q, k, v, positions), want)
    one_by_one = jax.vmap(lambda *x: jax.tree.map(lambda g: g[0], gradients(*(a[None] for a in x))))
    assert_bitwise_equal(jax.jit(one_by_one)(dy, q, k, v, positions), want)


@pytest.mark.invariance
@pytest.mark.parametrize(
    "dim, dtype, length, kv_block",
    [
        (16, "float32", 137, 64),
        (128, "bfloat16", 137, 128),
        pytest.param(80, "float16", 73, 64, marks=pytest.mark.slow),
    ],
)
def test_sequences_of_a_batch_do_not_see_each_other(rng, dim, dtype, length, kv_block):
    run = run_with(dim, kv_block)
    whole = inputs(rng, 17, length, dim, dtype)
    together = run(*whole)
    for rows in (slice(0, 1), slice(16, 17), slice(4, 7)):
        assert_bitwise_equal(run(*(a[rows] for a in whole)), tuple(a[rows] for a in together), f"sequences {rows}")


@pytest.mark.invariance
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_do_not_see_each_other(rng, dtype):
    dy, q, k, v, positions = inputs(rng, 2, 73, 64, dtype)
    dq, dk, dv = run_with(64)(dy, q, k, v, positions)
    last = slice(GROUP, HEADS)
    got = run_with(64)(dy[:, :, last], q[:, :, last], k[:, 1:], v[:, 1:], positions)
    assert_bitwise_equal(got, (dq[:, :, last], dk[:, 1:], dv[:, 1:]), "one group")

    apart = run_with(64, of=cpu.attention_backward_by_head)
    by_head = apart(dy, q, k, v, positions)
    assert_bitwise_equal(by_head[0], dq, "dq by head")
    for heads in ([1, 2, 3], [4, 0]):
        of = jnp.array([head // GROUP for head in heads])
        some = run_with(64, of=cpu.attention_backward_by_head, kv_head_of=of)
        got = some(dy[:, :, heads], q[:, :, heads], k, v, positions)
        want = (by_head[0][:, :, heads], by_head[1][:, heads], by_head[2][:, heads])
        assert_bitwise_equal(got, want, f"heads {heads} by kv_head_of")
    # Ranks that hold parts of groups: their heads, put side by side, make the sum of the whole.
    for sums, x in zip((dk, dv), by_head[1:], strict=True):
        parts = jnp.concatenate([x[:, :1], x[:, 1:4], x[:, 4:]], axis=1)
        assert_bitwise_equal(cpu.sum_of_heads(parts, KV_HEADS).astype(sums.dtype), sums, "summed in order")
    of = jnp.arange(HEADS) // GROUP
    assert_bitwise_equal(run_with(64, kv_head_of=of)(dy, q, k, v, positions), (dq, dk, dv), "groups by kv_head_of")


@pytest.mark.slow
@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_and_the_rest_of_the_cache_cannot_be_seen(rng, dtype):
    """Padded queries have ``dy`` = 0; the cache holds anything finite behind."""
    dy, q, k, v, positions = inputs(rng, 2, 100, 32, dtype)
    run = run_with(32)
    want = run(dy, q, k, v, positions)

    def longer(x: np.ndarray, axis: int, length: int, fill: float) -> np.ndarray:
        pad = [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)]
        return np.pad(x, pad, constant_values=np.array(fill, x.dtype))

    for queries, cache, fill in ((101, 101, 3.0), (128, 128, 1e30), (129, 384, -1e30), (100, 1200, 1e4)):
        of_query = longer(dy, 1, queries, 0.0), longer(q, 1, queries, 1.0)
        of_key = longer(k, 2, cache, fill), longer(v, 2, cache, -fill)
        if queries > 100 and abs(fill) > 1e10:
            of_key = longer(k, 2, cache, 2.0), longer(v, 2, cache, -1.0)  # padded queries do see these
        at = np.broadcast_to(np.arange(queries), (2, queries))
        dq, dk, dv = run(*of_query, *of_key, at)
        got = dq[:, :100], dk[:, :, :100], dv[:, :, :100]
        assert_bitwise_equal(got, want, f"{queries} queries, cache of {cache} with {fill}")
        assert not np.asarray(dk)[:, :, queries:].any() and not np.asarray(dv)[:, :, queries:].any()


@pytest.mark.slow
@pytest.mark.invariance
def test_queries_stand_in_blocks_by_position(rng):
    """Queries without a gradient may be there or not: a chunk's own gradients do not depend on where it was cut."""
    dy, q, k, v, positions = inputs(rng, 2, 137, 32)
    run = run_with(32)
    for start in (1, 63, 64, 100):
        dy[:, :start] = 0
        _, dk, dv = run(dy, q, k, v, positions)
        part = slice(start, None)
        got = run(dy[:, part], q[:, part], k, v, positions[:, part])
        assert_bitwise_equal(got[1:], (dk, dv), f"from {start}")


@pytest.mark.invariance
@pytest.mark.parametrize("pairs", [1, 2])
def test_many_pairs_go_in_pieces(rng, monkeypatch, pairs):
    arguments = inputs(rng, 3, 41, 32)
    want = run_with(32)(*arguments)
    monkeypatch.setattr(cpu, "_SCORE_BYTES", 4 * GROUP * 64 * 64 * pairs)
    assert_bitwise_equal(run_with(32)(*arguments), want)


@pytest.mark.invariance
@pytest.mark.slow
def test_jit_constants_and_vmap_cannot_be_seen(rng):
    arguments = inputs(rng, 3, 33, 64)
    call = run_with(64)
    want = call(*arguments)
    with jax.disable_jit():
        op_by_op = cpu.attention_backward(
            *map(jnp.asarray, arguments[:4]), positions=jnp.asarray(arguments[4]), scale=0.125, kv_block=64
        )
    assert_bitwise_equal(op_by_op, want, "op by op")
    assert_bitwise_equal(jax.jit(lambda: call(*map(jnp.asarray, arguments)))(), want, "constants")
    mapped = jax.jit(jax.vmap(call))(*(a[:, None] for a in arguments))
    assert_bitwise_equal(jax.tree.map(lambda a: a[:, 0], mapped), want, "vmap")


@pytest.mark.invariance
def test_twin_the_gradient_of_plain_attention_sees_the_batch(rng):
    dy, q, k, v, positions = inputs(rng, 17, 137, 64)

    @jax.jit
    def gradients(dy, q, k, v, positions):
        return jax.vjp(lambda *a: plain(*a, positions), q, k, v)[1](dy)

    together = gradients(dy, q, k, v, positions)
    differs = []
    for few in (1, 2, 4):
        apart = gradients(*(a[:few] for a in (dy, q, k, v, positions)))
        differs += [(bits(a) != bits(b[:few])).any() for a, b in zip(apart, together, strict=True)]
    assert any(differs)


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dim, dtype", [(16, "float32"), (128, "float32"), (80, "bfloat16"), (128, "bfloat16"), (64, "float16")]
)
def test_accuracy(rng, dim, dtype):
    """Against float64 on the same, already rounded inputs."""
    arguments = inputs(rng, 2, 137, dim, dtype)
    got = run_with(dim)(*arguments)
    # Sums of some hundred terms in float32, seen to err by up to 6e-7 of the largest value; then the last rounding.
    roundoff = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    smallest = 2.0**-14 if dtype == "float16" else 0.0  # what is subnormal there becomes zero
    for name, a, want in zip(("dq", "dk", "dv"), got, exact(*arguments), strict=True):
        assert a.dtype == np.dtype(dtype)
        tolerance = 2e-6 * np.abs(want).max() + np.maximum(smallest, 1.01 * roundoff * np.abs(want))
        error = np.abs(np.asarray(a).astype(np.float64) - want)
        assert (error <= tolerance).all(), f"{name}: {error.max()}, {(error / tolerance).max()} of what is allowed"


def test_agrees_with_autodiff_of_plain_attention(rng):
    dy, q, k, v, positions = inputs(rng, 2, 73, 64, cache=90)
    positions = positions + np.array([[0], [17]])
    got = run_with(64)(dy, q, k, v, positions)
    want = jax.vjp(lambda *a: plain(*a, positions), q, k, v)[1](jnp.asarray(dy))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_any_positions_have_right_gradients(rng):
    dy, q, k, v, _ = inputs(rng, 2, 20, 32, cache=90)
    positions = rng.integers(0, 90, (2, 20))
    got = run_with(32)(dy, q, k, v, positions)
    for a, b in zip(got, exact(dy, q, k, v, positions), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit(rng):
    dy, q, k, v, positions = (jnp.asarray(a) for a in inputs(rng, 1, 9, 16))
    options = {"positions": positions, "scale": 1.0, "kv_block": 64}
    with pytest.raises(ValueError, match=r"dy has shape \(1, 8, 6, 16\), q has \(1, 9, 6, 16\)"):
        cpu.attention_backward(dy[:, :8], q, k, v, **options)
    with pytest.raises(ValueError, match="dy is int32, not a float"):
        cpu.attention_backward(dy.astype(jnp.int32), q, k, v, **options)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"dtype": jnp.float32}, NotImplementedError, "q is float32; supported are bfloat16 and float16"),
        ({"dim": 96}, NotImplementedError, "head_dim 96; supported are 64 and 128"),
        ({"offset": jnp.zeros(3, jnp.int32)}, ValueError, r"offset has shape \(3,\), not \(2,\)"),
        ({"heads_per_node": 2}, ValueError, "heads_per_node = 2 does not divide the 3 query heads of a KV head"),
        ({"lse": jnp.zeros((2, 5, HEADS))}, ValueError, r"lse has shape \(2, 5, 6\), not \(2, 6, 5\)"),
    ],
)
def test_what_hopper_kernels_refuse(changes, error, message):
    dtype, dim = changes.pop("dtype", jnp.bfloat16), changes.pop("dim", 64)
    q, k = jnp.ones((2, 5, HEADS, dim), dtype), jnp.ones((2, KV_HEADS, 5, dim), dtype)
    arguments = {"lse": jnp.zeros((2, HEADS, 5)), "offset": jnp.zeros(2, jnp.int32), "scale": 1.0} | changes
    with pytest.raises(error, match=message):
        hopper.attention_backward(q, q, k, k, q, **arguments)


# Hopper, interpreted ---------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.newest
@pytest.mark.parametrize(
    "dim, per_node, settings",
    [(64, None, hopper.Settings(folded=True, together=1)), (128, 1, hopper.Settings(folded=False))],
)
def test_hopper_kernels_in_the_interpreter(rng, monkeypatch, dim, per_node, settings):
    """Control flow and masks; the bits of the interpreter's products are not the card's."""
    monkeypatch.setattr(backend, "multiprocessors", lambda: 3)
    monkeypatch.setattr(hopper, "fma", lambda a, b, c, layout: a * b + c)  # the interpreter knows neither of these
    monkeypatch.setattr(
        hopper,
        "_add_products",
        lambda sums, *factors: tuple(
            x + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
            for x, (a, b) in zip(sums, factors, strict=True)
        ),
    )
    dy, q, k, v, positions = inputs(rng, 2, 73, dim, jnp.bfloat16, cache=210)
    offset = np.array([0, 130])
    positions = positions + offset[:, None]
    wide = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
    y = plain(*wide, positions).astype(jnp.bfloat16)
    scores = jnp.einsum("bthd,bhsd->bhts", wide[0], jnp.repeat(wide[1], GROUP, axis=1)) * dim**-0.5
    scores = jnp.where(np.arange(210) <= positions[:, None, :, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1) * np.float32(np.log2(np.e))
    with plgpu.force_gpu_interpret_mode():
        dq, dk, dv = hopper.attention_backward(
            dy, q, k, v, y, lse, offset=jnp.asarray(offset), scale=dim**-0.5, heads_per_node=per_node, settings=settings
        )
    if per_node:
        assert dk.shape == dv.shape == (2, KV_HEADS, GROUP, 210, dim) and dk.dtype == jnp.float32
        dk, dv = dk.sum(2), dv.sum(2)
    for got, want in zip((dq, dk, dv), exact(dy, q, k, v, positions), strict=True):
        got = np.asarray(got, np.float64)
        assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)  # bf16 weights and results
    assert not np.asarray(dk)[..., 203:, :].any() and not np.asarray(dv)[..., 203:, :].any()  # behind the last query


# On the card ----------------------------------------------------------------------------------------------------------


@jax.jit
def gradients_on_the_card(dy, q, k, v, positions):
    f = partial(attention, positions=positions, scale=q.shape[-1] ** -0.5, kv_block=128)
    return jax.vjp(f, q, k, v)[1](dy)


@partial(jax.jit, static_argnames="settings")
def with_settings(dy, q, k, v, positions, settings):
    scale = q.shape[-1] ** -0.5
    y, lse = attention_with_lse(scale, q, k, v, positions)
    return hopper.attention_backward(dy, q, k, v, y, lse, offset=positions[:, 0], scale=scale, settings=settings)


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("dim, dtype", [(128, "bfloat16"), (64, "bfloat16"), (128, "float16")])
def test_gradients_on_the_card(rng, dim, dtype):
    """Batch, heads beside it, padding and the run do not enter; values against float64."""
    length = 333
    drawn = inputs(rng, 3, length, dim)
    *x, positions = (jnp.asarray(a) for a in drawn)
    dy, q, k, v = (a.astype(dtype) for a in x)
    want = gradients_on_the_card(dy, q, k, v, positions)
    for got, right in zip(
        want, exact(*(np.asarray(a.astype(jnp.float32)) for a in (dy, q, k, v)), drawn[-1]), strict=True
    ):
        error = np.linalg.norm(np.asarray(got, np.float64) - right) / np.linalg.norm(right)
        assert error < (5e-3 if dtype == "bfloat16" else 8e-4)
    assert_bitwise_equal(gradients_on_the_card(dy, q, k, v, positions), want, "again")
    for settings in SETTINGS:
        assert_bitwise_equal(with_settings(dy, q, k, v, positions, settings), want, f"{settings}")
    alone = gradients_on_the_card(dy[1:2], q[1:2], k[1:2], v[1:2], positions[1:2])
    assert_bitwise_equal(alone, tuple(g[1:2] for g in want), "alone")
    heads = gradients_on_the_card(dy[:, :, GROUP:], q[:, :, GROUP:], k[:, 1:], v[:, 1:], positions)
    assert_bitwise_equal(heads, (want[0][:, :, GROUP:], want[1][:, 1:], want[2][:, 1:]), "one KV head of two")
    dy, q = (jnp.pad(a, ((0, 0), (0, 20), (0, 0), (0, 0))) for a in (dy, q))
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, 51), (0, 0))) for a in (k, v))
    positions = jnp.broadcast_to(jnp.arange(length + 20), (3, length + 20))
    padded = gradients_on_the_card(dy, q, k, v, positions)
    padded = (padded[0][:, :length], padded[1][:, :, :length], padded[2][:, :, :length])
    assert_bitwise_equal(padded, want, "padding")
