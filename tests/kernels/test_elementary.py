"""exp, log, rsqrt: one argument, one result, whatever stands beside it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import lax

from tbik_jax.kernels.elementary import exp, log, rsqrt
from tbik_jax.testing import assert_bitwise_equal, bits

pytestmark = pytest.mark.invariance

FUNCTIONS = {
    exp: lambda rng, n: rng.uniform(-87, 88, n),
    log: lambda rng, n: np.exp(rng.uniform(-85, 85, n)),
    rsqrt: lambda rng, n: np.exp(rng.uniform(-85, 85, n)),
}
EXACT = {exp: np.exp, log: np.log, rsqrt: lambda x: 1 / np.sqrt(x)}
# Units in the last place. rsqrt rounds twice: half a unit at last, and what the root's own half becomes.
TOLERANCE = {exp: 1.0, log: 1.0, rsqrt: 1.5}
every_function = pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)


def arguments(rng: np.random.Generator, f: object, n: int) -> np.ndarray:
    return FUNCTIONS[f](rng, n).astype(np.float32)


@every_function
def test_length_and_offset_do_not_show(rng, f):
    x = arguments(rng, f, 1001)
    want = np.asarray(jax.jit(f)(x))
    slices = [slice(start := 7 * n % 50, start + n) for n in range(1, 41)]
    parts = jax.jit(lambda x: [f(x[part]) for part in slices])(x)
    for part, got in zip(slices, parts, strict=True):
        assert_bitwise_equal(got, want[part], f"{part}")


@every_function
def test_the_number_of_rows_does_not_show(rng, f):
    """A loop over rows vectorises in another way than one over elements."""
    x = arguments(rng, f, 64 * 33).reshape(64, 33)
    want = np.asarray(f(x))
    for rows in (1, 2, 31, 32, 63):
        assert_bitwise_equal(jax.jit(f)(x[:rows]), want[:rows], f"{rows} rows")


@every_function
@pytest.mark.parametrize("n", [8, 33, 100_001])
def test_jit_fuses_nothing_into_it(rng, f, n):
    """Products before, sums after, and both equal to one operation at a time."""
    x, a, b = arguments(rng, f, n), rng.uniform(0.5, 1, n).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    assert_bitwise_equal(jax.jit(f)(x), f(x))
    assert_bitwise_equal(jax.jit(lambda x, a, b: f(x * a) + b)(x, a, b), np.asarray(f(x * a)) + b)


@every_function
def test_accuracy(rng, f):
    x = arguments(rng, f, 200_001)
    want = EXACT[f](x.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(f)(x)) - want) / np.spacing(np.abs(want).astype(np.float32))
    assert error.max() <= TOLERANCE[f]


def test_rsqrt_is_two_rounded_steps(rng):
    """The twin is XLA's own, which it would also make of a division by a root."""
    x = arguments(rng, rsqrt, 1001)
    want = np.float32(1) / np.sqrt(x)
    assert_bitwise_equal(jax.jit(rsqrt)(x), want)
    assert (bits(lax.rsqrt(x)) != bits(want)).any()


@pytest.mark.parametrize(
    "f, x, y",
    [
        (exp, [0.0, -0.0, -np.inf, np.inf, -1000.0, 1000.0, 88.73, -87.34], [1, 1, 0, np.inf, 0, np.inf, np.inf, 0]),
        (log, [1.0, 0.0, -0.0, np.inf, -1.0, -np.inf], [0, -np.inf, -np.inf, np.inf, np.nan, np.nan]),
        (rsqrt, [0.0, 1.0, 4.0, np.inf, -1.0], [np.inf, 1, 0.5, 0, np.nan]),
    ],
    ids=["exp", "log", "rsqrt"],
)
def test_special_values(f, x, y):
    np.testing.assert_array_equal(jax.jit(f)(np.float32(x)), np.float32(y))
    assert np.isnan(jax.jit(f)(np.float32([np.nan]))).all()
