"""Sums over the GPUs of this process in kernels that reach their peers, against those that XLA's collectives carry."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, dense, tree_psum, tree_psum_scatter
from tbik_jax.collectives import for_mesh, to_finish
from tbik_jax.kernels.hopper import mailbox
from tbik_jax.testing import assert_bitwise_equal
from tbik_jax.tree import schedule
from tests.meshes import mesh_of

pytestmark = [pytest.mark.invariance, pytest.mark.gpu]

RANKS = jax.device_count() if jax.default_backend() == "gpu" else 0
if RANKS < 2:
    found = f"{jax.device_count()} device(s) of the backend {jax.default_backend()}"
    pytest.skip(f"this takes two Hopper GPUs of one process, and there are {found}", allow_module_level=True)

TREES = [(2,), (8,), (4, 2), (3, 2)]


def on_mesh(f, in_specs, out_specs):
    return jax.jit(jax.shard_map(f, mesh=mesh_of(RANKS), in_specs=in_specs, out_specs=out_specs))


def placed(x, *spec):
    return jax.device_put(x, NamedSharding(mesh_of(RANKS), P(*spec)))


def test_generators_take_it():
    assert for_mesh(mesh_of(RANKS), "tp") == "direct"


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_sums(rng, tree):
    """Odd sizes too; every rank's copy of the result."""
    tree = Contract(tree=tree).tree_over(8)
    slots = schedule(tree, RANKS).slots
    sizes = (1, 7, 1001, 8 * RANKS, 4096 * 16, 3 << 20)
    leaves = [placed(rng.normal(size=(RANKS * slots, n)).astype(np.float32), "tp") for n in sizes]

    def sums(algorithm, leaves):
        of_dtype = [
            partial(tree_psum, tree=tree, dtype=dtype, algorithm=algorithm) for dtype in ("float32", "bfloat16")
        ]
        return [f(v, "tp") for v in leaves for f in of_dtype]

    def slices(algorithm, leaves):
        whole = [v for v in leaves if v.shape[1] % RANKS == 0]
        return [tree_psum_scatter(v, "tp", tree=tree, algorithm=algorithm) for v in whole]

    def everything(leaves):
        return (
            [sums(name, leaves) for name in ("direct", "all_gather")],
            [slices(name, leaves) for name in ("direct", "all_to_all")],
        )

    (got, want), parts = on_mesh(everything, (P("tp"),), (P(), P("tp")))(leaves)
    for mine, theirs in zip(got, want, strict=True):
        for shard in mine.addressable_shards:
            assert_bitwise_equal(shard.data, theirs, f"{mine.size} {mine.dtype}, {shard.device}")
    assert_bitwise_equal(*parts, "slices")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_products(rng, tree, dtype):
    """Rows that fill no tile, more columns than a tile, and gradients."""
    contract = Contract(tree=tree)
    slots = schedule(contract.tree_over(8), RANKS).slots

    def both(x, w, dy):
        results = []
        for name in ("direct", "all_gather"):
            f = partial(dense.row_parallel, axis_name="tp", contract=contract, leaves=8, algorithm=name)
            y, pull = jax.vjp(f, x, w)
            results.append((y, *pull(dy)))
        return results

    run = on_mesh(both, (P(None, "tp"), P("tp"), P()), [(P(), P(None, "tp"), P("tp"))] * 2)
    for rows, columns, k in ((1030, 576, 64), (300, 4096, 48)) if dtype == "bfloat16" else ((300, 96, 48),):
        x = placed(jnp.asarray(rng.normal(size=(rows, RANKS * slots * k)), dtype), None, "tp")
        w = placed(jnp.asarray(rng.normal(size=(RANKS * slots, columns, k)), dtype), "tp")
        got, want = run(x, w, jnp.asarray(rng.normal(size=(rows, columns)), dtype))
        assert_bitwise_equal(got, want, f"{rows} rows, {columns} columns, leaves of {k}")


@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (5, 576), (131, 1024)])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_mail_of_many_turns(rng, tree, rows, columns):
    """A hundred sums that feed each other, as the layers of a model do, through one mailbox."""
    contract, k = Contract(tree=tree), 64
    plan = schedule(contract.tree_over(8), RANKS)
    x = placed(jnp.asarray(rng.normal(size=(rows, columns)), "bfloat16"))
    w = placed(jnp.asarray(rng.normal(size=(RANKS * plan.slots, columns, k)), "bfloat16"), "tp")
    scale = jnp.ones(columns, "bfloat16")
    given = {"axis_name": "tp", "contract": contract, "leaves": 8}

    def turns(x, w, fused):
        box = mailbox.open_mailbox("tp", RANKS, max(to_finish(plan)[0]), rows, columns) if fused else None

        def turn(_, carry):
            x, normal = carry
            mine = lax.pcast(normal, "tp", to="varying")[:, : plan.slots * k]
            if fused:
                return dense.row_parallel_add_norm(mine, w, x, scale, eps=1e-6, mailbox=box, **given)
            return dense.add_rms_norm(x, dense.row_parallel(mine, w, algorithm="all_gather", **given), scale, eps=1e-6)

        return lax.fori_loop(0, 100, turn, (x, dense.rms_norm(x, scale, eps=1e-6)))

    run = on_mesh(lambda x, w: [turns(x, w, fused) for fused in (True, False)], (P(), P("tp")), P())
    got, want = run(x, w)
    for shard in got[1].addressable_shards:
        assert_bitwise_equal(shard.data, want[1], str(shard.device))
