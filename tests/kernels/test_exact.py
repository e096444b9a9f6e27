"""The pinned steps, against NumPy, which rounds after every operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tbik_jax.kernels.exact import cast, product, quotient, rounded, tree_sum
from tbik_jax.testing import assert_bitwise_equal, bits

pytestmark = pytest.mark.invariance

# 1 mod 8: the last element falls out of the vectorised loop.
SIZES = (1, 7, 8, 9, 17, 33, 64, 129, 1001)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# Contraction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_a_product_is_rounded_before_the_sum(rng, n):
    a, b, c = (normal(rng, n) for _ in range(3))

    @jax.jit
    def everything(a, b, c):
        return (
            product(a, b) + c,
            c - product(a, b),
            product(a, b) - product(b, c),
            rounded(a * b) + c,
            product(a, 0.3) + c,
        )

    want = (a * b + c, c - a * b, a * b - b * c, a * b + c, a * np.float32(0.3) + c)
    assert_bitwise_equal(everything(a, b, c), want)


@pytest.mark.parametrize("n", [9, 17, 33, 1001])
def test_twin_a_plain_product_contracts_with_the_sum(rng, n):
    a, b, c = (normal(rng, n) for _ in range(3))
    plain = jax.jit(lambda a, b, c: a * b + c)(a, b, c)
    assert (bits(plain) != bits(a * b + c)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 2), (64, 33)])
def test_a_quotient_is_the_same_however_it_is_broadcast(rng, shape):
    a, b, c = normal(rng, *shape), normal(rng, shape[0], 1), normal(rng, *shape)
    want = a * (np.float32(1) / b)
    for f in (quotient, jax.jit(quotient)):
        assert_bitwise_equal(f(a, b), want)
        assert_bitwise_equal(f(a, np.broadcast_to(b, shape)), want)
    assert_bitwise_equal(jax.jit(lambda a, b, c: quotient(a, b) + c)(a, b, c), want + c)


def test_twin_a_plain_quotient_depends_on_the_broadcast(rng):
    a, b = normal(rng, 64, 33), normal(rng, 64, 1)
    divide = jax.jit(lambda a, b: a / b)
    assert (bits(divide(a, b)) != bits(divide(a, np.broadcast_to(b, a.shape).copy()))).any()


# Casts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_a_cast_rounds_once_and_survives_the_way_back(rng, dtype):
    """No twin: XLA may delete the round trip of a plain ``astype``, but does not do so in every program and version."""
    x = np.concatenate([normal(rng, 1000), np.float32([0.0, -0.0, np.inf, -np.inf, 1e30, -1e-30])])
    with np.errstate(over="ignore"):
        want = x.astype(dtype)
    assert_bitwise_equal(jax.jit(lambda x: cast(x, dtype))(x), want)
    back = jax.jit(lambda x: cast(x, dtype).astype(jnp.float32))(x)
    assert_bitwise_equal(back, want.astype(np.float32))
    assert (bits(back) != bits(x)).any()
    after_a_product = jax.jit(lambda x, y: cast(product(x, y), dtype).astype(jnp.float32) + y)(x[:1000], x[1000:0:-1])
    assert_bitwise_equal(after_a_product, (x[:1000] * x[1000:0:-1]).astype(dtype).astype(np.float32) + x[1000:0:-1])


def test_ties_go_to_even():
    halfway = np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8])  # between two neighbours of bf16
    assert_bitwise_equal(
        jax.jit(lambda x: cast(x, jnp.bfloat16))(halfway), np.float32([1.0, 1.015625]).astype(jnp.bfloat16)
    )


def test_float16_loses_its_subnormals():
    tiny = np.float32([2.0**-14, 2.0**-15, -(2.0**-15)])
    got = jax.jit(lambda x: cast(x, jnp.float16))(tiny)
    assert_bitwise_equal(got, np.float16([2.0**-14, 0.0, -0.0]))


def test_casts_that_do_nothing_or_widen(rng):
    x = jnp.asarray(normal(rng, 9))
    assert cast(x, jnp.float32) is x
    narrow = cast(x, jnp.bfloat16)
    assert_bitwise_equal(cast(narrow, jnp.float32), np.asarray(narrow).astype(np.float32))


# Sums ----------------------------------------------------------------------------------------------------------------


def halved(x: np.ndarray) -> np.ndarray:
    """The documented order over the last axis, in NumPy."""
    while (n := x.shape[-1]) > 1:
        half = n // 2
        total = x[..., :half] + x[..., n - half :]
        x = np.concatenate([total, x[..., half : n - half]], axis=-1)
    return x[..., 0]


def test_tree_sum_follows_the_documented_order(rng):
    """Every length to 70, and 576, under jit; 3 rows."""
    lengths = (*range(1, 71), 576)
    x = normal(rng, 3, 576)
    got = jax.jit(lambda x: [tree_sum(x[:, :n]) for n in lengths])(x)
    for n, total in zip(lengths, got, strict=True):
        assert_bitwise_equal(total, halved(x[:, :n]), f"{n} elements")


@pytest.mark.parametrize("n", [1, 6, 33])
def test_tree_sum_over_any_axis(rng, n):
    x = normal(rng, 3, n, 5)
    want = halved(x.swapaxes(1, 2))
    assert_bitwise_equal(jax.jit(lambda x: tree_sum(x, 1))(x), want)
    assert_bitwise_equal(jax.jit(lambda x: tree_sum(x, -2, keepdims=True))(x), want[:, None])


def test_tree_sum_is_a_sum(rng):
    x = normal(rng, 4, 577)
    # Each element passes at most 10 additions; float32 has a unit roundoff of 2**-24.
    np.testing.assert_allclose(
        tree_sum(x), x.sum(-1, dtype=np.float64), rtol=0, atol=10 * 2.0**-24 * np.abs(x).sum(-1).max()
    )


def test_a_rows_tree_sum_does_not_see_the_other_rows(rng):
    x = normal(rng, 130, 100)
    want = halved(x)
    for rows in (1, 2, 3, 9, 64, 130):
        assert_bitwise_equal(jax.jit(tree_sum)(x[:rows]), want[:rows], f"{rows} rows")


def test_twin_a_plain_sum_sees_the_other_rows(rng):
    total = jax.jit(lambda x: jnp.sum(x, -1))
    differs = []
    for width in (33, 100, 576):
        x = normal(rng, 130, width)
        whole = np.asarray(total(x))
        differs += [(bits(total(x[:rows])) != bits(whole[:rows])).any() for rows in (1, 2, 3, 9, 64)]
    assert any(differs)


def test_signed_zeros_and_nan_pass():
    x = np.float32([[-0.0, -0.0, -0.0], [-0.0, 0.0, -0.0], [1.0, np.nan, 2.0]])
    total = np.asarray(jax.jit(tree_sum)(x))
    assert np.signbit(total[0]) and not np.signbit(total[1]) and np.isnan(total[2])
    signs = np.asarray(
        jax.jit(lambda a, b: product(a, b))(np.float32([-0.0, 0.0, np.inf]), np.float32([1.0, -1.0, 0.0]))
    )
    assert np.signbit(signs[:2]).all() and np.isnan(signs[2])
