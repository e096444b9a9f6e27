"""Sums of rows that belong together: the documented tree written in NumPy, and nothing else shows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract
from tbik_jax.dense import Vocabulary, embedding, vocabulary
from tbik_jax.kernels.segment_sum import tree_segment_sum
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import schedule
from tests.dense.test_vocabulary import table_by_slot, table_from_slots
from tests.meshes import mesh_of

pytestmark = pytest.mark.invariance

SEGMENTS = 7


def pairwise(rows: list[np.ndarray]) -> np.ndarray:
    while len(rows) > 1:
        rows = [rows[i] + rows[i + 1] if i + 1 < len(rows) else rows[i] for i in range(0, len(rows), 2)]
    return rows[0]


def wanted(x: np.ndarray, ids: np.ndarray, segments: int) -> np.ndarray:
    y = np.zeros((segments, x.shape[1]), np.float32)
    for s in range(segments):
        if rows := [row for row, of in zip(x, ids, strict=True) if of == s]:
            y[s] = pairwise(rows) + np.float32(0)
    return y


def case(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments of very different lengths, one of them empty; rows before the first and behind the last."""
    ids = rng.choice([-1, 0, 1, 2, 3, 5, 6, 7, 100], rows, p=[0.05, 0.4, 0.2, 0.1, 0.1, 0.05, 0.03, 0.03, 0.04])
    return rng.standard_normal((rows, 33), np.float32), ids


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 9, 65, 257, 1000])
def test_the_documented_tree(rng, rows):
    x, ids = case(rng, rows)
    want = wanted(x, ids, SEGMENTS)
    for run in (tree_segment_sum, jax.jit(tree_segment_sum, static_argnums=2)):
        assert_bitwise_equal(run(x, ids, SEGMENTS), want)


def test_other_rows_do_not_show(rng):
    """The rows of segment 0, then among others, in front and behind; and beside much longer segments."""
    run = jax.jit(tree_segment_sum, static_argnums=2)
    x, ids = case(rng, 300)
    own = x[ids == 0]
    alone = run(own, np.zeros(len(own), int), 1)[0]
    assert_bitwise_equal(run(x, ids, SEGMENTS)[0], alone)
    longer, others = np.concatenate([x[::-1], x, x]), np.concatenate([ids[::-1] + 1, ids, np.full(300, 4)])
    longer[: len(ids)][others[: len(ids)] == 0] = 0
    others[: len(ids)][others[: len(ids)] == 0] = 3
    assert_bitwise_equal(run(longer, others, SEGMENTS)[0], alone)
    several = jax.vmap(partial(tree_segment_sum, num_segments=SEGMENTS))(np.stack([x, x + 1]), np.stack([ids, ids]))
    assert_bitwise_equal(several[0, 0], alone)


def test_twin_a_plain_segment_sum_is_another(rng):
    """One row after another, where XLA has one thread; in the order of the moment, where it has atomics."""
    x, ids = case(rng, 300)
    plain = jax.jit(partial(jax.ops.segment_sum, num_segments=SEGMENTS))(x, ids)
    assert (bits(plain) != bits(wanted(x, ids, SEGMENTS))).any()


def test_zeros_and_what_is_not_finite():
    x = np.float32([[-0.0, 1.0, np.inf, np.nan], [-0.0, -1.0, -np.inf, 1.0], [-0.0, 2.0, np.inf, 1.0]])
    got = np.asarray(tree_segment_sum(x, np.array([0, 0, 2]), 3))
    assert not np.signbit(got[:, 0]).any() and not np.signbit(got[0, 1])
    assert got[0, 1] == 0 and np.isnan(got[0, 2:]).all()
    assert not got[1].any()
    assert got[2, 2] == np.inf


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_an_embedding_as_hopper_adds_it(rng, monkeypatch, ranks, dtype):
    """Program and bits of the card's family, on a mesh of virtual devices."""
    monkeypatch.setattr(vocabulary.backend, "family", lambda: "sm90")
    of = Vocabulary(259, Contract(), "tp")
    plan = schedule(of.tree, ranks)
    tokens = rng.choice([0, 3, 3, 3, 77, 258, 259, -1], (5, 41))
    table, dy = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in ((259, 24), (5, 41, 24)))

    def gradient(table, dy):
        return jax.vjp(lambda table: embedding(tokens, table, of), table)[1](dy)[0]

    specs = {"in_specs": (P("tp"), P()), "out_specs": P("tp")}
    got = jax.jit(jax.shard_map(gradient, mesh=mesh_of(ranks), **specs))(table_by_slot(table, of, plan), dy)
    want = wanted(dy.reshape(-1, 24).astype(np.float32), tokens.reshape(-1), 259).astype(table.dtype)
    assert_bitwise_equal(table_from_slots(got, of, plan), want)


def test_accuracy(rng):
    """Against float64: a sum of n numbers of size one errs by half a unit at each of its log2(n) steps."""
    x, ids = case(rng, 1000)
    exact = np.zeros((SEGMENTS, x.shape[1]))
    size = np.zeros_like(exact)
    for row, of in zip(x.astype(np.float64), ids, strict=True):
        if 0 <= of < SEGMENTS:
            exact[of] += row
            size[of] += np.abs(row)
    got = np.asarray(tree_segment_sum(x, ids, SEGMENTS))
    assert (np.abs(got - exact) <= 10 * 2.0**-24 * size).all()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU; the default backend is not one")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embeddings_gradient_on_a_card(rng, dtype):
    of = Vocabulary(1000, Contract(), None)
    tokens = (1000 * rng.random(4097) ** 4).astype(int)  # some of them often
    table, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((1000, 576), (4097, 576)))
    run = jax.jit(lambda table, dy: jax.vjp(lambda table: embedding(tokens, table, of), table)[1](dy)[0])
    want = wanted(np.asarray(dy, np.float32), tokens, 1000).astype(table.dtype)
    assert_bitwise_equal(run(table, dy), want)
    assert_bitwise_equal(run(table, dy), want, "again")
