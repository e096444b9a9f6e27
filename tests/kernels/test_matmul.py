"""Every form of the products against the specification in NumPy; and the specification against exact arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax

from tbik_jax import Tree
from tbik_jax.kernels import backend, matmul
from tbik_jax.kernels.exact import cast, product
from tbik_jax.kernels.matmul import cpu, spec
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import Node

FORMS = {
    "rows": lambda w: w,
    "packed": matmul.pack,
    "packed, small": partial(matmul.pack, full=False),
}
K_STEP = 256  # the contract's text says so; another step is another version of it
EVERY_M = (1, 2, 3, 17, 63, 64, 65, 130)


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def wanted(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``[leaves, M, N]`` by the specification."""
    x, w = x.astype(np.float32), w.astype(np.float32)
    return np.stack([spec.leaf_product(x[:, leaf], w[leaf], K_STEP) for leaf in range(len(w))])


def by_every_form(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
    return {name: matmul.leaf_products(x, form(w)) for name, form in FORMS.items()}


# The specification ---------------------------------------------------------------------------------------------------


def nearest_float32(x: Fraction) -> float:
    """Round to nearest, ties to even, in integers; for results that are not subnormal."""
    if x == 0:
        return 0.0
    exponent = abs(x).numerator.bit_length() - abs(x).denominator.bit_length() - 24
    while abs(x) / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    return float(round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent)


floats = st.builds(lambda m, e: float(m * 2.0**e), st.integers(-(2**24) + 1, 2**24 - 1), st.integers(-36, 4))


@given(floats, floats, floats)
# Just below a tie with an odd neighbour: rounding to float64 first makes the tie of it.
@example(2.0**-12 * (1 + 2.0**-20), 2.0**-12 * (1 - 2.0**-20), 1 + 2.0**-23)
@example(1 + 2.0**-23, 1 - 2.0**-23, -1.0)
def test_fma_rounds_once(a, b, c):
    want = nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))
    assert float(spec.fma(a, b, c)) == want


def test_twin_fma_through_float64_rounds_twice():
    a, b, c = 2.0**-12 * (1 + 2.0**-20), 2.0**-12 * (1 - 2.0**-20), 1 + 2.0**-23
    assert float(np.float32(a * b + c)) != nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_in_bulk_against_a_longer_float(rng):
    """Where the platform has one; 64 bits of mantissa then leave a double rounding once in 2**40."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("numpy.longdouble is no longer than float64 here; the exact test above stands alone")
    a, b, c = (normal(rng, 100_000) for _ in range(3))
    want = (a.astype(np.longdouble) * b + c).astype(np.float32)
    assert_bitwise_equal(spec.fma(a, b, c), want)
    assert (bits(a * b + c) != bits(want)).any()


@given(st.integers(1, 5000), st.integers(1, 300))
def test_k_chunks_are_the_fewest_and_equal(k, k_step):
    count, size = spec.k_chunks(k, k_step)
    assert size <= k_step and count * size >= k
    assert (count - 1) * k_step < k  # no fewer would do
    assert (size - 1) * count < k  # no shorter would do


@pytest.mark.parametrize("k", [1, 5, 256, 257, 1300])
def test_leaf_product_is_the_documented_sum(rng, k):
    x, w = normal(rng, 1, k)[0], normal(rng, 1, k)[0]
    size = -(-k // -(-k // 256))
    chunks = []
    for start in range(0, k, size):
        acc = np.float32(0)
        for a, b in zip(x[start : start + size], w[start : start + size], strict=True):
            acc = spec.fma(a, b, acc)
        chunks.append(acc)
    total = chunks[0]
    for chunk in chunks[1:]:
        total = np.float32(total + chunk)
    assert_bitwise_equal(spec.leaf_product(x[None], w[None], 256), np.float32([[total]]))


# The forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize(
    "leaves, n, k",
    [(1, 17, 1), (3, 33, 27), (2, 64, 64), (1, 259, 72), (8, 128, 5), (1, 960, 576), (2, 33, 1300)],
)
def test_every_form_is_the_specification_for_any_number_of_rows(rng, leaves, n, k):
    """The wanted rows are computed once: rows of a small product are those of a large one."""
    x, w = normal(rng, max(EVERY_M), leaves, k), normal(rng, leaves, n, k)
    columns = np.unique(np.r_[0:6, n // 2 : n // 2 + 6, n - 6 : n])
    want = wanted(x, w[:, columns])
    run = jax.jit(by_every_form)
    for m in EVERY_M:
        for form, got in run(x[:m], w).items():
            assert_bitwise_equal(got[:, :, columns], want[:, :m], f"{form}, M = {m}")


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("leaves, n, k", [(2, 64, 64), (1, 33, 576)])
def test_narrow_inputs_are_widened_first(rng, leaves, n, k, dtype):
    x_dtype, w_dtype = (jnp.float32, jnp.bfloat16) if dtype == "mixed" else (dtype, dtype)
    x, w = normal(rng, 130, leaves, k, dtype=x_dtype), normal(rng, leaves, n, k, dtype=w_dtype)
    want = wanted(x, w)
    run = jax.jit(by_every_form)
    for m in (1, 3, 64, 130):
        for form, got in run(x[:m], w).items():
            assert_bitwise_equal(got, want[:, :m], f"{form}, M = {m}")


@pytest.mark.invariance
def test_columns_do_not_see_each_other(rng):
    x, w = normal(rng, 65, 1, 300), normal(rng, 1, 259, 300)
    want = wanted(x, w)
    run = jax.jit(by_every_form)
    for m in (1, 3, 65):
        for part in (slice(0, 1), slice(258, 259), slice(3, 20), slice(100, 228)):
            for form, got in run(x[:m], w[:, part]).items():
                assert_bitwise_equal(got, want[:, :m, part], f"{form}, M = {m}, columns {part}")


@pytest.mark.invariance
@pytest.mark.parametrize("m", [1, 2, 64])
@pytest.mark.parametrize("leaves, n, k", [(4, 33, 1), (1, 128, 64), (2, 17, 1300)])
def test_nothing_is_fused_into_the_chain(rng, leaves, n, k, m):
    """XLA likes to start a product from what is added to it, and to contract where a leaf has one k alone."""
    x, y, w = normal(rng, m, leaves, k), normal(rng, m, leaves, k), normal(rng, leaves, n, k)
    bias, rest = normal(rng, n), normal(rng, leaves, m, n)
    tree = Tree(leaves)
    plain, of_product, of_rounded = wanted(x, w), wanted(x * y, w), wanted((x * y).astype(jnp.bfloat16), w)

    @jax.jit
    def everything(x, y, w, bias, rest):
        def by(form):
            packed = form(w)
            multiply = partial(matmul.leaf_products, w=packed)
            return {
                "bias": multiply(x) + bias,
                "sum": rest + multiply(x),
                "scaled sum": product(multiply(x), 3.0) + rest,
                "of a product": multiply(x * y),
                "of a rounded product": multiply(cast(x * y, jnp.bfloat16)),
                "tree": tree.reduce(list(multiply(x)), jnp.add) + bias,
                "scan": lax.scan(lambda total, x: (total + multiply(x), None), rest, jnp.stack([x, x * y]))[0],
            }

        return {name: by(form) for name, form in FORMS.items()}

    want = {
        "bias": plain + bias,
        "sum": rest + plain,
        "scaled sum": plain * np.float32(3) + rest,
        "of a product": of_product,
        "of a rounded product": of_rounded,
        "tree": tree.reduce(list(plain), np.add) + bias,
        "scan": (rest + plain) + of_product,
    }
    for form, got in everything(x, y, w, bias, rest).items():
        assert_bitwise_equal(got, want, form)


@pytest.mark.invariance
@pytest.mark.parametrize("n, k", [(64, 64), (128, 256)])
def test_operands_may_come_transposed(rng, n, k):
    """XLA folds a transpose into the dot, which then walks its operand along the other dimension."""
    x, w = normal(rng, 130, 1, k), normal(rng, 1, n, k)
    want = wanted(x, w)

    @jax.jit
    def turned(x, w, w_turned):
        x = x.transpose(2, 1, 0)
        return by_every_form(x, w), by_every_form(x, w_turned.swapaxes(1, 2))

    for m in (1, 2, 3, 64, 130):
        for results in turned(x[:m].transpose(2, 1, 0), w, w.swapaxes(1, 2)):
            for form, got in results.items():
                assert_bitwise_equal(got, want[:, :m], f"{form}, M = {m}")


@pytest.mark.invariance
@pytest.mark.parametrize("layout", ["nlk", "lkn"])
def test_a_weight_may_be_stored_in_any_layout(rng, layout):
    x, w, dy = normal(rng, 5, 3, 65), normal(rng, 3, 17, 65), normal(rng, 5, 17)
    stored = w.transpose(["lnk".index(axis) for axis in layout])
    nodes = (Node(0, 2, Node(0, 1), Node(1, 2)), Node(2, 3))
    assert_bitwise_equal(
        matmul.node_products(x, stored, nodes, layout=layout), matmul.node_products(x, w, nodes), "forward"
    )
    assert_bitwise_equal(
        matmul.input_gradient(dy, stored, layout=layout), matmul.input_gradient(dy, w), "input gradient"
    )
    got = matmul.weight_gradient(dy, x, layout=layout)
    assert_bitwise_equal(
        got, matmul.weight_gradient(dy, x).transpose(["lnk".index(a) for a in layout]), "weight gradient"
    )


@pytest.mark.invariance
def test_twin_a_plain_dot_depends_on_the_layout(rng):
    """At which sizes is the library's choice, and another one on another processor: so several are tried."""

    def depends(m: int, k: int, n: int) -> bool:
        x, w = normal(rng, m, k), normal(rng, n, k)
        as_rows = jax.jit(lambda x, w: jnp.dot(x, w.T))(x, w)
        as_columns = jax.jit(jnp.dot)(x, np.ascontiguousarray(w.T))
        return bool((bits(as_rows) != bits(as_columns)).any())

    assert any(depends(*size) for size in [(5, 65, 17), (1, 576, 576), (17, 576, 576), (64, 4096, 64), (1, 4096, 1024)])


@pytest.mark.invariance
@pytest.mark.parametrize("m", [1, 3, 65])
def test_constants_are_not_multiplied_while_compiling(rng, m):
    """XLA folds a dot of constants with an evaluator of its own, whose sums have another order."""
    x, w = normal(rng, m, 1, 72), normal(rng, 1, 33, 72)
    want = wanted(x, w)
    for form, got in jax.jit(lambda: by_every_form(jnp.asarray(x), jnp.asarray(w)))().items():
        assert_bitwise_equal(got, want, form)


@pytest.mark.invariance
def test_twin_rows_of_a_plain_dot_depend_on_the_others(rng):
    """Several sizes, as above."""

    def depends(k: int, n: int, rows: int, m: int, turned: bool) -> bool:
        x, w = normal(rng, rows, k), normal(rng, k, n)
        dot = jax.jit((lambda x, w: jnp.dot(x, w.T)) if turned else jnp.dot)
        w = np.ascontiguousarray(w.T) if turned else w
        return bool((bits(dot(x[:m], w)) != bits(dot(x, w)[:m])).any())

    sizes = itertools.product([(576, 576, 256), (1536, 576, 256), (4096, 1024, 64), (65, 17, 256)], [1, 2, 3, 17])
    assert any(depends(*size, m, turned) for size, m in sizes for turned in (True, False))


def test_accuracy(rng):
    """Every fma and every add loses at most half a unit: the bound of the textbooks, against float64."""
    for k in (72, 1300):
        x, w = normal(rng, 65, 1, k), normal(rng, 1, 130, k)
        count, size = spec.k_chunks(k, K_STEP)
        exact = x[:, 0].astype(np.float64) @ w[0].T.astype(np.float64)
        tolerance = (size + count) * 2.0**-24 * (np.abs(x[:, 0]) @ np.abs(w[0]).T)
        for form, got in jax.jit(by_every_form)(x, w).items():
            assert (np.abs(got[0] - exact) <= tolerance).all(), form


def test_signed_zeros_start_from_plus_zero():
    """A chain begins at +0, so a product of -0 alone is +0; with one k, XLA's own product would be -0."""
    x, w = np.float32([[[-0.0]]]), np.float32([[[1.0]]])
    for form, got in jax.jit(by_every_form)(x, w).items():
        assert not np.signbit(got).any(), form


@pytest.mark.parametrize("full", [True, False])
def test_a_packed_weight_knows_its_shape_and_passes_through_jit(rng, full):
    w = normal(rng, 3, 33, 600)
    packed = jax.jit(partial(matmul.pack, full=full))(w)
    assert (packed.leaves, packed.n, packed.k) == (3, 33, 600)
    assert (packed.full is None) == (not full)
    x = normal(rng, 2, 3, 600)
    assert_bitwise_equal(jax.jit(matmul.leaf_products)(x, packed), wanted(x, w))


# The self-test -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_self_test():
    cpu.self_test.cache_clear()
    yield
    cpu.self_test.cache_clear()


def plain_rows(x, w, count, size):
    """Weights ``[K, N]`` and one dot: what one would write."""
    k = w.shape[-1]
    return lax.dot(x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :k], w[0].T)[None]


def plain_panels(x, panels, count):
    w = panels.transpose(0, 2, 1, 3).reshape(panels.shape[0] * panels.shape[2], -1)
    return lax.dot(x.swapaxes(0, 1).reshape(x.shape[1], -1), w)[None]


@pytest.mark.usefixtures("fresh_self_test")
@pytest.mark.parametrize(
    "broken, replacement, form", [("_rows", plain_rows, "rows"), ("_panels", plain_panels, "packed")]
)
def test_the_self_test_finds_a_broken_form(monkeypatch, broken, replacement, form):
    monkeypatch.setattr(cpu, broken, replacement)
    with pytest.raises(matmul.SelfTestError) as error:
        matmul.leaf_products(jnp.ones((3, 1, 8)), jnp.ones((1, 4, 8)))
    head, *lines, version = str(error.value).splitlines()
    assert "does not compute dots as ascending fma chains here, so results would depend on the mesh" in head
    assert lines and all(line.startswith(f"  - {form}") and "% of the elements differ" in line for line in lines)
    assert all("K = 192, N = 192" in line or "K = 520, N = 65" in line for line in lines)
    assert jax.__version__ in version


@pytest.mark.usefixtures("fresh_self_test")
def test_the_self_test_runs_once_also_while_tracing(monkeypatch):
    calls = []
    compiled = cpu._compiled
    monkeypatch.setattr(cpu, "_compiled", lambda *arguments: calls.append(arguments) or compiled(*arguments))
    x, w = jnp.ones((2, 1, 8)), jnp.ones((1, 4, 8))
    jax.jit(matmul.leaf_products)(x, w)
    once = len(calls)
    assert once > 0
    matmul.leaf_products(x, w)
    assert len(calls) == once


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, w, messages",
    [
        ((2, 8), (4, 8), ["x has shape (2, 8), not [M, leaves, k]", "w has shape (4, 8), not [leaves, N, k]"]),
        ((2, 1, 8), (1, 4, 9), ["x has (leaves, k) = (1, 8), w has (1, 9); both must be cut in the same leaves"]),
        ((2, 2, 8), (4, 4, 8), ["x has (leaves, k) = (2, 8), w has (4, 8)"]),
        ((2, 1, 8), (1, 0, 8), ["w has an empty dimension: (leaves, N, k) = (1, 0, 8)"]),
    ],
)
def test_shapes_that_do_not_fit(x, w, messages):
    with pytest.raises(ValueError, match=r"^matmul\.leaf_products: ") as error:
        matmul.leaf_products(jnp.ones(x), jnp.ones(w))
    for message in messages:
        assert message in str(error.value)


def test_dtypes_that_are_not_supported():
    with pytest.raises(ValueError, match=r"^matmul\.leaf_products: 2 problems") as error:
        matmul.leaf_products(jnp.ones((2, 1, 8), jnp.int32), jnp.ones((1, 4, 8), jnp.int8))
    assert "x is int32; supported are float32, bfloat16, float16" in str(error.value)
    assert "w is int8; supported are float32, bfloat16, float16" in str(error.value)


def test_a_packed_weight_that_does_not_fit():
    packed = matmul.pack(jnp.ones((2, 4, 8)))
    with pytest.raises(ValueError, match=r"x has \(leaves, k\) = \(1, 16\), w has \(2, 8\)"):
        matmul.leaf_products(jnp.ones((3, 1, 16)), packed)


def test_pack_lists_what_is_wrong():
    with pytest.raises(ValueError, match=r"^matmul\.pack: 2 problems") as error:
        matmul.pack(jnp.ones((4, 8), jnp.int32))
    assert "w has shape (4, 8), not [leaves, N, k]" in str(error.value)
    assert "w is int32; supported are" in str(error.value)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for call in (backend.family, lambda: matmul.leaf_products(jnp.ones((2, 1, 8)), jnp.ones((1, 4, 8)))):
        with pytest.raises(
            NotImplementedError,
            match=r"for CPUs and for Hopper GPUs .*, and the default backend is 'tpu'.*JAX_PLATFORMS=cpu",
        ):
            call()


@pytest.mark.parametrize("k, n", [(96, 384), (256, 256)])
@pytest.mark.parametrize("m", [1, 2, 7, 48, 65])
def test_a_weight_transposed_in_the_same_program(rng, m, k, n):
    """XLA would fold the transpose into the dot, which then leaves the chain; self-tests pass weights as arguments."""
    x, w = rng.standard_normal((m, 1, k), np.float32), rng.standard_normal((k, n), np.float32)
    got = jax.jit(lambda x, w: matmul.leaf_products(x, w.T[None]))(x, w)
    columns = np.r_[0:3, n - 3 : n]
    assert_bitwise_equal(np.asarray(got)[0][:, columns], spec.leaf_product(x[:, 0], w.T[columns], cpu.K_STEP))
