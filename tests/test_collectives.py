"""Collectives: whatever the mesh and the exchange, the bits of ``Tree.reduce`` on one device (NumPy's additions)."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tbik_jax import Tree, collectives, tree_all_gather, tree_psum, tree_psum_scatter
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import Schedule, schedule
from tests.meshes import by_slot, mesh_of

pytestmark = pytest.mark.invariance

REPLICATED, SPLIT = P(), P("tp")

EVERY_MESH = [
    (tree, ranks)
    for tree, sizes in {
        Tree(8): (1, 2, 3, 5, 6, 7, 8),
        Tree(8, (8,)): (2, 3, 8),
        Tree(8, (4, 2)): (3, 8),
        Tree(24): (5, 8, 16),
        Tree(9): (2, 3, 8),
        Tree(7): (3, 7),
        Tree(12, (3, 2)): (5, 6, 12),
        Tree(16): (7, 16),
    }.items()
    for ranks in sizes
]
SOME_MESHES = [(Tree(8), 1), (Tree(8), 2), (Tree(8), 8), (Tree(8, (4, 2)), 3), (Tree(7), 5), (Tree(24), 7)]


def mesh_id(value: Any) -> str | None:
    return "x".join(map(str, (value.leaves, *value.levels))) if isinstance(value, Tree) else None


every_mesh = pytest.mark.parametrize("tree, ranks", EVERY_MESH, ids=mesh_id)
some_meshes = pytest.mark.parametrize("tree, ranks", SOME_MESHES, ids=mesh_id)


def leaf_values(rng: np.random.Generator, tree: Tree, *shape: int) -> np.ndarray:
    """Values of many sizes, so that the order of additions shows; the first element of every leaf is -0."""
    values = rng.standard_normal((tree.leaves, *shape)) * 2.0 ** rng.integers(-6, 7, (tree.leaves, *shape))
    values.reshape(tree.leaves, -1)[:, 0] = -0.0
    return values.astype(np.float32)


def reduced(tree: Tree, leaves: np.ndarray) -> np.ndarray:
    return tree.reduce(list(leaves), np.add)


def algorithms(plan: Schedule) -> list[str]:
    """Every exchange that this mesh can run."""
    pairwise = ["butterfly", "recursive_halving"] if plan.is_butterfly else []
    direct = ["direct"] if jax.default_backend() == "gpu" else []
    return ["all_gather", "all_to_all", *pairwise, *direct]


def psum_by_all(plan: Schedule) -> Any:
    return lambda v: [tree_psum(v, "tp", tree=plan.tree, algorithm=name) for name in algorithms(plan)]


def sharded(f: Any, ranks: int, *, out_specs: Any = REPLICATED, in_specs: Any = SPLIT, check_vma: bool = True) -> Any:
    return jax.jit(jax.shard_map(f, mesh=mesh_of(ranks), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma))


def test_every_algorithm_is_tested():
    """``direct`` on a CPU: its threads' program, in tests/kernels/test_peers.py."""
    assert {"auto", "direct", *algorithms(schedule(Tree(8), 8))} == set(get_args(collectives.Algorithm))


# Values --------------------------------------------------------------------------------------------------------------


@every_mesh
def test_any_mesh_and_any_exchange(rng, tree, ranks):
    """Sizes that no number of ranks divides included, and 1 mod 8: a vector's tail."""
    plan = schedule(tree, ranks)
    leaves = [leaf_values(rng, tree, *shape) for shape in [(33,), (3 * ranks, 1)]]

    def everything(*values):
        totals = [[tree_psum(v, "tp", tree=tree, algorithm=name) for v in values] for name in algorithms(plan)]
        return totals, [tree_psum_scatter(values[-1], "tp", tree=tree, algorithm=name) for name in algorithms(plan)]

    totals, scattered = sharded(everything, ranks, out_specs=(P(), P("tp")))(*(by_slot(v, plan) for v in leaves))
    want = [reduced(tree, v) for v in leaves]
    for name, total, parts in zip(algorithms(plan), totals, scattered, strict=True):
        assert_bitwise_equal(total, want, f"tree_psum by {name}")
        # The slices of all ranks, one after another, are the whole sum.
        assert_bitwise_equal(parts, want[-1], f"tree_psum_scatter by {name}")


@some_meshes
def test_scatter_along_any_dimension(rng, tree, ranks):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 3, 2 * ranks, 5)

    def everything(v):
        return [
            tree_psum_scatter(v, "tp", tree=tree, scatter_dimension=dimension, algorithm=name)
            for name in algorithms(plan)
            for dimension in (1, -2)
        ]

    for part in sharded(everything, ranks, out_specs=P(None, "tp"))(by_slot(leaves, plan)):
        assert_bitwise_equal(part, reduced(tree, leaves))


@pytest.mark.parametrize("tree, ranks", [(Tree(8), 8), (Tree(8), 3), (Tree(24), 16)], ids=mesh_id)
def test_one_element(rng, tree, ranks):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 1, 2)[..., 1]
    for got in sharded(psum_by_all(plan), ranks)(by_slot(leaves, plan)):
        assert_bitwise_equal(got, reduced(tree, leaves))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_tree_all_gather_moves_bits(rng, ranks):
    x = rng.integers(0, 2**32, (ranks * 2, 3, ranks), np.uint32).view(np.float32)  # NaN payloads and all

    def gather(first, last):
        return tree_all_gather(first, "tp"), tree_all_gather(last, "tp", gather_dimension=-1)

    got = sharded(gather, ranks, in_specs=(P("tp"), P(None, None, "tp")))(x, x)
    assert_bitwise_equal(got, (x, x))


@some_meshes
def test_without_the_check_of_varying_axes(rng, tree, ranks):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 3 * ranks)

    def everything(v):
        total = [tree_psum(v, "tp", tree=tree, algorithm=name) for name in algorithms(plan)]
        parts = [tree_psum_scatter(v, "tp", tree=tree, algorithm=name) for name in algorithms(plan)]
        return total + [tree_all_gather(part, "tp") for part in parts]

    for name, result in zip(
        algorithms(plan) * 2, sharded(everything, ranks, check_vma=False)(by_slot(leaves, plan)), strict=True
    ):
        assert_bitwise_equal(result, reduced(tree, leaves), name)


@pytest.mark.parametrize("small", [0, 1 << 40])
@pytest.mark.parametrize("ranks", [3, 4])
def test_auto_chooses_by_size_alone(rng, monkeypatch, ranks, small):
    monkeypatch.setitem(collectives._WORTH_AN_EXCHANGE, "cpu", small)
    tree = Tree(8)
    leaves = leaf_values(rng, tree, 25)
    run = sharded(lambda v: tree_psum(v, "tp", tree=tree), ranks)
    values = by_slot(leaves, schedule(tree, ranks))
    assert_bitwise_equal(run(values), reduced(tree, leaves))
    assert ("all-to-all" in run.lower(values).compile().as_text()) == (small == 0)


@some_meshes
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_another_dtype_is_one_rounding_of_the_root(rng, tree, ranks, dtype):
    plan = schedule(tree, ranks)
    leaves = rng.standard_normal((tree.leaves, 40 * ranks)).astype(np.float32)
    # Large leaves cancel, so that another order shows in the rounded root, too.
    leaves = leaves + 1000 * (leaves - leaves[::-1])

    def everything(v):
        totals = [tree_psum(v, "tp", tree=tree, dtype=dtype, algorithm=name) for name in algorithms(plan)]
        # Widened inside the program: XLA may not skip the rounding.
        wide = [total.astype(jnp.float32) for total in totals]
        return totals, wide, tree_psum_scatter(v, "tp", tree=tree, dtype=dtype)

    root = reduced(tree, leaves).astype(dtype)
    totals, wide, part = sharded(everything, ranks, out_specs=(P(), P(), P("tp")))(by_slot(leaves, plan))
    for name, total, widened in zip(algorithms(plan), totals, wide, strict=True):
        assert_bitwise_equal((total, widened), (root, root.astype(np.float32)), name)
    assert_bitwise_equal(part, root)
    if tree.leaves > 2:
        at_every_node = tree.reduce(list(leaves.astype(dtype)), np.add)
        assert (bits(at_every_node) != bits(root)).any(), "rounding at the nodes is another number"


def test_signed_zeros():
    """-0 + -0 = -0 and -0 + 0 = +0: the tree adds no zero of its own, nor does the padding of a slice."""
    tree = Tree(7, (3, 2))
    leaves = np.full((7, 5), -0.0, np.float32)
    leaves[2, 1] = leaves[6, 3] = 0.0
    for ranks in (1, 3, 5, 7):
        plan = schedule(tree, ranks)
        for name, got in zip(algorithms(plan), sharded(psum_by_all(plan), ranks)(by_slot(leaves, plan)), strict=True):
            assert np.signbit(got).tolist() == [True, False, True, False, True], (ranks, name)


@pytest.mark.parametrize("fill", [np.nan, np.inf, 1e30])
def test_unread_slots_may_hold_anything(rng, fill):
    tree, ranks = Tree(8), 5
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 10)

    def everything(v):
        nodes = collectives.local_nodes(v, "tp", tree=tree)
        return tree_psum(v, "tp", tree=tree), tree_psum_scatter(v, "tp", tree=tree), nodes

    total, parts, nodes = sharded(everything, ranks, out_specs=(P(), P("tp"), P("tp")))(by_slot(leaves, plan, fill))
    assert_bitwise_equal((total, parts), (reduced(tree, leaves),) * 2)
    assert np.isfinite(nodes).all()


@some_meshes
def test_local_nodes_are_the_nodes_of_the_ranks_range(rng, tree, ranks):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 9)
    run = sharded(lambda v: collectives.local_nodes(v, "tp", tree=tree), ranks, out_specs=P("tp"))
    got = np.asarray(run(by_slot(leaves, plan))).reshape(ranks, plan.width, 9)
    for rank, held in enumerate(plan.ranges):
        nodes = plan.reduce_local(rank, list(leaves[held.start : held.stop]), np.add)
        assert_bitwise_equal(got[rank, : len(nodes)], np.stack(nodes), f"rank {rank}")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_products_handed_over_as_leaves_are_rounded_first(rng, ranks):
    """XLA must not contract a caller's product with the tree's first addition; the twin shows that it would."""
    tree = Tree(8)
    plan = schedule(tree, ranks)
    a, b = (rng.standard_normal((8, 33)).astype(np.float32) for _ in range(2))
    run = sharded(lambda a, b: tree_psum(a * b, "tp", tree=tree), ranks)
    assert_bitwise_equal(run(by_slot(a, plan), by_slot(b, plan)), reduced(tree, a * b))
    plain = jax.jit(lambda a, b: tree.reduce(list(a * b), jnp.add))(a, b)
    assert (bits(plain) != bits(reduced(tree, a * b))).any()


def test_one_axis_of_a_larger_mesh(rng):
    """Values that differ over the other axis stay apart; 2 x 3 ranks."""
    tree = Tree(8, (4, 2))
    plan = schedule(tree, 3)
    leaves = [leaf_values(rng, tree, 9) for _ in range(2)]
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("dp", "tp"))
    run = jax.jit(
        jax.shard_map(
            lambda v: tree_psum(v[0], "tp", tree=tree)[None], mesh=mesh, in_specs=P("dp", "tp"), out_specs=P("dp")
        )
    )
    got = run(np.stack([by_slot(v, plan) for v in leaves]))
    assert_bitwise_equal(got, np.stack([reduced(tree, v) for v in leaves]))


# The twin: plain sums over the ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [3, 5, 6, 7])
def test_psum_has_other_bits(rng, ranks):
    tree = Tree(8)
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 500)

    def plain(v):
        return lax.psum(jnp.sum(v, 0), "tp")

    got = np.asarray(sharded(plain, ranks)(by_slot(leaves, plan, 0.0)))
    want = reduced(tree, leaves)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)  # the same sum,
    assert (bits(got) != bits(want)).any()  # in another order


# Gradients -----------------------------------------------------------------------------------------------------------


def every_slot(plan: Schedule, cotangent: np.ndarray) -> np.ndarray:
    """Every leaf enters the sum once with weight one; what is never read gets zero."""
    return by_slot(np.broadcast_to(cotangent, (plan.tree.leaves, *cotangent.shape)), plan, 0.0)


def loss_of(y: jax.Array, c: jax.Array) -> jax.Array:
    """Its gradient is c + y, so the bits of y show in it."""
    return jnp.sum(c * y + 0.5 * (y * y))


@some_meshes
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradient_of_tree_psum(rng, tree, ranks, where):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 9)
    c = rng.standard_normal(9).astype(np.float32)

    psums = [partial(tree_psum, axis_name="tp", tree=tree, algorithm=name) for name in algorithms(plan)]

    def inside(v, c):
        return [jax.grad(lambda v, psum=psum: loss_of(psum(v), c))(v) for psum in psums]

    def outside(v, c):
        whole = [sharded(psum, ranks) for psum in psums]
        return [jax.grad(lambda v, psum=psum: loss_of(psum(v), c))(v) for psum in whole]

    run = jax.jit(outside) if where == "outside" else sharded(inside, ranks, in_specs=(P("tp"), P()), out_specs=P("tp"))
    for name, got in zip(algorithms(plan), run(by_slot(leaves, plan), c), strict=True):
        assert_bitwise_equal(got, every_slot(plan, c + reduced(tree, leaves)), name)


@some_meshes
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_gradient_of_tree_psum_scatter_and_back(rng, tree, ranks, where):
    plan = schedule(tree, ranks)
    leaves = leaf_values(rng, tree, 3, 2 * ranks)
    c = rng.standard_normal((3, 2 * ranks)).astype(np.float32)

    def part(v):
        return tree_psum_scatter(v, "tp", tree=tree, scatter_dimension=1)

    def whole(v):
        return tree_all_gather(part(v), "tp", gather_dimension=1)

    def inside(v, c, c_part):
        return jax.grad(lambda v: loss_of(part(v), c_part))(v), jax.grad(lambda v: loss_of(whole(v), c))(v)

    def outside(v, c, _):
        sliced = sharded(part, ranks, out_specs=P(None, "tp"))
        return jax.grad(lambda v: loss_of(sliced(v), c))(v), jax.grad(lambda v: loss_of(sharded(whole, ranks)(v), c))(v)

    specs = {"in_specs": (P("tp"), P(), P(None, "tp")), "out_specs": P("tp")}
    run = jax.jit(outside) if where == "outside" else sharded(inside, ranks, **specs)
    want = every_slot(plan, c + reduced(tree, leaves))
    assert_bitwise_equal(run(by_slot(leaves, plan), c, c), (want, want))


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_gradient_of_tree_all_gather_is_the_ranks_slice(rng, ranks):
    x, c = (rng.standard_normal((ranks * 2, 3)).astype(np.float32) for _ in range(2))
    inside = sharded(
        lambda x, c: jax.grad(lambda x: jnp.sum(c * tree_all_gather(x, "tp")))(x),
        ranks,
        in_specs=(P("tp"), P()),
        out_specs=P("tp"),
    )
    outside = jax.grad(lambda x, c: jnp.sum(c * sharded(lambda x: tree_all_gather(x, "tp"), ranks)(x)))
    assert_bitwise_equal((inside(x, c), outside(x, c)), (c, c))


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(f: Any, ranks: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> str:
    x = jax.ShapeDtypeStruct((ranks * shape[0], *shape[1:]), dtype)
    with pytest.raises(ValueError, match=r"^tree_psum") as error:
        sharded(f, ranks, out_specs=P("tp")).trace(x)
    return str(error.value)


def test_more_ranks_than_leaves():
    text = refused(lambda v: tree_psum(v, "tp", tree=Tree(4)), 8, (1, 5))
    assert "axis 'tp' has 8 ranks but the tree only 4 leaves" in text
    assert "smaller mesh" in text and "more leaves" in text


def test_a_wrong_number_of_slots():
    text = refused(lambda v: tree_psum(v, "tp", tree=Tree(8)), 3, (2, 5))
    assert "leaf values have shape (2, 5); 8 leaves over 3 ranks need 3 slots in the first dimension" in text


@pytest.mark.parametrize("algorithm", ["butterfly", "recursive_halving"])
@pytest.mark.parametrize("tree, ranks", [(Tree(8), 3), (Tree(8, (8,)), 4), (Tree(9), 4)], ids=mesh_id)
def test_an_exchange_that_the_mesh_cannot_run(tree, ranks, algorithm):
    text = refused(
        lambda v: tree_psum(v, "tp", tree=tree, algorithm=algorithm), ranks, (schedule(tree, ranks).slots, 5)
    )
    assert f"algorithm {algorithm!r} wants a power of two of ranks with one node each" in text
    assert f"{tree.leaves} leaves of shape {tree.levels} over {ranks} ranks. 'auto' chooses one that fits" in text


def test_everything_wrong_at_once():
    text = refused(lambda v: tree_psum(v, "tp", tree=Tree(8), algorithm="ring"), 2, (3, 5), jnp.bfloat16)
    assert text.startswith("tree_psum: 3 problems")
    assert "leaf values are bfloat16, not float32: nodes are added in f32" in text
    assert "algorithm 'ring' is not one of" in text
    assert "8 leaves over 2 ranks need 4 slots" in text


def test_a_scatter_that_does_not_divide():
    text = refused(lambda v: tree_psum_scatter(v, "tp", tree=Tree(8)), 2, (4, 5))
    assert "dimension 0 of size 5 is not a multiple of the 2 ranks; pad it first" in text


@pytest.mark.parametrize("dimension", [1, -2])
def test_a_scatter_dimension_outside(dimension):
    text = refused(lambda v: tree_psum_scatter(v, "tp", tree=Tree(8), scatter_dimension=dimension), 2, (4, 4))
    assert f"scatter_dimension = {dimension} is outside a leaf value of 1 dimensions" in text


def test_outside_shard_map():
    with pytest.raises(
        ValueError, match=r"axis 'tp' is not bound: call this inside jax\.shard_map over a mesh with an axis 'tp'"
    ):
        tree_psum(jnp.ones((8, 3)), "tp", tree=Tree(8))
