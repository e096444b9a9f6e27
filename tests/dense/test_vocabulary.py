"""What is split over the vocabulary: on any mesh the bits of the same formulas written in NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, emulate
from tbik_jax.dense import (
    Vocabulary,
    cross_entropy,
    embedding,
    gather_logits,
    log_softmax,
    log_sum_exp,
    logits,
    mask_logits,
    pack,
)
from tbik_jax.kernels.elementary import exp, log
from tbik_jax.kernels.matmul import cpu, spec
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import Schedule, schedule
from tests.meshes import by_slot, columns_by_slot, columns_from_slots, from_slots, mesh_of

CONTRACT = Contract(leaves=8)
DIM = 24


# What the bits must be: the whole vocabulary, padded to whole leaves -------------------------------------------------


def padded(x: np.ndarray, vocabulary: Vocabulary, fill: float, axis: int = 0) -> np.ndarray:
    """Entries behind the end of the vocabulary, up to whole leaves."""
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, vocabulary.leaves * vocabulary.width - vocabulary.size)
    return np.pad(x, extra, constant_values=fill)


def leaf(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return spec.leaf_product(x.astype(np.float32), w.astype(np.float32), cpu.K_STEP)


def over_the_vocabulary(x: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """``[M, leaves * width]`` summed over the vocabulary: by halving inside a leaf, then the canonical tree."""
    by_leaf = x.reshape(len(x), vocabulary.leaves, vocabulary.width)
    while (n := by_leaf.shape[-1]) > 1:
        half = n // 2
        total = by_leaf[..., :half] + by_leaf[..., n - half :]
        by_leaf = np.concatenate([total, by_leaf[..., half : n - half]], axis=-1)
    return vocabulary.tree.reduce(list(by_leaf[..., 0].T), np.add)


def wanted(
    vocabulary: Vocabulary,
    tokens: np.ndarray,
    table: np.ndarray,
    hidden: np.ndarray,
    labels: np.ndarray,
    dy: np.ndarray,
    d_log_p: np.ndarray,
    d_loss: np.ndarray,
) -> dict[str, np.ndarray]:
    """Tokens and labels ``[M]``, ``table [V, D]``, ``hidden [M, D]``; cotangents of embedding, log-softmax and loss."""
    y = padded(leaf(hidden, table), vocabulary, -np.inf, 1)
    top = y.max(-1)
    total = top + np.asarray(log(over_the_vocabulary(np.asarray(exp(y - top[:, None])), vocabulary)))
    log_p = y - total[:, None]

    d_log_p = padded(d_log_p, vocabulary, 0.0, 1)
    d_logits = d_log_p - np.asarray(exp(log_p)) * over_the_vocabulary(d_log_p, vocabulary)[:, None]

    known = (labels >= 0) & (labels < vocabulary.size)
    onehot = labels[:, None] == np.arange(y.shape[1])
    p = np.asarray(exp(y - total[:, None]))
    d_ce_logits = np.where(onehot, p - 1, p) * np.where(known, d_loss, 0)[:, None]
    by_leaf = zip(
        np.split(d_ce_logits, vocabulary.leaves, 1),
        np.split(padded(table, vocabulary, 0.0), vocabulary.leaves),
        strict=True,
    )
    d_hidden = vocabulary.tree.reduce([leaf(d, w.T) for d, w in by_leaf], np.add)

    in_vocabulary = (tokens >= 0) & (tokens < vocabulary.size)
    d_table = np.zeros(table.shape, np.float32)
    for token, row in zip(tokens, dy.astype(np.float32), strict=True):
        if 0 <= token < vocabulary.size:
            d_table[token] = d_table[token] + row

    end = vocabulary.size
    return {
        "embedding": np.where(in_vocabulary[:, None], table[np.where(in_vocabulary, tokens, 0)], 0).astype(table.dtype),
        "d_table": d_table.astype(table.dtype),
        "logits": y[:, :end],
        "log_sum_exp": total,
        "d_lse_logits": (p * d_loss[:, None])[:, :end],
        "log_p": log_p[:, :end],
        "d_logits": d_logits[:, :end],
        "loss": np.where(known, total - np.take_along_axis(y, np.where(known, labels, 0)[:, None], 1)[:, 0], 0),
        "d_hidden": d_hidden.astype(hidden.dtype),
        "d_head": leaf(d_ce_logits.T, hidden.T)[:end].astype(table.dtype),
    }


def inputs(rng: np.random.Generator, size: int, m: int, dtype: Any = np.float32) -> list[np.ndarray]:
    tokens, labels = rng.integers(0, size, (2, m))
    tokens[-1], labels[-1] = size - 1, size - 1  # the last entry, in a ragged leaf
    if m > 2:
        tokens[1], labels[1] = tokens[0], -100  # one row twice; a label that is to be ignored
    if m > 3:
        tokens[2], labels[2] = size, size  # the first entry that is none
    table = rng.standard_normal((size, DIM)).astype(dtype)
    table[:, 0] = -0.0
    hidden, dy = rng.standard_normal((2, m, DIM)).astype(dtype)
    d_log_p = rng.standard_normal((m, size)).astype(np.float32)
    return [tokens, table, hidden, labels, dy, d_log_p, rng.standard_normal(m).astype(np.float32)]


# On a mesh -----------------------------------------------------------------------------------------------------------


def table_by_slot(table: np.ndarray, vocabulary: Vocabulary, plan: Schedule) -> np.ndarray:
    """``[ranks * slots * width, D]``: zeros behind the end of the vocabulary, NaN in slots that nobody reads."""
    rows = padded(table, vocabulary, 0.0).reshape(vocabulary.leaves, vocabulary.width, -1)
    return by_slot(rows, plan).reshape(-1, table.shape[1])


def table_from_slots(table: jax.Array, vocabulary: Vocabulary, plan: Schedule) -> np.ndarray:
    rows = np.asarray(table).reshape(-1, vocabulary.width, table.shape[-1])
    return from_slots(rows, plan).reshape(-1, table.shape[-1])[: vocabulary.size]


def on_every_rank(vocabulary: Vocabulary, tokens, table, hidden, labels, dy, d_log_p, d_loss) -> dict[str, jax.Array]:
    """The whole of it as one rank sees it; gradients taken inside ``shard_map``."""
    y = logits(hidden, table, vocabulary)
    rows, pull_rows = jax.vjp(lambda table: embedding(tokens, table, vocabulary), table)
    log_p, pull_log_p = jax.vjp(lambda y: log_softmax(y, vocabulary), y)
    loss, pull_loss = jax.vjp(
        lambda hidden, table: cross_entropy(logits(hidden, table, vocabulary), labels, vocabulary), hidden, table
    )
    total, pull_total = jax.vjp(lambda y: log_sum_exp(y, vocabulary), y)
    d_hidden, d_head = pull_loss(d_loss)
    return {
        "embedding": rows,
        "d_table": pull_rows(dy)[0],
        "logits": gather_logits(y, vocabulary),
        "log_sum_exp": total,
        "d_lse_logits": pull_total(d_loss)[0],
        "log_p": log_p,
        "d_logits": pull_log_p(d_log_p)[0],
        "loss": loss,
        "d_hidden": d_hidden,
        "d_head": d_head,
    }


COLUMNS, ROWS, WHOLE = P(None, "tp"), P("tp"), P()
OUT = {
    "embedding": WHOLE,
    "d_table": ROWS,
    "logits": WHOLE,
    "log_sum_exp": WHOLE,
    "d_lse_logits": COLUMNS,
    "log_p": COLUMNS,
    "d_logits": COLUMNS,
    "loss": WHOLE,
    "d_hidden": WHOLE,
    "d_head": ROWS,
}


def sharded(f: Any, ranks: int, in_specs: Any, out_specs: Any, check_vma: bool = True) -> Any:
    return jax.shard_map(f, mesh=mesh_of(ranks), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


@pytest.mark.invariance
@pytest.mark.parametrize(
    "size, ranks, m, dtype",
    [
        (259, 1, 3, "float32"),
        pytest.param(259, 2, 8, "bfloat16", marks=pytest.mark.slow),
        (263, 3, 3, "float32"),
        pytest.param(259, 4, 1, "float32", marks=pytest.mark.slow),
        pytest.param(259, 5, 8, "float32", marks=pytest.mark.slow),
        (263, 6, 3, "bfloat16"),
        pytest.param(263, 7, 8, "float32", marks=pytest.mark.slow),
        pytest.param(256, 8, 3, "float32", marks=pytest.mark.slow),
        pytest.param(
            9, 7, 3, "float32", marks=pytest.mark.slow
        ),  # leaves of two entries: the last three are empty, and so is one rank
        (5, 3, 8, "float32"),  # fewer entries than the contract has leaves
    ],
)
def test_any_mesh_forward_and_backward(rng, size, ranks, m, dtype):
    vocabulary = Vocabulary(size, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    tokens, table, hidden, labels, dy, d_log_p, d_loss = values = inputs(rng, size, m, dtype)
    in_specs = (WHOLE, ROWS, WHOLE, WHOLE, WHOLE, COLUMNS, WHOLE)
    got = jax.jit(sharded(partial(on_every_rank, vocabulary), ranks, in_specs, OUT))(
        tokens,
        table_by_slot(table, vocabulary, plan),
        hidden,
        labels,
        dy,
        columns_by_slot(padded(d_log_p, vocabulary, 0.0, 1), plan),
        d_loss,
    )
    for name, where in OUT.items():
        if where == ROWS:
            got[name] = table_from_slots(got[name], vocabulary, plan)
        if where == COLUMNS:
            got[name] = columns_from_slots(got[name], plan)[:, :size]
    assert_bitwise_equal(got, wanted(vocabulary, *values))


@pytest.mark.invariance
@pytest.mark.parametrize("size, m", [(259, 1), (259, 8), (9, 3)])
def test_one_device_without_an_axis(rng, size, m):
    vocabulary = Vocabulary(size, CONTRACT, None)
    tokens, table, hidden, labels, dy, d_log_p, d_loss = values = inputs(rng, size, m)
    got = jax.jit(partial(on_every_rank, vocabulary))(
        tokens, padded(table, vocabulary, 0.0), hidden, labels, dy, padded(d_log_p, vocabulary, 0.0, 1), d_loss
    )
    for name, where in OUT.items():
        if where == ROWS:
            got[name] = got[name][:size]
        if where == COLUMNS:
            got[name] = got[name][:, :size]
    assert_bitwise_equal(got, wanted(vocabulary, *values))


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_gradients_taken_around_shard_map(rng, ranks):
    """Tied embedding and head: the gradient of one table is the sum of both."""
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    tokens, table, hidden, labels, dy, _, d_loss = values = inputs(rng, 259, 8)

    def local(tokens, table, hidden, labels):
        return embedding(tokens, table, vocabulary), cross_entropy(
            logits(hidden, table, vocabulary), labels, vocabulary
        )

    whole = sharded(local, ranks, (WHOLE, ROWS, WHOLE, WHOLE), WHOLE)

    @jax.jit
    def gradients(tokens, table, hidden, labels, dy, d_loss):
        return jax.vjp(lambda table, hidden: whole(tokens, table, hidden, labels), table, hidden)[1]((dy, d_loss))

    d_table, d_hidden = gradients(tokens, table_by_slot(table, vocabulary, plan), hidden, labels, dy, d_loss)
    want = wanted(vocabulary, *values)
    assert_bitwise_equal(d_hidden, want["d_hidden"])
    assert_bitwise_equal(table_from_slots(d_table, vocabulary, plan), want["d_table"] + want["d_head"])


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [2, 3])
def test_without_the_check_of_varying_axes(rng, ranks):
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    tokens, table, hidden, labels, *_ = values = inputs(rng, 259, 4)

    def forward(tokens, table, hidden, labels):
        y = logits(hidden, table, vocabulary)
        loss = cross_entropy(y, labels, vocabulary)
        return embedding(tokens, table, vocabulary), gather_logits(log_softmax(y, vocabulary), vocabulary), loss

    run = jax.jit(sharded(forward, ranks, (WHOLE, ROWS, WHOLE, WHOLE), WHOLE, check_vma=False))
    want = wanted(vocabulary, *values)
    got = run(tokens, table_by_slot(table, vocabulary, plan), hidden, labels)
    assert_bitwise_equal(got, (want["embedding"], want["log_p"], want["loss"]))


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_the_gradient_of_gathered_logits_is_its_own_entries(rng, ranks):
    """Whether types say that all ranks have one cotangent (``check_vma``), or nothing does, as where ranks are emulated."""
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    y, dy = rng.standard_normal((2, 4, 259), np.float32)

    def run(y, dy):
        return jax.vjp(lambda y: gather_logits(y, vocabulary), y)[1](dy)[0]

    operands = columns_by_slot(padded(y, vocabulary, 0.0, 1), plan), dy
    lie = {"in_specs": (COLUMNS, WHOLE), "out_specs": COLUMNS}
    for call in (
        sharded(run, ranks, **lie),
        sharded(run, ranks, **lie, check_vma=False),
        emulate(run, ranks=ranks, **lie),
    ):
        assert_bitwise_equal(columns_from_slots(jax.jit(call)(*operands), plan)[:, :259], dy)


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_packed_head(rng, ranks):
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    _, table, hidden, *_ = values = inputs(rng, 259, 3)

    def forward(table, hidden):
        return gather_logits(logits(hidden, pack(table[None]), vocabulary), vocabulary)

    got = jax.jit(sharded(forward, ranks, (ROWS, WHOLE), WHOLE))(table_by_slot(table, vocabulary, plan), hidden)
    assert_bitwise_equal(got, wanted(vocabulary, *values)["logits"])


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_what_is_no_token_may_hold_anything(rng, ranks):
    """NaN, infinities or large numbers, behind the end of the vocabulary and in unread slots."""
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    y = rng.standard_normal((4, 259)).astype(np.float32)
    labels = np.array([0, 258, 100, -1])

    def everything(y):
        loss, pull = jax.vjp(lambda y: cross_entropy(y, labels, vocabulary), y)
        masked = mask_logits(y, vocabulary)
        return (
            gather_logits(masked, vocabulary),
            gather_logits(log_softmax(y, vocabulary), vocabulary),
            loss,
            pull(loss),
        )

    run = jax.jit(sharded(everything, ranks, COLUMNS, (WHOLE, WHOLE, WHOLE, (COLUMNS,))))
    results = [
        run(columns_by_slot(padded(y, vocabulary, fill, 1), plan, fill)) for fill in (-np.inf, np.nan, np.inf, 1e30)
    ]
    assert_bitwise_equal(results[0][0], y)
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])
    unread = np.isnan(columns_by_slot(padded(y, vocabulary, np.nan, 1), plan, np.nan))
    assert not np.asarray(results[0][3][0])[unread].any(), "no gradient where there is no token"


@pytest.mark.invariance
def test_sequences_do_not_see_each_other(rng):
    vocabulary = Vocabulary(259, CONTRACT, None)
    _, table, hidden, labels, *_ = inputs(rng, 259, 130)
    table = padded(table, vocabulary, 0.0)

    @jax.jit
    def forward(hidden, labels):
        y = logits(hidden, table, vocabulary)
        return y, log_softmax(y, vocabulary), cross_entropy(y, labels, vocabulary)

    whole = forward(hidden, labels)
    for rows in (slice(0, 1), slice(129, 130), slice(3, 12), slice(0, 33)):
        assert_bitwise_equal(
            forward(hidden[rows], labels[rows]), tuple(np.asarray(a)[rows] for a in whole), f"rows {rows}"
        )
    assert_bitwise_equal(
        forward(hidden.reshape(2, 65, DIM), labels.reshape(2, 65)), tuple(a.reshape(2, 65, *a.shape[1:]) for a in whole)
    )


@pytest.mark.invariance
def test_narrow_logits_are_widened(rng):
    vocabulary = Vocabulary(256, CONTRACT, None)
    y = rng.standard_normal((3, 256)).astype(jnp.bfloat16)
    labels = np.array([0, 17, 255])

    @jax.jit
    def run(y):
        log_p, pull = jax.vjp(lambda y: log_softmax(y, vocabulary), y)
        loss, pull_loss = jax.vjp(lambda y: cross_entropy(y, labels, vocabulary), y)
        return (log_p, loss), (pull(log_p)[0], pull_loss(loss)[0])

    results, gradients = run(y)
    wide_results, wide_gradients = run(y.astype(np.float32))
    assert_bitwise_equal(results, wide_results)
    assert_bitwise_equal(gradients, tuple(np.asarray(g).astype(jnp.bfloat16) for g in wide_gradients))


# Twins and values ----------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize("ranks", [3, 5, 7])
def test_twin_a_plain_log_softmax_has_other_bits_on_a_mesh(rng, ranks):
    vocabulary = Vocabulary(263, CONTRACT, "tp")
    plan = schedule(vocabulary.tree, ranks)
    y = rng.standard_normal((64, 263)).astype(np.float32)

    def plain(y):
        top = lax.pmax(jnp.max(y, -1), "tp")
        return top + jnp.log(lax.psum(jnp.sum(jnp.exp(y - top[:, None]), -1), "tp"))

    many = jax.jit(sharded(plain, ranks, COLUMNS, WHOLE))(
        columns_by_slot(padded(y, vocabulary, -np.inf, 1), plan, -np.inf)
    )
    one = jax.jit(lambda y: jax.nn.logsumexp(y, -1))(y)
    np.testing.assert_allclose(many, one, rtol=1e-5)
    assert (bits(many) != bits(one)).any()


def test_twin_adding_the_ranks_rows_loses_the_sign_of_zero(rng):
    table = np.full((8, 3), -0.0, np.float32)
    vocabulary = Vocabulary(8, CONTRACT, "tp")
    tokens = np.array([3, 0])

    def both(table):
        mine = tokens - lax.axis_index("tp") * 4
        rows = jnp.where(((mine >= 0) & (mine < 4))[:, None], table[jnp.clip(mine, 0, 3)], 0)
        return embedding(tokens, table, vocabulary), lax.psum(rows, "tp")

    exact, plain = jax.jit(sharded(both, 2, ROWS, WHOLE))(table)
    assert np.signbit(exact).all()
    assert not np.signbit(plain).any()


def test_accuracy(rng):
    """Against float64. Logits reach 40, where the log-sum-exp is rounded at 2e-6; weights err by that share of them."""
    vocabulary = Vocabulary(259, CONTRACT, None)
    y = (10 * rng.standard_normal((33, 259))).astype(np.float32)
    labels = rng.integers(0, 259, 33)
    d_log_p = rng.standard_normal((33, 259)).astype(np.float32)

    @jax.jit
    def run(y, d_log_p):
        log_p, pull = jax.vjp(lambda y: log_softmax(y, vocabulary), y)
        loss, pull_loss = jax.vjp(lambda y: cross_entropy(y, labels, vocabulary), y)
        return log_p, pull(d_log_p)[0], loss, pull_loss(jnp.ones_like(loss))[0]

    log_p, d_logits, loss, d_ce = run(padded(y, vocabulary, -np.inf, 1), padded(d_log_p, vocabulary, 0.0, 1))
    wide = y.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    want = wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))
    p = np.exp(want)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(log_p[:, :259], want, **tolerance)
    np.testing.assert_allclose(
        d_logits[:, :259], d_log_p - p * d_log_p.sum(-1, keepdims=True, dtype=np.float64), **tolerance
    )
    np.testing.assert_allclose(loss, -np.take_along_axis(want, labels[:, None], 1)[:, 0], **tolerance)
    onehot = labels[:, None] == np.arange(259)
    np.testing.assert_allclose(d_ce[:, :259], p - onehot, **tolerance)


def test_large_and_equal_logits():
    """The maximum is taken out: nothing overflows, and equal logits are as likely as each other."""
    vocabulary = Vocabulary(8, CONTRACT, None)
    y = np.full((2, 8), 1000, np.float32)
    y[1, 0] = 1e30
    equal, certain = np.asarray(jax.jit(partial(log_softmax, vocabulary=vocabulary))(y))
    np.testing.assert_allclose(equal, -np.log(8), atol=1e-4)  # the log-sum-exp is rounded at 6e-5 there
    assert certain[0] == 0


# Layout and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, leaves, width", [(259, 8, 33), (256, 8, 32), (9, 8, 2), (5, 5, 1), (1, 1, 1), (49152, 8, 6144)]
)
def test_layout(size, leaves, width):
    vocabulary = Vocabulary(size, CONTRACT, None)
    assert (vocabulary.leaves, vocabulary.width, vocabulary.local_size) == (leaves, width, leaves * width)
    first, held = vocabulary.local_entries()
    assert (int(first), int(held)) == (0, size)


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_every_entry_has_one_owner(ranks):
    for size in (259, 9, 7):
        vocabulary = Vocabulary(size, CONTRACT, "tp")

        def entries(_, vocabulary=vocabulary):
            return jnp.stack(vocabulary.local_entries())[None]

        held = np.asarray(jax.jit(sharded(entries, ranks, ROWS, ROWS))(jnp.zeros(ranks)))
        assert [entry for first, count in held for entry in range(first, first + count)] == list(range(size))


def test_an_empty_vocabulary():
    with pytest.raises(ValueError, match="Vocabulary: size = 0 is not positive"):
        Vocabulary(0, CONTRACT, None)


TOKENS = jnp.zeros((2,), jnp.int32)


@pytest.mark.parametrize(
    "where, name, call",
    [
        ("dense.embedding", "table", lambda v: embedding(TOKENS, jnp.ones((40, 3)), v)),
        ("dense.logits", "table", lambda v: logits(jnp.ones((2, 3)), jnp.ones((40, 3)), v)),
        ("dense.mask_logits", "logits", lambda v: mask_logits(jnp.ones((2, 40)), v)),
        ("dense.gather_logits", "logits", lambda v: gather_logits(jnp.ones((2, 40)), v)),
        ("dense.log_sum_exp", "logits", lambda v: log_sum_exp(jnp.ones((2, 40)), v)),
        ("dense.mask_logits", "logits", lambda v: log_softmax(jnp.ones((2, 40)), v)),
        ("dense.log_sum_exp", "logits", lambda v: cross_entropy(jnp.ones((2, 40)), TOKENS, v)),
        ("dense.mask_logits", "logits", lambda v: logits(jnp.ones((2, 3)), pack(jnp.ones((1, 40, 3))), v)),
    ],
)
def test_a_wrong_local_size(where, name, call):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text is compared)
        call(Vocabulary(259, CONTRACT, None))
    problem = f"{name} has 40 local entries; a vocabulary of 259 in 8 leaves over 1 ranks has 8 slots of 33 = 264"
    assert str(error.value) == f"{where}: 1 problem\n  - {problem}"


def test_a_mesh_larger_than_the_leaves():
    vocabulary = Vocabulary(259, CONTRACT, "tp")
    run = sharded(lambda table: embedding(TOKENS, table, vocabulary), 16, ROWS, WHOLE)
    with pytest.raises(ValueError, match=r"16 ranks over 8 leaves.*Use a smaller mesh, or a contract with more leaves"):
        run(jnp.ones((16 * 33, 3)))


def test_outside_shard_map():
    with pytest.raises(ValueError, match=r"axis 'tp' is not bound: call this inside jax\.shard_map"):
        embedding(TOKENS, jnp.ones((264, 3)), Vocabulary(259, CONTRACT, "tp"))
