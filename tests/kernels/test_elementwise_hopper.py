"""Elementwise stages and row sums of family ``sm90`` against their orders, written again in NumPy.

On a Hopper GPU the kernels run; elsewhere their threads' programs, in NumPy (`simt_numpy`), which round alike.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tbik_jax.contract import Contract
from tbik_jax.dense import Vocabulary, cross_entropy, log_softmax, log_sum_exp
from tbik_jax.emulate import emulate
from tbik_jax.kernels import backend, exact
from tbik_jax.kernels.hopper import formulas, maps, norms, norms_backward, simt, sums
from tbik_jax.kernels.hopper.spec import exp_sum, norm, norm_gradients, rotated, row_sum
from tbik_jax.kernels.norm_rope import norm_rope, norm_rope_gradients_by_leaf
from tbik_jax.kernels.residual import add
from tbik_jax.kernels.rms_norm import add_rms_norm, rms_norm
from tbik_jax.kernels.rope import rope
from tbik_jax.kernels.swiglu import swiglu
from tbik_jax.testing import assert_bitwise_equal
from tbik_jax.tree import schedule
from tests.kernels import families, simt_numpy
from tests.meshes import columns_by_slot, columns_from_slots, mesh_of

#: In NumPy, whose bits no version of JAX changes.
pytestmark = pytest.mark.slow

f32, EPS = np.float32, 1e-5
DTYPES = ("bfloat16", "float16", "float32")


def is_hopper() -> bool:
    with contextlib.suppress(NotImplementedError):
        return backend.family() == "sm90"
    return False


on_the_card = pytest.mark.skipif(
    not is_hopper(), reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)


@pytest.fixture(autouse=True)
def _hopper(request, monkeypatch):
    if not is_hopper():
        families.hopper(monkeypatch)
        jax.clear_caches()
    yield
    if not is_hopper():
        jax.clear_caches()


def exp(x: np.ndarray) -> np.ndarray:
    """The formula's bits, by a kernel without sums."""
    (y,) = maps._each(lambda m, x: (formulas.exp(m, x),), (jnp.asarray(x),), (x,))
    return np.asarray(y)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(f32).astype(dtype)


# Bits --------------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 8, 33, 64, 96, 128, 576, 1000, 2048, 4096, 5120, 16384])
def test_norms_follow_the_documented_order(rng, d, dtype):
    x, y, dy = (normal(rng, 37, d, dtype=dtype) for _ in range(3))
    scale = normal(rng, d, dtype=dtype)
    whole, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=EPS), x, scale)
    assert_bitwise_equal(whole, norm(x, scale, EPS), "forward")
    assert_bitwise_equal(pull(dy), norm_gradients(x, scale, dy, EPS), "backward")
    total = (x.astype(f32) + y.astype(f32)).astype(dtype)
    assert_bitwise_equal(add_rms_norm(x, y, scale, eps=EPS), (total, norm(total, scale, EPS)), "behind a sum")
    for rows in (slice(0, 1), slice(36, 37), slice(5, 22)):
        assert_bitwise_equal(rms_norm(x[rows], scale, eps=EPS), np.asarray(whole)[rows], f"{rows}")


@pytest.fixture(params=["16 rows of a thread", "one row of a thread"])
def rows_of_a_thread(request, monkeypatch):
    """Both ways to the gradients of norms, however many rows there are."""
    monkeypatch.setattr(norms_backward, "_ALONE", 0 if request.param.startswith("16") else 1 << 30)


def turning(rng: np.random.Generator, tokens: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(0, 100, (tokens, d // 2))
    return np.cos(angle).astype(f32), np.sin(angle).astype(f32)


def turned_gradients(x, scale, dy, cos, sin):
    """Of ``[tokens, heads, D]``."""
    back, d = rotated(dy, cos, -sin), x.shape[-1]
    dx, dscale = norm_gradients(x.reshape(-1, d), scale, back.reshape(-1, d), EPS)
    return dx.reshape(x.shape), dscale


@pytest.mark.invariance
@pytest.mark.usefixtures("rows_of_a_thread")
@pytest.mark.parametrize(
    "tokens, d",
    [(1, 40), (15, 40), (16, 40), (17, 40), (513, 40), (1100, 40), (9000, 8), (513, 96), (49, 100), (33, 1100)],
)
def test_the_gradient_of_a_scale_adds_tokens_in_a_tree(rng, tokens, d):
    """Also over more blocks of tokens than one block adds, and where blocks have several rows."""
    x, dy, scale = normal(rng, tokens, d), normal(rng, tokens, d), normal(rng, d)
    dscale = jax.vjp(lambda scale: rms_norm(x, scale, eps=EPS), scale)[1](dy)[0]
    assert_bitwise_equal(dscale, norm_gradients(x, scale, dy, EPS)[1])


@pytest.mark.invariance
@pytest.mark.usefixtures("rows_of_a_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, d", [(1, 4096), (17, 4096), (17, 2048)])
def test_gradients_behind_a_sum(rng, tokens, d, dtype):
    x, y, dy, also = (normal(rng, tokens, d, dtype=dtype) for _ in range(4))
    scale = normal(rng, d, dtype=dtype)
    (total, _), pull = jax.vjp(lambda x, y, scale: add_rms_norm(x, y, scale, eps=EPS), x, y, scale)
    dx, dscale = norm_gradients(np.asarray(total), scale, dy, EPS)
    dx = (dx.astype(f32) + also.astype(f32)).astype(dtype)
    assert_bitwise_equal(pull((also, dy)), (dx, dx, dscale))


@pytest.mark.invariance
@pytest.mark.usefixtures("rows_of_a_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, d", [(1, 1, 1, 64), (17, 3, 1, 128), (19, 32, 8, 128), (513, 5, 1, 64), (5, 5, 2, 256)]
)
def test_gradients_of_queries_and_keys_in_one_step(rng, tokens, heads, kv_heads, d, dtype):
    q, dq = (normal(rng, tokens, heads, d, dtype=dtype) for _ in range(2))
    k, dk = (normal(rng, tokens, kv_heads, d, dtype=dtype) for _ in range(2))
    q_scale, k_scale = normal(rng, d, dtype=dtype), normal(rng, d, dtype=dtype)
    cos, sin = turning(rng, tokens, d)
    pull = jax.vjp(lambda *of: norm_rope(*of, cos, sin, eps=EPS), q, k, q_scale, k_scale)[1]
    want = [turned_gradients(*of, cos, sin) for of in ((q, q_scale, dq), (k, k_scale, dk))]
    assert_bitwise_equal(pull((dq, dk)), (want[0][0], want[1][0], want[0][1], want[1][1]))


@pytest.mark.invariance
@pytest.mark.usefixtures("rows_of_a_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, leaves, heads, d",
    [
        (1, (1, 1), (1, 1), 64),
        (17, (8, 8), (4, 1), 128),
        (513, (3, 1), (1, 2), 64),
        (1030, (2, 1), (2, 1), 64),
        (5, (2, 4), (3, 1), 256),
    ],
)
def test_gradients_of_leaves_are_those_of_leaves_alone(rng, tokens, leaves, heads, d, dtype):
    """Leaves in one step: the rows of a leaf lie apart, its sum is that of its heads alone."""
    cos, sin = turning(rng, tokens, d)
    xs, dys = (
        [normal(rng, tokens, n * h, d, dtype=dtype) for n, h in zip(leaves, heads, strict=True)] for _ in range(2)
    )
    scales = [normal(rng, d, dtype=dtype) for _ in leaves]
    dxs, dscales = norm_rope_gradients_by_leaf(xs, scales, dys, cos, sin, eps=EPS, leaves=leaves)
    for x, dy, scale, count, dx, dscale in zip(xs, dys, scales, leaves, dxs, dscales, strict=True):
        parts = zip(np.split(x, count, 1), np.split(dy, count, 1), strict=True)
        want = [turned_gradients(x, scale.astype(f32), dy, cos, sin) for x, dy in parts]
        assert_bitwise_equal((dx, dscale), (np.concatenate([dx for dx, _ in want], 1), np.stack([s for _, s in want])))


@pytest.mark.invariance
def test_arrays_of_several_dtypes_go_one_by_one(rng):
    cos, sin = turning(rng, 9, 64)
    xs = [normal(rng, 9, 2, 64, dtype=t) for t in ("float32", "bfloat16")]
    dys = [normal(rng, 9, 2, 64, dtype=t) for t in ("bfloat16", "float16")]
    scales = [normal(rng, 64), normal(rng, 64, dtype="bfloat16")]
    found = norm_rope_gradients_by_leaf(xs, scales, dys, cos, sin, eps=EPS, leaves=(2, 1))
    for i, count in enumerate((2, 1)):
        alone = norm_rope_gradients_by_leaf(
            xs[i : i + 1], scales[i : i + 1], dys[i : i + 1], cos, sin, eps=EPS, leaves=[count]
        )
        assert_bitwise_equal([of[i] for of in found], [of[0] for of in alone])
        assert [of[i].dtype for of in found] == [xs[i].dtype, f32]


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, d", [(1, 64), (3, 66), (8, 128), (32, 128), (9, 16)])
def test_rotations_are_products_and_sums(rng, heads, d, dtype):
    x, dy = normal(rng, 19, heads, d, dtype=dtype), normal(rng, 19, heads, d, dtype=dtype)
    angle = rng.uniform(0, 100, (19, d // 2))
    cos, sin = np.cos(angle).astype(f32), np.sin(angle).astype(f32)
    y, pull = jax.vjp(lambda x: rope(x, cos, sin), x)
    assert_bitwise_equal((y, pull(dy)[0]), (rotated(x, cos, sin), rotated(dy, cos, -sin)))


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [True, False], ids=["a row of a thread", "several heads of a thread"])
@pytest.mark.parametrize("heads, kv_heads, d", [(1, 1, 64), (3, 1, 128), (32, 8, 128), (5, 2, 256), (3, 1, 66)])
def test_queries_and_keys_are_normalised_and_turned_in_one_step(rng, monkeypatch, heads, kv_heads, d, few, dtype):
    monkeypatch.setattr(norms, "_FEW", 1 << 30 if few else 0)
    q, k = normal(rng, 19, heads, d, dtype=dtype), normal(rng, 19, kv_heads, d, dtype=dtype)
    q_scale, k_scale = normal(rng, d, dtype=dtype), normal(rng, d, dtype=dtype)
    angle = rng.uniform(0, 100, (19, d // 2))
    cos, sin = np.cos(angle).astype(f32), np.sin(angle).astype(f32)
    want = rotated(norm(q, q_scale, EPS), cos, sin), rotated(norm(k, k_scale, EPS), cos, sin)
    assert_bitwise_equal(norm_rope(q, k, q_scale, k_scale, cos, sin, eps=EPS), want)


@pytest.mark.invariance
def test_queries_and_keys_of_two_dtypes(rng):
    q, k = normal(rng, 3, 2, 64, dtype="bfloat16"), normal(rng, 3, 1, 64)
    scales, (cos, sin) = (normal(rng, 64, dtype="bfloat16"), normal(rng, 64)), turning(rng, 3, 64)
    want = [rotated(norm(x, scale, EPS), cos, sin) for x, scale in zip((q, k), scales, strict=True)]
    assert_bitwise_equal(norms.rms_norm_rope((q, k), scales, cos, sin, EPS), tuple(want))


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 2048), (2, 3, 1000)])
def test_sums_of_residuals(rng, shape, dtype):
    x, y = normal(rng, *shape, dtype=dtype), normal(rng, *shape, dtype=dtype)
    total, pull = jax.vjp(add, x, y)
    assert_bitwise_equal(total, (x.astype(f32) + y.astype(f32)).astype(dtype))
    assert_bitwise_equal(pull(x), (x, x))


@pytest.mark.invariance
@pytest.mark.parametrize("width", [1, 3, 129, 512, 4001, 4097, 18992])
def test_leaves_of_a_vocabulary_follow_the_documented_order(rng, width):
    """Whatever rows and leaves are beside."""
    x = normal(rng, 17, 2, width)
    assert_bitwise_equal(jax.jit(sums.leaf_sums)(x[:3]), row_sum(x[:3], 128, 4), "plain")
    x = 3 * x
    x[2, 1, width // 2 :] = -np.inf
    whole = jax.tree.map(np.asarray, jax.jit(sums.leaf_exp_sums)(x))
    assert_bitwise_equal(whole, exp_sum(x, exp), "exponentials")
    for part in (np.s_[4:5], np.s_[:3], np.s_[:, 1:]):
        assert_bitwise_equal(jax.jit(sums.leaf_exp_sums)(x[part]), tuple(y[part] for y in whole), f"{part}")


@pytest.mark.invariance
@pytest.mark.parametrize("size", [5, 1003, 8 * 129])
def test_the_sum_of_exponentials_is_that_of_one_rank(rng, size):
    logits = 5 * normal(rng, 100, size)  # of which a logarithm hides most differences
    logits[1, : size // 2] = -np.inf  # ranks without a finite entry

    def on_ranks(ranks):
        vocabulary = Vocabulary(size, Contract(), "tp")
        padded = np.pad(logits, [(0, 0), (0, vocabulary.leaves * vocabulary.width - size)], constant_values=np.nan)
        run = emulate(lambda y: log_sum_exp(y, vocabulary), ranks=ranks, in_specs=(P(None, "tp"),), out_specs=P())
        return run(columns_by_slot(padded, schedule(vocabulary.tree, ranks)))

    one = on_ranks(1)
    for ranks in (2, 3, 5):
        assert_bitwise_equal(on_ranks(ranks), one, f"{ranks} ranks")
    exact = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(one, exact, rtol=0, atol=4e-6)


@pytest.mark.invariance
def test_a_vocabulary_of_many_rows_and_of_one(rng):
    vocabulary = Vocabulary(1003, Contract(), None)
    logits, dy = 5 * normal(rng, 9, vocabulary.local_size), normal(rng, 9, vocabulary.local_size)
    labels = rng.integers(0, 1003, 9)

    @jax.jit
    def run(logits, labels, dy):
        y, pull = jax.vjp(lambda x: log_softmax(x, vocabulary), logits)
        loss, back = jax.vjp(lambda x: cross_entropy(x, labels, vocabulary), logits)
        return y, pull(dy)[0], loss, back(jnp.ones_like(loss))[0]

    whole = run(logits, labels, dy)
    for rows in (slice(0, 1), slice(4, 9)):
        part = run(logits[rows], labels[rows], dy[rows])
        assert_bitwise_equal(part, tuple(np.asarray(x)[rows] for x in whole), f"{rows}")
    exact = logits.astype(np.float64)[:, :1003]
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(whole[0])[:, :1003], exact, rtol=0, atol=1e-5)


def pulled(vocabulary, logits, labels, d_log_p, dy):
    """Gradients of log-sum-exp, cross-entropy and log-softmax."""
    return tuple(
        jax.vjp(f, logits)[1](cotangent)[0]
        for f, cotangent in (
            (lambda x: log_sum_exp(x, vocabulary), dy),
            (lambda x: cross_entropy(x, labels, vocabulary), dy),
            (lambda x: log_softmax(x, vocabulary), d_log_p),
        )
    )


def softmax_gradients(vocabulary, logits, labels, d_log_p, dy):
    """The same, of one rank, by their formulas from the log-sum-exp and from the sums of cotangents."""
    total = np.asarray(jax.jit(log_sum_exp, static_argnums=1)(logits, vocabulary))[:, None]
    leaves = row_sum(d_log_p.reshape(len(d_log_p), vocabulary.leaves, -1), 128, 4)
    d_total = vocabulary.tree.reduce(list(leaves.T), np.add)[:, None]
    y, known = logits.astype(f32) - total, (labels >= 0) & (labels < vocabulary.size)
    p, hit = exp(y), labels[:, None] == np.arange(logits.shape[1])
    d_entropy = np.where(hit, p - f32(1), p) * np.where(known, dy, f32(0))[:, None]
    return tuple(x.astype(logits.dtype) for x in (p * dy[:, None], d_entropy, d_log_p - p * d_total))


@pytest.mark.invariance
@pytest.mark.parametrize(
    "leaves, size, dtype",
    [
        (1, 1, "float32"),
        (1, 9, "bfloat16"),
        *((1, 1001, dtype) for dtype in DTYPES),
        (1, 2050, "float16"),
        (1, 4100, "float32"),
        (8, 4096, "bfloat16"),
        (8, 8 * 1028, "float32"),
    ],
)
def test_gradients_of_softmax_are_their_formulas(rng, leaves, size, dtype):
    """However wide an access may be, and whatever rows are beside; labels of all rows, of none, outside."""
    vocabulary = Vocabulary(size, Contract(leaves=leaves), None)
    assert vocabulary.local_size == size
    logits = (5 * normal(rng, 5, size)).astype(dtype)
    labels = np.array([0, size - 1, size // 2, -100, size])
    values = logits, labels, normal(rng, 5, size), normal(rng, 5)
    run = partial(pulled, vocabulary)
    whole = jax.jit(run)(*values)
    assert_bitwise_equal(whole, softmax_gradients(vocabulary, *values))
    part = jax.jit(run)(*(x[2:4] for x in values))
    assert_bitwise_equal(part, tuple(np.asarray(x)[2:4] for x in whole), "some rows")
    one_by_one = jax.jit(jax.vmap(run))(*(x[:, None] for x in values))
    assert_bitwise_equal(tuple(np.asarray(x)[:, 0] for x in one_by_one), whole, "under vmap")


@pytest.mark.invariance
@pytest.mark.parametrize("size, dtype", [(5, "float32"), (1003, "float32"), (1003, "bfloat16"), (8 * 129, "float32")])
def test_gradients_of_softmax_are_those_of_one_rank(rng, size, dtype):
    """Entries that are no token hold NaN, and their gradients are zero."""
    logits, d_log_p = (5 * normal(rng, 4, size)).astype(dtype), normal(rng, 4, size)
    labels, dy = np.array([0, size - 1, size // 2, -100]), normal(rng, 4)

    def on_ranks(ranks):
        vocabulary = Vocabulary(size, Contract(), "tp")
        plan = schedule(vocabulary.tree, ranks)
        extra = [(0, 0), (0, vocabulary.leaves * vocabulary.width - size)]
        columns = [np.pad(x, extra, constant_values=np.nan) for x in (logits, d_log_p)]
        y, d = (columns_by_slot(x, plan) for x in columns)
        split = P(None, "tp")
        lie = {"in_specs": (split, P(), split, P()), "out_specs": (split,) * 3}
        run = jax.jit(emulate(partial(pulled, vocabulary), ranks=ranks, **lie))
        found = [np.asarray(x) for x in run(y, labels, d, dy)]
        for x in found:
            np.testing.assert_array_equal(np.where(np.isnan(y.astype(f32)), x, 0), 0)
        return tuple(columns_from_slots(x, plan)[:, :size] for x in found)

    one = on_ranks(1)
    if size == 8 * 129:
        assert_bitwise_equal(one, softmax_gradients(Vocabulary(size, Contract(), None), logits, labels, d_log_p, dy))
    for ranks in (3, 4):
        assert_bitwise_equal(on_ranks(ranks), one, f"{ranks} ranks")


# Values ------------------------------------------------------------------------------------------------------------------


def test_exp_is_accurate(rng):
    """The formula, with an exp2 that is off by 2**-22 as the instruction may be."""

    class Worst(simt_numpy.Machine):
        def exp2(self, x):
            return super().exp2(x) * f32(1 + 2.0**-22)

    machine, x = Worst(1000), rng.uniform(-87, 88, (1000, simt.THREADS)).astype(f32)
    error = np.abs(formulas.exp(machine, x) / np.exp(x.astype(np.float64)) - 1)
    assert error.max() < 2.0**-21
    far = np.broadcast_to(f32([-np.inf, -1000, -88, 0, np.inf, np.nan, 1000, 1]), (16, 8)).reshape(1, -1)
    y = formulas.exp(simt_numpy.Machine(1), far)[0, :8]
    np.testing.assert_array_equal(y[[0, 1, 2, 3]], [0, 0, 0, 1])
    assert np.isfinite(y[[4, 6]]).all() and np.isnan(y[5])


@pytest.mark.parametrize("width", [1, 3, 129, 4097, 18992])
def test_sums_of_exponentials_are_accurate(rng, width):
    """Within 2**-19; where the maximum rises all the time, and sums are multiplied as often, within 2**-17."""
    x = normal(rng, 3, 6, width)
    x *= f32([[1], [3], [3], [1e4], [1e-3], [3]])
    x[:, 2] += f32(1e4)
    x[:, 2, 1::3] = -np.inf
    x[:, 4:].sort()
    m, total = map(np.asarray, jax.jit(sums.leaf_exp_sums)(x))
    np.testing.assert_array_equal(m, x.max(-1))
    want = np.exp(x.astype(np.float64) - m[..., None]).sum(-1)
    np.testing.assert_allclose(total[:, :4], want[:, :4], rtol=2.0**-19)
    np.testing.assert_allclose(total[:, 4:], want[:, 4:], rtol=2.0**-17)


def test_extreme_logits():
    """A leaf without an entry adds nothing; an entry alone is its own log-sum-exp; what is no number stays in its row."""
    largest, inf, nan = np.finfo(f32).max, np.inf, np.nan
    rows = np.full((10, 4099), -inf, f32)
    rows[0, 4098] = rows[1, 2050] = 1e4
    rows[2, 0], rows[3, 7] = -1e4, -largest
    rows[4, :] = -largest
    rows[5, :], rows[5, 3000] = -1e4, 1e4
    rows[6, 5:9] = largest, -largest, 0, 1
    rows[7, 4000], rows[8, 4000] = nan, inf
    vocabulary = Vocabulary(4099, Contract(), None)
    logits = np.pad(rows, [(0, 0), (0, vocabulary.local_size - 4099)])
    got = np.asarray(log_sum_exp(logits, vocabulary))
    np.testing.assert_array_equal(got[:7], f32([1e4, 1e4, -1e4, -largest, -largest, 1e4, largest]))
    np.testing.assert_array_equal(got[7:], [nan, nan, -inf])
    m, total = jax.jit(sums.leaf_exp_sums)(rows)
    np.testing.assert_array_equal(total, f32([1, 1, 1, 1, 4099, 1, 1, nan, nan, 0]))
    np.testing.assert_array_equal(m[-3:], [nan, inf, -largest])


@pytest.mark.parametrize("dtype, last", [("bfloat16", 2.0**-8), ("float16", 2.0**-11), ("float32", 2.0**-24)])
def test_gradients_of_softmax_are_accurate(rng, dtype, last):
    """A difference of logits is rounded to 24 bits, an exponential is within 2**-21, a result is rounded at the end."""
    vocabulary = Vocabulary(8000, Contract(), None)
    logits, labels = (5 * normal(rng, 9, 8000)).astype(dtype), rng.integers(0, 8000, 9)
    d_log_p, dy = normal(rng, 9, 8000), normal(rng, 9)
    found = jax.jit(partial(pulled, vocabulary))(logits, labels, d_log_p, dy)
    y = logits.astype(np.float64) - np.asarray(log_sum_exp(logits, vocabulary))[:, None].astype(np.float64)
    p, onehot, scale = np.exp(y), labels[:, None] == np.arange(8000), dy[:, None].astype(np.float64)
    total = d_log_p.sum(-1, keepdims=True, dtype=np.float64)
    want = p * scale, (p - onehot) * scale, d_log_p - p * total
    of_p = (2.0**-21 + 2.0**-24 * np.abs(y)) * p
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    # Of the sum of cotangents, and where a difference is rounded before the end.
    beside = 0, 2.0**-24 * np.abs(want[1]), 1e-5 * p + 2.0**-24 * np.abs(p * total)
    for x, y, factor, more in zip(found, want, (scale, scale, total), beside, strict=True):
        error = np.abs(np.asarray(x).astype(np.float64) - y)
        assert (error <= 1.01 * (of_p * np.abs(factor) + more + (last + 2.0**-24) * np.abs(y)) + smallest / 2).all()


def test_gradients_at_extreme_logits():
    """An entry alone has all; what is no number makes a row NaN; -inf has no part. Numbers that are small stay."""
    vocabulary, inf, nan = Vocabulary(4099, Contract(), None), np.inf, np.nan
    rows = np.full((7, 4099), -inf, f32)
    rows[0, 4098], rows[1, :2] = 1e4, (-1e4, 1e4)
    rows[2, :2] = 0, -86
    rows[3, 7], rows[4, 4098] = nan, inf
    rows[5, :] = 0
    logits = np.pad(rows, [(0, 0), (0, vocabulary.local_size - 4099)], constant_values=nan)
    labels, ones = np.array([4098, 1, 0, 0, 0, 5, 0]), np.ones(7, f32)
    d_log_p = np.full(logits.shape, 2, f32)
    d_total, d_entropy, d_log_softmax = map(
        np.asarray, jax.jit(partial(pulled, vocabulary))(logits, labels, d_log_p, ones)
    )
    want = np.zeros((3, vocabulary.local_size), f32)
    want[0, 4098] = want[1, 1] = want[2, 0] = 1
    want[2, 1] = exp(f32([-86]))[0]
    np.testing.assert_array_equal(d_total[:3], want)
    want[[0, 1, 2], labels[:3]] -= 1
    np.testing.assert_array_equal(d_entropy[:3], want)
    np.testing.assert_allclose(d_total[5, :4099], 1 / 4099, rtol=2.0**-20)
    np.testing.assert_array_equal(d_total[5, 4099:], 0)
    np.testing.assert_array_equal(d_log_softmax[0], 0)  # the only entry's own 2, less all of it
    np.testing.assert_allclose(d_log_softmax[5, :4099], 0, atol=1e-5)
    for x in (d_total, d_entropy):
        assert np.isnan(x[[3, 4, 6]]).all()


@pytest.mark.parametrize("dtype, last", [("bfloat16", 2.0**-8), ("float16", 2.0**-11), ("float32", 2.0**-20)])
def test_swiglu_is_accurate(rng, dtype, last):
    gate, up = (4 * normal(rng, 9, 1000)).astype(dtype), normal(rng, 9, 1000, dtype=dtype)
    g, u = gate.astype(np.float64), up.astype(np.float64)
    error = np.abs(np.asarray(swiglu(gate, up)).astype(np.float64) - g / (1 + np.exp(-g)) * u)
    assert (error <= 1.01 * last * np.abs(g / (1 + np.exp(-g)) * u) + 1e-7).all()


# Types and errors --------------------------------------------------------------------------------------------------------


def test_results_vary_over_the_mesh_as_arguments_do():
    seen = []

    def run(x, scale):
        y, _ = jax.vjp(lambda *v: rms_norm(*v, eps=EPS), x, scale)
        seen.extend([jax.typeof(y), jax.typeof(rms_norm(scale, scale, eps=EPS))])
        return y

    mesh = mesh_of(min(2, jax.device_count()))  # one GPU is enough for the types
    jax.eval_shape(
        jax.shard_map(run, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp")), jnp.ones((4, 8)), jnp.ones(8)
    )
    assert [set(t.manual_axis_type.varying) for t in seen] == [{"tp"}, set()]


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(NotImplementedError, match=r"swiglu: 2 problems(.|\n)*argument 0 is int32"):
        swiglu(jnp.ones(8, jnp.int32), jnp.ones(8, jnp.int32))
    with pytest.raises(NotImplementedError, match="rows of 16385 elements"):
        rms_norm(jnp.ones((1, 16385)), jnp.ones(16385), eps=EPS)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\) and y \(3,\)"):
        add(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape):
    x, scale = jnp.ones(shape), jnp.ones(8)
    y, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, eps=EPS), x, scale)
    assert y.shape == shape
    np.testing.assert_array_equal(pull(y)[1], 0)
    assert swiglu(x, x).shape == shape
    vocabulary = Vocabulary(8, Contract(), None)
    of_rows = jnp.zeros(shape[:-1])
    found = pulled(vocabulary, x, of_rows.astype(jnp.int32), x, of_rows)
    assert [y.shape for y in found] == [shape] * 3


# The card's own ----------------------------------------------------------------------------------------------------------


@on_the_card
@pytest.mark.gpu
@pytest.mark.invariance
def test_many_rows_are_rows_alone(rng):
    """Whole grids of blocks; 8192 rows against some of them."""
    x, y = normal(rng, 8192, 4096, dtype="bfloat16"), normal(rng, 8192, 4096, dtype="bfloat16")
    scale = normal(rng, 4096, dtype="bfloat16")

    def run(x, y):
        return *add_rms_norm(x, y, scale, eps=EPS), swiglu(x, y), *jax.vjp(swiglu, x, y)[1](x)

    whole = jax.jit(run)(x, y)
    for rows in (slice(0, 1), slice(8191, 8192), slice(100, 117), slice(4000, 5024)):
        assert_bitwise_equal(jax.jit(run)(x[rows], y[rows]), tuple(np.asarray(v)[rows] for v in whole), f"{rows}")


@on_the_card
@pytest.mark.gpu
@pytest.mark.invariance
def test_many_leaves_are_leaves_alone(rng):
    """Logits that fill the device, and their log-sum-exp, against those of few rows, and of one leaf."""
    vocabulary = Vocabulary(151936, Contract(), None)
    logits = 4 * normal(rng, 1024, 151936)

    def run(logits):
        return *sums.leaf_exp_sums(logits.reshape(-1, 8, 18992)), log_sum_exp(logits, vocabulary)

    whole = [np.asarray(v) for v in jax.jit(run)(logits)]
    for rows in (slice(0, 1), slice(1023, 1024), slice(100, 103), slice(500, 517)):
        assert_bitwise_equal(jax.jit(run)(logits[rows]), tuple(v[rows] for v in whole), f"{rows}")
    leaf = jax.jit(sums.leaf_exp_sums)(logits[:17, None, 3 * 18992 : 4 * 18992])
    assert_bitwise_equal(leaf, tuple(v[:17, 3:4] for v in whole[:2]), "one leaf")
    assert_bitwise_equal(leaf, exp_sum(logits[:17, None, 3 * 18992 : 4 * 18992], exp), "documented order")


@on_the_card
@pytest.mark.gpu
@pytest.mark.invariance
@pytest.mark.parametrize("tokens, d", [(8192, 4096), (8191, 4096), (64, 4096), (1, 4096), (2048, 576), (8192, 16384)])
def test_gradients_of_many_rows_and_of_few(rng, monkeypatch, tokens, d):
    """Both ways, and rows alone; the scale's against the specification."""
    x, dy, also = (normal(rng, tokens, d, dtype="bfloat16") for _ in range(3))
    scale = normal(rng, d, dtype="bfloat16")

    def run(x, dy, also):
        return *norms_backward.rms_norm_gradients(x, scale, dy, EPS), norms_backward.rms_norm_gradients(
            x, scale, dy, EPS, also
        )[0]

    found = []
    for most in (0, norms_backward._ALONE, 1 << 30):
        monkeypatch.setattr(norms_backward, "_ALONE", most)
        found.append(jax.tree.map(np.asarray, jax.jit(lambda *of: run(*of))(x, dy, also)))
    assert_bitwise_equal(found[0], found[1])
    assert_bitwise_equal(found[1], found[2])
    monkeypatch.undo()
    for rows in (slice(0, 1), slice(tokens // 2, tokens // 2 + 17)):
        dx, _, both = jax.jit(lambda *of: run(*of))(x[rows], dy[rows], also[rows])
        assert_bitwise_equal((dx, both), (found[0][0][rows], found[0][2][rows]), f"{rows}")
    assert_bitwise_equal(found[0][1], norm_gradients(x, scale, dy, EPS)[1])


@on_the_card
@pytest.mark.gpu
@pytest.mark.invariance
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens, d", [(8192, 128), (513, 128), (64, 128), (1, 128), (1025, 64), (1025, 256)])
def test_gradients_of_heads_at_once_and_leaf_by_leaf(rng, monkeypatch, tokens, d, dtype):
    """Of 32 query heads and 8 KV heads: all in one call, both ways, against one leaf after another."""
    leaves, cos, sin = (8, 8), *turning(rng, tokens, d)
    xs, dys = ([normal(rng, tokens, heads, d, dtype=dtype) for heads in (32, 8)] for _ in range(2))
    scales = [normal(rng, d, dtype=dtype) for _ in leaves]
    alone = jax.jit(lambda *of: norm_rope_gradients_by_leaf(*([x] for x in of), cos, sin, eps=EPS, leaves=[1]))
    want = []
    for x, scale, dy in zip(xs, scales, dys, strict=True):
        each = [alone(x, scale.astype(f32), dy) for x, dy in zip(np.split(x, 8, 1), np.split(dy, 8, 1), strict=True)]
        want.append((np.concatenate([dx for (dx,), _ in each], 1), np.concatenate([dscale for _, (dscale,) in each])))
    for most in (0, norms_backward._ALONE, 1 << 30):
        monkeypatch.setattr(norms_backward, "_ALONE", most)
        run = jax.jit(lambda xs, dys: norm_rope_gradients_by_leaf(xs, scales, dys, cos, sin, eps=EPS, leaves=leaves))
        found = run(xs, dys)
        assert_bitwise_equal(found, tuple(zip(*want, strict=True)), f"up to {most} blocks")
    whole = turned_gradients(xs[1][:, :1], scales[1].astype(f32), dys[1][:, :1], cos, sin)
    assert_bitwise_equal((found[0][1][:, :1], found[1][1][0]), whole, "the specification")


@on_the_card
@pytest.mark.gpu
def test_flags_that_change_bits_are_refused():
    """Twin of the self-test in this process, which passes."""
    program = "from tbik_jax.kernels import exact; exact.self_test(); print('computed')"
    flags = {"XLA_FLAGS": "--xla_gpu_ftz=true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **flags}, capture_output=True, text=True, check=False
    )
    assert "SelfTestError" in done.stderr and "become zero" in done.stderr and "computed" not in done.stdout
    exact.self_test()
