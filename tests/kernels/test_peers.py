"""The sum over peers' memory: its threads' program in NumPy, rank after rank; and where it is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tbik_jax import Tree, collectives, emulate, tree_psum, tree_psum_scatter
from tbik_jax.collectives import for_mesh, to_finish
from tbik_jax.engine import make_mesh
from tbik_jax.kernels import backend
from tbik_jax.kernels.hopper import peers
from tbik_jax.testing import assert_bitwise_equal
from tbik_jax.tree import schedule
from tests.kernels import simt_numpy
from tests.meshes import mesh_of

pytestmark = pytest.mark.invariance

TREES = [Tree(8), Tree(8, (8,)), Tree(8, (4, 2)), Tree(6), Tree(5, (5,))]


def run_ranks(monkeypatch: pytest.MonkeyPatch, leaves: np.ndarray, tree: Tree, ranks: int, dtype, scatter: bool):
    """``leaves [L, n]`` -> what every rank's result holds in the end."""
    plan, n = schedule(tree, ranks), leaves.shape[1]
    counts, finish = to_finish(plan)
    nodes = np.full((ranks, plan.width, n), np.nan, np.float32)  # nobody may read behind the nodes of a rank
    for rank, held in enumerate(plan.ranges):
        given = [leaves[leaf] for leaf in held]
        given = given if plan.sends_leaves else plan.reduce_local(rank, given, np.add)
        nodes[rank, : len(given)] = given
    results: list[np.ndarray] = []

    def launch(program, blocks, axis_name, count, x, out, *, of_all):
        assert count == ranks
        results.extend(np.full(out.shape, np.nan, out.dtype) for _ in range(ranks))
        written = [np.zeros(out.shape, int) for _ in range(ranks)]
        for rank in range(ranks):
            machine = simt_numpy.Machine(blocks)
            targets = results if of_all else [results[rank]]
            program(machine, np.int32(rank), [*nodes], targets)
            for times, target in zip(written if of_all else [written[rank]], targets, strict=True):
                times += machine.written[id(target)]
        assert all((times == 1).all() for times in written), "an element is not written once"

    monkeypatch.setattr(peers, "_launch", launch)
    monkeypatch.setattr(peers.backend, "multiprocessors", lambda: 3)
    peers.tree_sum(nodes[0], "tp", counts, finish, dtype=dtype, scatter=scatter)
    return results


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_every_mesh_gets_the_tree(monkeypatch, rng, tree, dtype):
    """More turns of more chunks than blocks have threads, too; odd sizes, for which an access is one element."""
    for ranks in range(2, tree.leaves + 1):
        for n in (1, 7, 8 * ranks, 4 * 1001, 12 * 1024 * ranks):
            leaves = rng.normal(size=(tree.leaves, n)).astype(np.float32) * np.float32(4.0) ** rng.integers(
                -8, 8, (1, n)
            )
            want = tree.reduce(list(leaves.astype(np.float32)), np.add).astype(dtype)
            for rank, got in enumerate(run_ranks(monkeypatch, leaves.astype(np.float32), tree, ranks, dtype, False)):
                assert_bitwise_equal(got, want, f"{ranks} ranks, n = {n}, result of rank {rank}")
            if n % ranks == 0:
                parts = run_ranks(monkeypatch, leaves.astype(np.float32), tree, ranks, dtype, True)
                assert_bitwise_equal(np.concatenate(parts), want, f"{ranks} ranks, n = {n}, slices")


def test_another_order_differs(rng):
    """The test above can fail: a chain has other bits than the balanced tree on its inputs."""
    leaves = list(rng.normal(size=(8, 4096)).astype(np.float32))
    assert Tree(8).reduce(leaves, np.add).tobytes() != Tree(8, (8,)).reduce(leaves, np.add).tobytes()


# Where it runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", [tree_psum, tree_psum_scatter])
def test_refused_without_gpus(collective):
    if jax.default_backend() == "gpu":
        pytest.skip("this process has GPUs")

    def f(v):
        return collective(v, "tp", tree=Tree(4), algorithm="direct")

    run = jax.shard_map(f, mesh=mesh_of(4), in_specs=P("tp"), out_specs=P("tp"), check_vma=False)
    with pytest.raises(NotImplementedError, match=r"algorithm 'direct': GPUs read .* the default backend is 'cpu'"):
        jax.eval_shape(run, jax.ShapeDtypeStruct((4, 8), jnp.float32))


def test_refused_under_emulation():
    if jax.default_backend() != "gpu":
        pytest.skip("the backend is refused before that")
    run = emulate(
        lambda v: tree_psum(v, "tp", tree=Tree(4), algorithm="direct"),
        ranks=4,
        axis_name="tp",
        in_specs=P("tp"),
        out_specs=P(),
    )
    with pytest.raises(NotImplementedError, match="axis 'tp' is vmap's"):
        run(jnp.ones((4, 8)))


def test_one_rank_needs_no_gpu(rng):
    leaves = rng.normal(size=(8, 33)).astype(np.float32)
    run = jax.shard_map(
        lambda v: tree_psum(v, "tp", tree=Tree(8), algorithm="direct"), mesh=mesh_of(1), in_specs=P("tp"), out_specs=P()
    )
    assert_bitwise_equal(jax.jit(run)(leaves), Tree(8).reduce(list(leaves), np.add), "one rank")


def test_a_mesh_of_cpus_leaves_it_to_auto():
    if jax.default_backend() != "cpu":
        pytest.skip(f"the default backend is {jax.default_backend()}")
    assert for_mesh(make_mesh(tp=2), "tp") == "auto"


def test_which_meshes_take_it(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(collectives, "_not_direct", list)
    reached = []
    monkeypatch.setattr(collectives.backend, "reach_each_other", lambda *numbers: reached.append(numbers) or True)
    devices = np.array(jax.devices()[:4])
    assert for_mesh(Mesh(devices.reshape(1, 4), ("dp", "tp")), "tp") == "direct"
    assert len(reached) == 1 and len(reached[0]) == 4
    others = [(devices.reshape(2, 2), "tp"), (devices[::-1].reshape(1, 4), "tp"), (devices[1:].reshape(1, 3), "tp")]
    others += [(devices[:1].reshape(1, 1), "tp"), (devices.reshape(1, 4), "dp")]
    for of, axis in others:
        assert for_mesh(Mesh(of, ("dp", "tp")), axis) == "auto"
    monkeypatch.setattr(collectives.backend, "reach_each_other", lambda *numbers: False)
    assert for_mesh(Mesh(devices.reshape(1, 4), ("dp", "tp")), "tp") == "auto"


def test_without_a_driver_nobody_reaches_anybody(monkeypatch):
    def missing(name):
        raise OSError(name)

    backend.reach_each_other.cache_clear()
    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    assert not backend.reach_each_other(0, 1)
    backend.reach_each_other.cache_clear()
