"""Nodes that travel by mailbox: the threads' program in NumPy, with a post that delivers between two passes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbik_jax import Tree
from tbik_jax.collectives import to_finish
from tbik_jax.kernels.hopper import mailbox, norms, simt
from tbik_jax.testing import assert_bitwise_equal
from tbik_jax.tree import schedule
from tests.kernels import simt_numpy

pytestmark = [pytest.mark.invariance, pytest.mark.slow]

TREES = [Tree(8), Tree(8, (8,)), Tree(8, (4, 2)), Tree(6), Tree(5, (5,))]
EPS = 1e-6


class _EverythingIsSentError(Exception):
    pass


class Post:
    """Stands for `mailbox._Post`. The first pass of a rank ends when its mail is sent; the second finds everybody's."""

    rank = 0
    delivering = False
    mail: dict[int, np.ndarray] = {}  # noqa: RUF012

    def __init__(self, m, words, table, ranks, size):
        self.m, self.size = m, size
        if not Post.delivering:
            Post.mail[Post.rank] = np.full((m.shape[0], size), np.nan, np.float32)

    def send(self, index, values, where, stride):
        if Post.delivering:
            return
        index, where = (np.broadcast_to(x, self.m.shape) for x in (index, where))
        assert (index[where] + len(values) <= stride).all(), "mail in somebody else's place"
        blocks = np.broadcast_to(self.m.block, self.m.shape)
        for i, value in enumerate(values):
            box = Post.mail[Post.rank]
            assert np.isnan(box[blocks[where], index[where] + i]).all(), "an element is not sent once"
            box[blocks[where], index[where] + i] = np.broadcast_to(value, self.m.shape)[where]

    def exchange(self):
        if not Post.delivering:
            raise _EverythingIsSentError

    def received(self, rank, index, where, stride):
        index = np.where(np.broadcast_to(where, self.m.shape), index, 0)
        found = [Post.mail[rank][np.broadcast_to(self.m.block, self.m.shape), index + i] for i in range(norms.CHUNK)]
        return [np.where(where, x, np.float32(0)) for x in found]

    def end(self):
        assert Post.delivering


def run_ranks(monkeypatch, leaves, residual, scale, tree, ranks):
    """``leaves [L, rows, d]`` -> ``(total, normal)`` of every rank."""
    plan, (_, rows, d) = schedule(tree, ranks), leaves.shape
    counts, finish = to_finish(plan)
    nodes = np.full((ranks, plan.width, rows, d), np.nan, np.float32)  # idle ones are sent, and never added
    for rank, held in enumerate(plan.ranges):
        given = [leaves[leaf] for leaf in held]
        given = given if plan.sends_leaves else plan.reduce_local(rank, given, np.add)
        nodes[rank, : len(given)] = given

    def launch(program, blocks, inputs, out, *, shared=0, in_place=()):
        machine = simt_numpy.Machine(blocks)
        results = [np.zeros(x.shape, x.dtype) for x in out]
        program(machine, *map(np.asarray, inputs), None, None, *results)
        assert all((machine.written[id(x)] == 1).all() for x in results), "an element is not written once"
        return results

    monkeypatch.setattr(simt, "launch", launch)
    monkeypatch.setattr(mailbox, "_Post", Post)
    words = np.zeros((mailbox._blocks(rows, d), mailbox._HEADER + 2 * ranks * plan.width * mailbox._elements(d)))
    box = mailbox.Mailbox(words, np.zeros((ranks + 1, 2)))
    found = []
    for Post.delivering in (False, True):
        for Post.rank in range(ranks):
            given = box, nodes[Post.rank], counts, finish, residual, scale, EPS
            if Post.delivering:
                found.append(mailbox.sum_add_norm(*given))
            else:
                with pytest.raises(_EverythingIsSentError):
                    mailbox.sum_add_norm(*given)
    return found


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_the_bits_of_sum_and_norm_apart(monkeypatch, rng, tree, dtype):
    """Rows of one lane, of a warp, of a block; several rows a block and a last one that is not full."""
    for ranks in range(2, tree.leaves + 1):
        for rows, d in ((1, 8), (5, 576), (17, 40), (3, 4096)):
            leaves = rng.normal(size=(tree.leaves, rows, d)).astype(np.float32)
            residual, scale = rng.normal(size=(rows, d)).astype(dtype), rng.normal(size=d).astype(dtype)
            y = tree.reduce(list(leaves), np.add).astype(dtype)
            with monkeypatch.context() as patched:
                patched.setattr(simt, "launch", simt_numpy.launch)
                want = norms.rms_norm(residual, scale, EPS, y)
            for rank, got in enumerate(run_ranks(monkeypatch, leaves, residual, scale, tree, ranks)):
                assert_bitwise_equal(got, want, f"{ranks} ranks, {rows} rows of {d}, rank {rank}")


def test_another_order_differs(rng):
    """The test above can fail: a chain's totals differ from the balanced tree's."""
    leaves = list(rng.normal(size=(8, 3, 4096)).astype(np.float32))
    assert Tree(8).reduce(leaves, np.add).tobytes() != Tree(8, (8,)).reduce(leaves, np.add).tobytes()


def test_what_fits(monkeypatch):
    monkeypatch.setattr(mailbox.backend, "multiprocessors", lambda: 132)
    assert mailbox.fits(132, 4096, [1, 1]) and not mailbox.fits(133, 4096, [1, 1])
    assert mailbox.fits(4 * 132, 576, [1] * 8)  # 18 chunks take 32 lanes: four rows a block
    assert not mailbox.fits(0, 4096, [1, 1])
    assert not mailbox.fits(1, 4097, [1, 1]) and not mailbox.fits(1, 32768, [1, 1])
    assert not mailbox.fits(1, 4096, [9, 9]) and not mailbox.fits(1, 4096, [1] * 17)


def test_a_small_mailbox_is_refused():
    box = mailbox.Mailbox(np.zeros((2, 32 + 2 * 2 * 4096)), np.zeros((3, 2)))
    like = jax.ShapeDtypeStruct((3, 4096), np.float32)
    with pytest.raises(ValueError, match=r"3 rows of 4096, 1 nodes a rank, in a mailbox of \(2, 16416\)"):
        mailbox.sum_add_norm(
            box, jax.ShapeDtypeStruct((1, 3, 4096), np.float32), [1, 1], schedule(Tree(2), 2).finish, like, like, EPS
        )


def test_no_mailbox_without_gpus_or_room(monkeypatch):
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="this backend has none"):
            mailbox.open_mailbox("tp", 2, 1, 1, 4096)
    monkeypatch.setattr(mailbox.backend, "family", lambda: "sm90")
    monkeypatch.setattr(mailbox.backend, "multiprocessors", lambda: 132)
    with pytest.raises(NotImplementedError, match="133 rows of 4096 elements on 2 ranks"):
        mailbox.open_mailbox("tp", 2, 1, 133, 4096)


# The protocol ----------------------------------------------------------------------------------------------------------


def misread(seed: int, ranks: int, kernels: list[int], halves: int) -> bool:
    """Whether a rank reads another turn's mail, when ranks and blocks run in that random order.

    ``kernels`` are the blocks of one kernel after another. A block sends to every rank, then flags, then waits and reads; a
    kernel begins when the one before has ended on its rank, whatever the other ranks do.
    """
    draw = random.Random(seed)
    mail: dict[tuple[int, ...], int] = {}
    flags: dict[tuple[int, int, int], int] = {}
    turns: dict[tuple[int, int], int] = {}

    def block(rank: int, kernel: int, number: int) -> Iterator[bool]:
        """Yields whether it may go on."""
        turn = turns.get((rank, number), 0)
        for to in draw.sample(range(ranks), ranks):
            mail[to, number, turn % halves, rank] = kernel
            yield True
        for to in draw.sample(range(ranks), ranks):
            flags[to, number, rank] = turn + 1
            yield True
        for source in range(ranks):
            while flags.get((rank, number, source), 0) < turn + 1:
                yield False
        for source in range(ranks):
            wrong.append(mail[rank, number, turn % halves, source] != kernel)
            yield True
        turns[rank, number] = turn + 1

    wrong: list[bool] = []
    kernel_of = [-1] * ranks
    running: list[list[Iterator[bool]]] = [[] for _ in range(ranks)]
    while True:
        for rank in range(ranks):
            if not running[rank] and kernel_of[rank] + 1 < len(kernels):
                kernel_of[rank] += 1
                running[rank] = [block(rank, kernel_of[rank], n) for n in range(kernels[kernel_of[rank]])]
        alive = [(rank, b) for rank in range(ranks) for b in running[rank]]
        if not alive:
            return any(wrong)
        rank, chosen = draw.choice(alive)
        if next(chosen, None) is None:
            running[rank].remove(chosen)


@given(st.integers(0, 2**32), st.integers(2, 4), st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_nobody_reads_another_turn(seed, ranks, kernels):
    assert not misread(seed, ranks, kernels, halves=2)


def test_one_half_is_not_enough():
    """The test above can fail."""
    assert any(misread(seed, 3, [2] * 6, halves=1) for seed in range(200))
