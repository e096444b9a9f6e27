"""rms_norm, rope, swiglu and their gradients: a row alone, among others, under jit, and inside a larger program.

Everything runs in the family of this machine; on a CPU also as the programs of Hopper's threads, in NumPy (`simt_numpy`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tbik_jax.kernels.norm_rope import norm_rope
from tbik_jax.kernels.residual import add
from tbik_jax.kernels.rms_norm import add_rms_norm, rms_norm
from tbik_jax.kernels.rope import rope
from tbik_jax.kernels.swiglu import swiglu
from tbik_jax.testing import assert_bitwise_equal, bits
from tests.kernels.families import family

__all__ = ["family"]
ROWS, HEADS, EPS = 67, 3, 1e-5


class Op(NamedTuple):
    """An op of rows: its first ``per_row`` arguments have one entry per row."""

    run: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    per_row: int
    shapes: Callable[[int], list[tuple[int, ...]]]  # of all arguments, for a width
    exact: Callable[..., np.ndarray]
    exact_gradients: Callable[..., tuple[np.ndarray, ...]]  # in float64, of the floating-point inputs that have one


def plain_rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * scale


def exact_rms_norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def exact_rms_norm_gradients(x, scale, dy):
    inverse = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    along = (dy * scale * x).mean(-1, keepdims=True)
    return inverse * dy * scale - x * inverse**3 * along, (dy * x * inverse).sum(0)


def rotate(module: Any, x, cos, sin):
    x1, x2 = module.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return module.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


OPS = {
    "rms_norm": Op(
        lambda x, scale: rms_norm(x, scale, eps=EPS),
        plain_rms_norm,
        1,
        lambda d: [(ROWS, d), (d,)],
        exact_rms_norm,
        exact_rms_norm_gradients,
    ),
    "rope": Op(
        rope,
        lambda x, cos, sin: rotate(jnp, x, cos, sin),
        3,
        lambda d: [(ROWS, HEADS, 2 * d), (ROWS, d), (ROWS, d)],
        lambda x, cos, sin: rotate(np, x, cos, sin),
        lambda x, cos, sin, dy: (rotate(np, dy, cos, -sin),),
    ),
    "swiglu": Op(
        swiglu,
        lambda g, u: g / (1 + jnp.exp(-g)) * u,
        2,
        lambda d: [(ROWS, d), (ROWS, d)],
        lambda g, u: g * sigmoid(g) * u,
        lambda g, u, dy: (dy * u * sigmoid(g) * (1 + g * (1 - sigmoid(g))), dy * g * sigmoid(g)),
    ),
}
pytestmark = pytest.mark.usefixtures("family")
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def arguments(rng: np.random.Generator, op: Op, width: int, dtype: str) -> list[np.ndarray]:
    """Rotations are tables in float32, everything else has the dtype."""
    shapes = op.shapes(width)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if op.run is rope:
        angle = rng.uniform(0, 100, shapes[1])
        return [values[0].astype(dtype), np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    return [value.astype(dtype) for value in values]


def shape_of(op: Op, values: list[np.ndarray]) -> tuple[int, ...]:
    return jax.eval_shape(op.run, *values).shape


def rows_of(op: Op, values: list[np.ndarray], rows: slice) -> list[np.ndarray]:
    return [value[rows] if i < op.per_row else value for i, value in enumerate(values)]


def with_gradients(op: Op) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    """Value, and the gradients of every argument for a cotangent ``dy``."""

    def run(dy, *values):
        y, pull = jax.vjp(op.run, *values)
        return y, pull(dy)

    return run


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@every_op
@pytest.mark.parametrize("dtype, width", [("float32", 33), ("float32", 64), ("bfloat16", 33)])
def test_rows_do_not_see_each_other(rng, op, dtype, width):
    values = arguments(rng, op, width, dtype)
    run = jax.jit(with_gradients(op))
    dy = rng.standard_normal(shape_of(op, values)).astype(dtype)
    y, gradients = run(dy, *values)
    for rows in (slice(0, 1), slice(66, 67), slice(3, 12), slice(2, 34), slice(0, 64)):
        part, part_gradients = run(dy[rows], *rows_of(op, values, rows))
        assert_bitwise_equal(part, np.asarray(y)[rows], f"values, rows {rows}")
        for i in range(op.per_row):
            assert_bitwise_equal(part_gradients[i], np.asarray(gradients[i])[rows], f"gradient {i}, rows {rows}")


@pytest.mark.invariance
@every_op
@pytest.mark.parametrize("dtype, width", [("float32", 1), ("float32", 9), ("bfloat16", 9)])
def test_jit_is_one_operation_at_a_time(rng, op, dtype, width):
    values = arguments(rng, op, width, dtype)
    dy = rng.standard_normal(shape_of(op, values)).astype(dtype)
    assert_bitwise_equal(jax.jit(with_gradients(op))(dy, *values), with_gradients(op)(dy, *values))


@pytest.mark.invariance
@every_op
@pytest.mark.parametrize("width", [8, 33])
def test_a_larger_program_fuses_nothing_into_it(rng, op, width):
    """Scaled before, added to a residual behind, as layers do; the cotangent comes out of a product as well."""
    values = arguments(rng, op, width, "float32")
    shape = shape_of(op, values)
    rest, dy, c = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    factor = rng.uniform(0.5, 2, values[0].shape).astype(np.float32)

    @jax.jit
    def layer(factor, rest, dy, c, x, *others):
        y, pull = jax.vjp(op.run, x * factor, *others)
        dx, *_ = pull(dy * c)
        return y + rest, dx + factor

    scaled = [values[0] * factor, *values[1:]]
    y, gradients = jax.jit(with_gradients(op))(dy * c, *scaled)
    want = np.asarray(y) + rest, np.asarray(gradients[0]) + factor
    assert_bitwise_equal(layer(factor, rest, dy, c, *values), want)


@pytest.mark.invariance
@every_op
def test_twin_plain_operations_depend_on_what_surrounds_them(rng, op):
    """The same by plain operations: XLA contracts products with sums, and sums rows as their number suggests."""
    if op.run is rope and jax.default_backend() != "cpu":
        pytest.skip(f"a rotation sums no row, and XLA contracts nothing on the backend {jax.default_backend()}")
    differs = []
    for width in (33, 64):
        values = arguments(rng, op, width, "float32")
        rest = rng.standard_normal(shape_of(op, values)).astype(np.float32)
        run = jax.jit(lambda rest, *values: op.plain(*values) + rest)
        whole = np.asarray(run(rest, *values))
        apart = np.asarray(op.plain(*values)) + rest
        differs.append((bits(whole) != bits(apart)).any())
        for rows in (slice(0, 1), slice(3, 12)):
            part = run(rest[rows], *rows_of(op, values, rows))
            differs.append((bits(part) != bits(whole[rows])).any())
    assert any(differs)


@pytest.mark.invariance
def test_the_gradient_of_a_norms_scale_is_a_fixed_tree_over_rows(rng, family):
    """On the CPU by halving, as `tree_sum` documents; on Hopper 16 rows in order, then pairwise. Written again in NumPy."""
    x, dy = (rng.standard_normal((ROWS, 33)).astype(np.float32) for _ in range(2))
    normal = np.asarray(rms_norm(x, np.ones(33, np.float32), eps=EPS))
    rows = dy * normal
    if family == "sm90":
        rows = np.concatenate([rows, np.zeros((-ROWS % 16, 33), np.float32)]).reshape(-1, 16, 33)
        rows = np.add.accumulate(rows, axis=1)[:, -1]
    while (n := len(rows)) > 1:
        if family == "sm90":
            rows = np.concatenate([rows[: n - 1 : 2] + rows[1::2], rows[n - n % 2 :]])
        else:
            rows = np.concatenate([rows[: n // 2] + rows[n - n // 2 :], rows[n // 2 : n - n // 2]])
    scale = rng.standard_normal(33).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda scale: jnp.sum(dy * rms_norm(x, scale, eps=EPS))))(scale)
    assert_bitwise_equal(gradient, rows[0])


def pulled(f: Callable[..., Any], dy: Any, *values: Any) -> tuple[Any, Any]:
    """``f`` and its gradients, as one program."""

    @jax.jit
    def run(dy, *values):
        y, pull = jax.vjp(f, *values)
        return y, pull(dy)

    return run(dy, *values)


@pytest.mark.invariance
@every_dtype
@pytest.mark.parametrize("shape", [(5, 33), (2, 9, 64)])
def test_the_residual_sum_and_its_norm_in_one_step(rng, dtype, shape):
    """Forward and backward as the two steps apart; both results flow on."""
    x, y, dtotal, dnormal = (rng.standard_normal(shape).astype(dtype) for _ in range(4))
    scale = rng.standard_normal(shape[-1]).astype(dtype)

    def apart(x, y, scale):
        total = add(x, y)
        return total, rms_norm(total, scale, eps=EPS)

    one_step = partial(add_rms_norm, eps=EPS)
    (total, normal), gradients = pulled(one_step, (dtotal, dnormal), x, y, scale)
    assert_bitwise_equal((total, normal), jax.jit(apart)(x, y, scale), "forward")
    assert_bitwise_equal(total, (x.astype(np.float32) + y.astype(np.float32)).astype(dtype), "the sum")
    _, (through_norm, dscale) = pulled(partial(rms_norm, eps=EPS), dnormal, total, scale)
    dx = (np.asarray(through_norm).astype(np.float32) + dtotal.astype(np.float32)).astype(dtype)
    assert_bitwise_equal(gradients, (dx, dx, dscale), "backward")


@pytest.mark.invariance
@every_dtype
@pytest.mark.parametrize("heads, d", [(3, 64), (8, 128), (2, 256), (5, 10)])
def test_heads_normalised_and_turned_in_one_step(rng, dtype, heads, d):
    q, k, dq, dk = (rng.standard_normal((2, 9, n, d)).astype(dtype) for n in (heads, 2, heads, 2))
    scales = [rng.standard_normal(d).astype(dtype) for _ in range(2)]
    angle = rng.uniform(0, 100, (2, 9, d // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    (y, z), gradients = pulled(lambda *v: norm_rope(*v, cos, sin, eps=EPS), (dq, dk), q, k, *scales)
    for i, (x, dx, got) in enumerate(((q, dq, y), (k, dk, z))):
        want, apart = pulled(lambda x, scale: rope(rms_norm(x, scale, eps=EPS), cos, sin), dx, x, scales[i])
        assert_bitwise_equal(got, want, "forward")
        assert_bitwise_equal((gradients[i], gradients[2 + i]), apart, "backward")


@pytest.mark.invariance
@every_op
def test_vmap_is_one_example_after_another(rng, op):
    values = arguments(rng, op, 16, "float32")
    many = [np.stack([value, value[::-1]]) if i < op.per_row else value for i, value in enumerate(values)]
    axes = [0 if i < op.per_row else None for i in range(len(values))]
    got = jax.vmap(op.run, axes)(*many)
    assert_bitwise_equal(got[0], op.run(*values))
    assert_bitwise_equal(got[1], op.run(*(v[1] if i < op.per_row else v for i, v in enumerate(many))))


# Values --------------------------------------------------------------------------------------------------------------


@every_op
@every_dtype
def test_accuracy(rng, op, dtype):
    """Values and gradients against float64: a few units of float32, then one rounding to the dtype."""
    values = arguments(rng, op, 160, dtype)
    dy = rng.standard_normal(shape_of(op, values)).astype(dtype)
    y, gradients = jax.jit(with_gradients(op))(dy, *values)
    wide = [value.astype(np.float64) for value in values]
    want = (op.exact(*wide), *op.exact_gradients(*wide, dy.astype(np.float64)))
    last = 2.0**-8 if dtype == "bfloat16" else 0.0
    for i, (a, b) in enumerate(zip((y, *gradients), want, strict=False)):
        assert a.shape == b.shape
        assert a.dtype == np.dtype(dtype), i
        # Terms may cancel; their sizes are those of the largest result.
        tolerance = 2e-6 * np.abs(b).max() + 1.01 * last * np.abs(b)
        assert (np.abs(np.asarray(a).astype(np.float64) - b) <= tolerance).all(), f"result {i}"


def test_rope_tables_get_no_gradient(rng):
    x, cos, sin = arguments(rng, OPS["rope"], 8, "float32")
    gradients = jax.grad(lambda cos, sin: rope(x, cos, sin).sum(), (0, 1))(cos, sin)
    assert_bitwise_equal(gradients, (np.zeros_like(cos), np.zeros_like(sin)))


def test_rope_by_hand():
    """A quarter turn of the pairs (i, i + D / 2)."""
    x = np.float32([[[1, 2, 3, 4]]])
    turned = rope(x, np.float32([[0, 1]]), np.float32([[1, 0]]))
    np.testing.assert_array_equal(turned, [[[-3, 2, 1, 4]]])


def test_swiglu_far_out():
    """exp(-gate) overflows to inf for a very negative gate: the result is -0, not NaN; a large gate passes."""
    y = swiglu(np.float32([-1000.0, -90.0, 0.0, 1000.0]), np.float32([2, 2, 2, 2]))
    np.testing.assert_array_equal(y, [0, 0, 0, 2000])
    gate, up = jax.grad(lambda g, u: swiglu(g, u).sum(), (0, 1))(np.float32([-1000.0, 1000.0]), np.float32([2, 2]))
    np.testing.assert_array_equal(gate, [0, 2])
    np.testing.assert_array_equal(up, [0, 1000])


def test_rms_norm_keeps_zeros_and_uses_eps():
    y = rms_norm(np.zeros((2, 8), np.float32), np.ones(8, np.float32), eps=EPS)
    np.testing.assert_array_equal(y, 0)
    constant = rms_norm(np.full((1, 4), 3.0, np.float32), np.ones(4, np.float32), eps=7.0)
    np.testing.assert_array_equal(constant, 0.75)  # 3 / sqrt(9 + 7)
