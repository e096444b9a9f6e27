"""Sums of gradients over a batch: the same bits on every data-parallel mesh, in one step or several."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, Tree, batch_slots, dense, emulate, tree_value_and_grad
from tbik_jax.kernels.exact import product
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import schedule
from tests.meshes import from_slots, mesh_of

pytestmark = pytest.mark.invariance

#: Three examples a leaf, of five tokens; nothing is a multiple of anything.
EXAMPLES, TOKENS, D, N = 3, 5, 33, 17


def drawn(leaves: int, dtype: str = "float32") -> tuple[dict[str, Any], Any]:
    """Parameters and a batch."""
    generator = np.random.default_rng(leaves)

    def normal(*shape: int) -> Any:
        return jnp.asarray(generator.standard_normal(shape, np.float32))

    params = {"scale": normal(D), "w": normal(N, D), "bias": normal(N)}
    x, y = normal(leaves * EXAMPLES, TOKENS, D), normal(leaves * EXAMPLES, TOKENS, N)
    return jax.tree.map(lambda p: p.astype(dtype), params), (x.astype(dtype), y)


def loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """Norm, product, half a squared distance."""
    contract = Contract()
    normal = dense.rms_norm(x, params["scale"], eps=1e-6)
    found = dense.column_parallel(normal, params["w"], params["bias"], axis_name=None, contract=contract, leaves=1)
    apart = found.astype(jnp.float32) - y
    return dense.token_sum(product(0.5, product(apart, apart)))


def on_mesh(
    ranks: int,
    *,
    leaves: int,
    contract: Contract,
    dtype: str = "float32",
    how: str = "mesh",
    dtype_of_gradients: str | None = None,
    **options: Any,
) -> Any:
    params, batch = drawn(leaves, dtype)
    batch = batch_slots(batch, leaves=leaves, ranks=ranks)
    step = tree_value_and_grad(
        loss, axis_name="dp", contract=contract, leaves=leaves, dtype=dtype_of_gradients, **options
    )
    lie: dict[str, Any] = {"in_specs": (P(), P("dp"), P("dp")), "out_specs": (P(), P())}
    if how == "emulated":
        return emulate(step, ranks=ranks, axis_name="dp", **lie)(params, *batch)
    call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), **lie, check_vma=how == "mesh")
    return jax.jit(call)(params, *batch)


@functools.cache
def one_by_one(leaves: int, contract: Contract, dtype: str) -> Any:
    """The specification: every leaf alone, NumPy's additions, one rounding."""
    params, batch = drawn(leaves, dtype)
    alone = jax.jit(jax.value_and_grad(loss))
    found = [alone(params, *(x[i * EXAMPLES : (i + 1) * EXAMPLES] for x in batch)) for i in range(leaves)]
    wide = [jax.tree.map(lambda g: np.asarray(g, np.float32), of_leaf) for of_leaf in found]
    value, gradients = contract.tree_over(leaves).reduce(wide, lambda a, b: jax.tree.map(np.add, a, b))
    return value, jax.tree.map(lambda g: g.astype(jnp.dtype(dtype)), gradients)


@pytest.mark.parametrize(
    "leaves, arities, dtype, ranks",
    [
        (8, (2,), "float32", (1, 3, 8)),
        pytest.param(8, (2,), "bfloat16", (3,), marks=pytest.mark.slow),
        pytest.param(8, (8,), "float32", (3,), marks=pytest.mark.slow),
        pytest.param(7, (3, 2), "float32", (3,), marks=pytest.mark.slow),
    ],
)
def test_every_mesh(leaves, arities, dtype, ranks):
    contract = Contract(tree=arities)
    want = one_by_one(leaves, contract, dtype)
    for count in ranks:
        assert_bitwise_equal(on_mesh(count, leaves=leaves, contract=contract, dtype=dtype), want, f"{count} ranks")


@pytest.mark.parametrize("how", ["unchecked", "emulated"])
def test_emulated_and_without_types(how):
    contract = Contract()
    assert_bitwise_equal(on_mesh(3, leaves=8, contract=contract, how=how), one_by_one(8, contract, "float32"))


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_emulated_on_a_card(dtype):
    contract = Contract()
    for ranks in (1, 2, 3, 8):
        got = on_mesh(ranks, leaves=8, contract=contract, dtype=dtype, how="emulated")
        assert_bitwise_equal(got, one_by_one(8, contract, dtype), f"{ranks} ranks")


def test_one_device_without_a_mesh():
    contract = Contract()
    step = tree_value_and_grad(loss, axis_name=None, contract=contract)
    params, batch = drawn(8)
    assert_bitwise_equal(jax.jit(step)(params, *batch), one_by_one(8, contract, "float32"))


@pytest.mark.parametrize("ranks", [3, 8])
def test_what_leaves_give_beside(ranks):
    """One by one, in the slots of their ranks."""
    contract = Contract()
    params, batch = drawn(8)

    def with_largest(params: Any, x: jax.Array, y: jax.Array) -> Any:
        return loss(params, x, y), {"largest": x.max()}

    step = tree_value_and_grad(with_largest, axis_name="dp", contract=contract, has_aux=True)
    outs = ((P(), P("dp")), P())
    call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), in_specs=(P(), P("dp"), P("dp")), out_specs=outs)
    (value, beside), gradients = jax.jit(call)(params, *batch_slots(batch, leaves=8, ranks=ranks))
    assert_bitwise_equal((value, gradients), one_by_one(8, contract, "float32"))
    largest = np.asarray(batch[0]).reshape(8, -1).max(1)
    assert_bitwise_equal(from_slots(beside["largest"], schedule(contract.tree_over(8), ranks)), largest)


@pytest.mark.parametrize("algorithm", ["all_to_all", "butterfly"])
def test_algorithms(algorithm):
    contract = Contract()
    want = one_by_one(8, contract, "float32")
    assert_bitwise_equal(on_mesh(4, leaves=8, contract=contract, algorithm=algorithm), want)


@pytest.mark.slow
def test_bfloat16_gradients_in_float32_lose_less():
    contract = Contract()
    _, wide = on_mesh(2, leaves=8, contract=contract, dtype="bfloat16", dtype_of_gradients="float32")
    narrow = on_mesh(2, leaves=8, contract=contract, dtype="bfloat16")[1]
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(wide))
    assert_bitwise_equal(jax.tree.map(lambda g: g.astype(jnp.bfloat16), wide), narrow)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_slices_for_sharded_parameters(ranks):
    """What a rank keeps of a gradient is its slice of the whole one."""
    contract = Contract()
    params, batch = drawn(8)
    params = {"scale": params["scale"], "w": params["w"][:12], "bias": params["bias"][:12]}
    batch = (batch[0], batch[1][..., :12])
    want = jax.jit(tree_value_and_grad(loss, axis_name=None, contract=contract))(params, *batch)
    step = tree_value_and_grad(
        loss, axis_name="dp", contract=contract, scatter_dimensions={"scale": None, "w": 0, "bias": -1}
    )
    specs = {"scale": P(), "w": P("dp"), "bias": P("dp")}
    call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), in_specs=(P(), P("dp"), P("dp")), out_specs=(P(), specs))
    assert_bitwise_equal(jax.jit(call)(params, *batch_slots(batch, leaves=8, ranks=ranks)), want)


def test_twin_psum_differs():
    def step(params: Any, *batch: Any) -> Any:
        local = jax.tree.map(lambda p: lax.pcast(p, "dp", to="varying"), params)
        return lax.psum(jax.value_and_grad(loss)(local, *batch), "dp")

    params, batch = drawn(8)
    found = []
    for ranks in (1, 4, 8):
        call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), in_specs=(P(), P("dp"), P("dp")), out_specs=(P(), P()))
        found.append(jax.jit(call)(params, *batch))
    for name in ("scale", "w", "bias"):
        assert any((bits(other[1][name]) != bits(found[0][1][name])).any() for other in found), name


def test_values():
    """Against autodiff in float64, of the whole batch at once."""
    params, (x, y) = drawn(8)

    def plain(params: Any) -> Any:
        wide = np.asarray(x, np.float64)
        inverse = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
        normal = wide * inverse * params["scale"]
        apart = normal @ params["w"].T + params["bias"] - np.asarray(y, np.float64)
        d = {"w": np.einsum("btn,btd->nd", apart, normal), "bias": apart.sum((0, 1))}
        d["scale"] = ((apart @ params["w"]) * (wide * inverse)).sum((0, 1))
        return 0.5 * (apart**2).sum(), d

    value, gradients = on_mesh(3, leaves=8, contract=Contract())
    want, d = plain({name: np.asarray(p, np.float64) for name, p in params.items()})
    np.testing.assert_allclose(value, want, rtol=2e-6)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, d[name], rtol=0, atol=2e-6 * np.abs(d[name]).max(), err_msg=name)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(2, 5), min_size=1, max_size=3), st.data())
def test_any_tree_and_mesh(leaves, arities, data):
    """The machine that walks a rank's leaves, against the tree: sums that overflow nothing and forget everything but order."""
    ranks = data.draw(st.integers(1, min(leaves, 8)))
    tree = Tree(leaves, tuple(arities))
    values = np.random.default_rng(leaves).standard_normal(leaves).astype(np.float32) * 2.0 ** np.arange(leaves)
    values = values.astype(np.float32)
    step = tree_value_and_grad(
        lambda p, x: product(p, x[0]), axis_name="dp", contract=Contract(tree=tuple(arities)), leaves=leaves
    )
    call = emulate(step, ranks=ranks, axis_name="dp", in_specs=(P(), P("dp")), out_specs=(P(), P()))
    value, gradient = call(jnp.float32(1), batch_slots(jnp.asarray(values), leaves=leaves, ranks=ranks))
    want = tree.reduce(list(values), np.add)
    assert_bitwise_equal((value, gradient), (want, want))


def test_a_loss_that_needs_nothing_and_parameters_that_are_none():
    step = tree_value_and_grad(
        lambda p, x: (jnp.float32(2), {"count": 3}), axis_name="dp", contract=Contract(), has_aux=True
    )
    for ranks in (1, 8):
        call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), in_specs=(P(), P("dp")), out_specs=((P(), P("dp")), P()))
        (value, beside), gradients = jax.jit(call)({"w": jnp.ones(2), "b": None}, jnp.ones(8))
        assert (value, beside["count"].tolist(), gradients["b"]) == (16, [3] * 8, None)
        assert gradients["w"].tolist() == [0, 0]


def test_slots_of_a_batch():
    x = np.arange(14)
    assert batch_slots(x, leaves=7, ranks=7) is x
    laid_out = batch_slots(x, leaves=7, ranks=3).reshape(3, -1)
    assert laid_out.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 0, 1], [10, 11, 12, 13, 0, 1]]
    assert schedule(Tree(7), 3).slots == 3
    with pytest.raises(ValueError, match="not a multiple of the 4 leaves"):
        batch_slots(x, leaves=4, ranks=2)


def refused(match: str, step: Callable[..., Any], *arguments: Any, ranks: int = 2) -> None:
    specs = (P(), *[P("dp")] * (len(arguments) - 1))
    call = jax.shard_map(step, mesh=mesh_of(ranks, "dp"), in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match=match):
        jax.jit(call)(*arguments)


def test_what_does_not_fit_is_refused():
    contract = Contract()
    params, batch = drawn(8)
    of = functools.partial(tree_value_and_grad, axis_name="dp", contract=contract)
    refused("3 ranks but the batch only 2 leaves", of(loss, leaves=2), params, *drawn(3)[1], ranks=3)
    refused("multiple of 8 examples", of(loss), params, *drawn(5)[1][:2], ranks=1)
    refused(
        r"params\['b'\] is bool.*\s.*params\['w'\] is int32",
        of(loss),
        {"w": jnp.ones(3, int), "b": jnp.ones(2, bool)},
        *batch,
    )
    refused("must be a float scalar", of(lambda p, x, y: x), params, *batch)
    refused("say has_aux=True", of(lambda p, x, y: (x.sum(), x)), params, *batch)
    refused(r"it is \(scalar, aux\)", of(lambda p, x, y: x.sum(), has_aux=True), params, *batch)
    refused("dtype = .*int32.*: gradients are floats", of(loss, dtype=jnp.int32), params, *batch)
    refused(r"params\['bias'\].*dimension 0", of(loss, scatter_dimensions=0), params, *batch)
    refused("examples; give as many of each", of(loss), params, batch[0], batch[1][: 4 * EXAMPLES])
    with pytest.raises(ValueError, match="axis 'dp' is not bound"):
        of(loss)(params, *batch)
