"""Programs for several Hopper GPUs, traced where there is none: what varies over the mesh is typed so, gradients too."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, collectives, dense, tree_value_and_grad
from tbik_jax.engine import Generator, Sampling, make_mesh
from tbik_jax.kernels import backend, matmul
from tbik_jax.models.loading import load
from tbik_jax.models.random import RandomSource
from tbik_jax.numerics import Numerics
from tests.generators import SMALL
from tests.meshes import mesh_of
from tests.models.test_gradients import backward, split

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="its meshes are of virtual CPU devices, which are not the default here"
)
CONTRACT = Contract()


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    from tbik_jax.kernels.matmul import hopper

    monkeypatch.setattr(backend, "family", lambda: "sm90")
    monkeypatch.setattr(matmul, "_family", lambda: "sm90")
    monkeypatch.setattr(backend, "multiprocessors", lambda: 132)
    monkeypatch.setattr(hopper, "_multiprocessors", lambda: 132)
    jax.clear_caches()
    yield
    jax.clear_caches()


def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def pulled(f, *specs):
    """Shapes of ``f`` and its gradients inside ``shard_map``, whose types say what is the same on all ranks."""

    def run(x, w, dy):
        y, pull = jax.vjp(f, x, w)
        return y, pull(dy)

    x, w, y = specs
    return jax.shard_map(run, mesh=mesh_of(4), in_specs=specs, out_specs=(y, (x, w)))


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("leaves", [8, 6])
def test_row_parallel(rows, leaves):
    """Six leaves over four ranks are uneven: their sum takes another way."""
    slots = -(-leaves // 4)
    run = pulled(
        lambda x, w: dense.row_parallel(x, w, axis_name="tp", contract=CONTRACT, leaves=leaves),
        P(None, "tp"),
        P("tp"),
        P(),
    )
    y, (dx, dw) = jax.eval_shape(run, of(rows, 4 * slots * 64), of(4 * slots, 128, 64), of(rows, 128))
    assert (y.shape, dx.shape, dw.shape) == ((rows, 128), (rows, 4 * slots * 64), (4 * slots, 128, 64))


@pytest.mark.parametrize("rows", [5, 300])
def test_column_parallel(rows):
    run = pulled(
        lambda x, w: dense.column_parallel(x, w, axis_name="tp", contract=CONTRACT, leaves=8),
        P(),
        P("tp"),
        P(None, "tp"),
    )
    y, (dx, dw) = jax.eval_shape(run, of(rows, 64), of(8, 32, 64), of(rows, 256))
    assert (y.shape, dx.shape, dw.shape) == ((rows, 256), (rows, 64), (8, 32, 64))


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("tree", [(2,), (8,)])
def test_a_model_whose_nodes_travel_by_mailbox(monkeypatch, tree, unroll):
    """A prefill and a decode step on four GPUs: one mailbox a program, a kernel for every sum and the norm behind it."""
    from tbik_jax.kernels.hopper import compat

    monkeypatch.setattr(collectives, "_not_direct", list)
    config = dataclasses.replace(SMALL, head_dim=64, num_heads=8, num_kv_heads=4)
    numerics = Numerics.invariant(Contract(tree=tree), algorithm="direct")
    mesh = make_mesh(tp=4)
    model = load(config, RandomSource(config), numerics, mesh, dtype="bfloat16")
    run = Generator(model, mesh, unroll=unroll)
    prefill, decode = run._compiled(Sampling())
    cache = run.new_cache(2, 128)
    rows = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.int32, jnp.int32, jnp.uint32)]
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    for step, given in ((prefill, (tokens, *rows[1:], cache)), (decode, (*rows, cache))):
        found, _ = jax.eval_shape(step, run._state, *given)
        assert (found.tokens.shape, found.logits.shape, found.log_probs) == ((2,), (2, config.vocab_size), None)
        text = str(jax.make_jaxpr(step)(run._state, *given))
        # The layers are traced once, whether they are scanned or called.
        assert (text.count("name=open_mailbox"), text.count("name=sum_add_norm")) == (1, 2)
        assert text.count("name=_write_kv") == (unroll and compat.CHANGES_ARRAYS)


@pytest.mark.parametrize("dp, tp", [(1, 1), (3, 2)])
def test_the_gradient_over_a_batch(dp, tp):
    config = dataclasses.replace(SMALL, head_dim=64, num_heads=8, num_kv_heads=4, qk_norm=True)
    mesh = make_mesh(tp, dp)
    graph, state, specs = split(
        load(config, RandomSource(config), Numerics.invariant(CONTRACT), mesh, dtype="bfloat16")
    )

    def loss(state, tokens):
        positions = jnp.broadcast_to(jnp.arange(30), tokens.shape)
        return dense.token_sum(nnx.merge(graph, state).cross_entropy(tokens, positions, tokens))

    step = tree_value_and_grad(loss, axis_name="dp", contract=CONTRACT, dtype=jnp.float32)
    whole = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("dp")), out_specs=(P(), specs))
    slots = -(-CONTRACT.leaves // dp)
    _, gradients = jax.eval_shape(whole, state, jax.ShapeDtypeStruct((dp * slots * 2, 30), jnp.int32))
    assert jax.tree.map(lambda x: x.shape, gradients) == jax.tree.map(lambda x: x.shape, state)
    assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_gradient_of_a_model(tied, ranks):
    config = dataclasses.replace(
        SMALL, head_dim=64, num_heads=8, num_kv_heads=4, tie_word_embeddings=tied, qk_norm=not tied
    )
    mesh = make_mesh(tp=ranks)
    model = load(config, RandomSource(config), Numerics.invariant(CONTRACT), mesh, dtype="bfloat16")
    run, state, specs = backward(model)
    whole = jax.shard_map(run, mesh=mesh, in_specs=(specs, P(), P()), out_specs=(P(), specs))
    logits = jax.ShapeDtypeStruct((2, 30, config.vocab_size), jnp.float32)
    found, gradients = jax.eval_shape(whole, state, jax.ShapeDtypeStruct((2, 30), jnp.int32), logits)
    assert (found.shape, found.dtype) == (logits.shape, logits.dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
