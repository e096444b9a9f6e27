"""Gradients of whole models by every parameter: the same bits on every mesh whose tensor-parallel size divides the KV heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, batch_slots, dense, emulate, tree_value_and_grad
from tbik_jax.engine import make_mesh
from tbik_jax.kernels.exact import product
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.layout import Layout
from tbik_jax.models.linear import cuts
from tbik_jax.models.loading import load
from tbik_jax.models.random import RandomSource
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics
from tbik_jax.optimizer import AdamWState, adamw, apply_updates, clip_by_global_norm, global_norm
from tbik_jax.testing import assert_bitwise_equal, bits
from tests.generators import SMALL

pytestmark = pytest.mark.invariance

INVARIANT, PLAIN = Numerics.invariant(), Numerics.plain()
#: Two query heads a KV head; leaves of one head, and of eleven feed-forward columns.
GROUPED = dataclasses.replace(SMALL, num_heads=12, num_kv_heads=6, intermediate_size=88, qk_norm=True)
#: With heads that Hopper's attention knows, and a scale of its own for queries and keys.
ON_A_CARD = dataclasses.replace(
    GROUPED, hidden_size=328, head_dim=64, num_heads=16, num_kv_heads=8, intermediate_size=8 * 44
)
TOKENS = np.random.default_rng(5).integers(0, 256, (3, 29))
TOKENS[1, 3:9] = TOKENS[0, 0]  # a row of the embedding that many tokens share


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def split(model: Transformer) -> tuple[Any, nnx.State, Any]:
    """Graph, state, and the state's specs."""
    graph, state = nnx.split(model)
    return graph, state, jax.tree.map(lambda v: v.replace(v.get_metadata()["spec"]), state, is_leaf=is_variable)


def by_name(gradients: Any) -> dict[str, np.ndarray]:
    variables = jax.tree.leaves(gradients, is_leaf=is_variable)
    return {v.get_metadata()["origin"].tensors[0]: by_block(v) for v in variables}


def backward(model: Transformer) -> tuple[Callable[..., Any], nnx.State, Any]:
    """``(state, tokens, d_logits) -> (logits, gradients)`` for ``shard_map``, the state, and its specs."""
    graph, state, specs = split(model)

    def run(state: Any, tokens: jax.Array, d_logits: jax.Array) -> tuple[jax.Array, Any]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        logits, pull = jax.vjp(lambda state: nnx.merge(graph, state)(tokens, positions)[0], state)
        return logits, pull(d_logits)[0]

    return run, state, specs


def by_block(gradient: nnx.Variable[Any]) -> np.ndarray:
    """Without slots: the blocks of the stored tensor, in their order."""
    origin, x = gradient.get_metadata()["origin"], np.asarray(gradient[...])
    if origin.cut == "whole":
        return x
    return x.take([origin.slots.index(block) for block in range(max(origin.slots) + 1)], axis=int(origin.stacked))


def gradients(
    config: ModelConfig, tp: int, *, numerics: Numerics = INVARIANT, dtype: str = "float32", emulated: bool = False
) -> dict[str, np.ndarray]:
    """The logits, and the gradient by every parameter."""
    mesh = make_mesh(1 if emulated else tp)
    model = load(config, RandomSource(config), numerics, mesh, dtype=dtype, ranks=tp if emulated else None)
    run, state, specs = backward(model)
    d_logits = np.random.default_rng(6).standard_normal((*TOKENS.shape, config.vocab_size), np.float32)
    lie = {"in_specs": (specs, P(), P()), "out_specs": (P(), specs)}
    if emulated:
        call = emulate(run, ranks=tp, axis_name="tp", **lie)
    else:
        call = jax.jit(jax.shard_map(run, mesh=mesh, **lie))
    logits, found = call(state, TOKENS, d_logits)
    return {"logits": np.asarray(logits), **by_name(found)}


#: Four leaves of two sequences; a label that is none.
BATCH = np.concatenate([TOKENS, TOKENS[::-1, ::-1], TOKENS[:2, ::-1]])
LABELS = np.where(np.arange(29) == 4, -100, np.roll(BATCH, -1, axis=1))
#: Quick to compile.
SHALLOW = dataclasses.replace(GROUPED, num_layers=1)


def trained(
    dp: int,
    tp: int,
    *,
    numerics: Numerics = INVARIANT,
    dtype: str = "float32",
    config: ModelConfig = SHALLOW,
    emulated: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Two steps of training: the losses, and by name the first gradients, and what became of parameters and moments."""
    mesh = make_mesh(1, 1) if emulated else make_mesh(tp, dp)
    model = load(config, RandomSource(config), numerics, mesh, dtype=dtype, ranks=tp if emulated else None)
    graph, state, specs = split(model)
    count = int((LABELS >= 0).sum())
    optimizer = adamw(1e-2, weight_decay=0.1)

    def loss(state: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        losses = nnx.merge(graph, state).cross_entropy(tokens, positions, labels)
        return product(dense.token_sum(losses), 1 / count)

    gradient_of = tree_value_and_grad(loss, axis_name="dp", contract=numerics.contract, leaves=4, dtype=jnp.float32)

    def step(state: Any, moments: Any, *batch: jax.Array) -> Any:
        value, gradients = gradient_of(state, *batch)
        clipped, norm = clip_by_global_norm(
            gradients, 0.3, contract=numerics.contract, cuts=cuts(gradients, numerics.contract)
        )
        updates, moments = optimizer.update(clipped, moments, state)
        return {"loss": value, "norm": norm}, gradients, apply_updates(state, updates), moments

    of_moments = AdamWState(P(), P(), specs, specs)
    outs = (P(), specs, specs, of_moments)
    if emulated:
        of_tensor = emulate(step, ranks=tp, in_specs=(specs, of_moments, P(), P()), out_specs=outs)
        call = jax.jit(
            emulate(of_tensor, ranks=dp, axis_name="dp", in_specs=(P(), P(), P("dp"), P("dp")), out_specs=(P(),) * 4)
        )
    else:
        in_specs = (specs, of_moments, P("dp"), P("dp"))
        call = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=outs))
    batch = batch_slots((BATCH, LABELS), leaves=4, ranks=dp)
    # Laid out as what comes back, so that the second step is the program of the first.
    laid_out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), (of_moments, P("dp")), is_leaf=lambda x: isinstance(x, P)
    )
    moments, batch = jax.device_put((optimizer.init(state), batch), laid_out)
    first, gradients, state, moments = call(state, moments, *batch)
    second, _, state, moments = call(state, moments, *batch)
    numbers = {f"{name} {at}": np.asarray(x) for at, of in enumerate((first, second)) for name, x in of.items()}
    return {
        "numbers": numbers,
        "gradients": by_name(gradients),
        "parameters": by_name(state),
        "mu": by_name(moments.mu),
        "nu": by_name(moments.nu),
    }


@pytest.fixture(scope="module")
def on_one_device() -> dict[str, dict[str, np.ndarray]]:
    return trained(1, 1)


@pytest.fixture(scope="module")
def plain_on_one_device() -> dict[str, dict[str, np.ndarray]]:
    return trained(1, 1, numerics=PLAIN)


@pytest.mark.slow
def test_training_on_a_mesh(on_one_device):
    assert_bitwise_equal(trained(3, 2), on_one_device)


@pytest.mark.slow
def test_training_emulated(on_one_device):
    assert_bitwise_equal(trained(3, 2, emulated=True), on_one_device)


@pytest.mark.slow
def test_values_of_training(on_one_device, plain_on_one_device):
    """Against plain numerics on the same tree over the batch; losses fall."""
    numbers, plain = on_one_device["numbers"], plain_on_one_device
    for name, got in on_one_device["gradients"].items():
        want = plain["gradients"][name]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)
    for name, number in numbers.items():
        np.testing.assert_allclose(number, plain["numbers"][name], rtol=1e-4, err_msg=name)
    assert numbers["loss 1"] < numbers["loss 0"]
    assert numbers["norm 0"] > 0.3, "nothing was clipped"


@pytest.mark.slow
def test_twin_plain_training_differs_between_meshes(plain_on_one_device):
    one, other = plain_on_one_device["gradients"], trained(2, 3, numerics=PLAIN)["gradients"]
    assert any((bits(one[name]) != bits(other[name])).any() for name in one)


@pytest.fixture(scope="module")
def want() -> dict[str, np.ndarray]:
    return gradients(GROUPED, 1)


def test_another_mesh(want):
    assert_bitwise_equal(gradients(GROUPED, 3), want, "3 ranks")


@pytest.mark.slow
def test_bfloat16_and_a_head_of_its_own():
    config = dataclasses.replace(GROUPED, tie_word_embeddings=not GROUPED.tie_word_embeddings, num_layers=1)
    numerics = Numerics.invariant(Contract(tree=(3, 2, 2)))
    one = gradients(config, 1, numerics=numerics, dtype="bfloat16")
    assert_bitwise_equal(gradients(config, 2, numerics=numerics, dtype="bfloat16"), one, "2 ranks")


def test_values(want):
    """Against autodiff of plain numerics, which errs as much: float32 sums of some hundred terms, two layers deep."""
    plain = gradients(GROUPED, 1, numerics=PLAIN)
    for name, got in want.items():
        np.testing.assert_allclose(got, plain[name], rtol=0, atol=2e-5 * np.abs(plain[name]).max(), err_msg=name)


on_the_card = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason=f"needs a Hopper GPU; the default backend is {jax.default_backend()}"
)


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("tree", [(2,), (8,)])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_one_card_emulates_every_mesh(tree, tp):
    numerics = Numerics.invariant(Contract(tree=tree))
    one = gradients(ON_A_CARD, 1, numerics=numerics, dtype="bfloat16")
    got = gradients(ON_A_CARD, tp, numerics=numerics, dtype="bfloat16", emulated=True)
    assert_bitwise_equal(got, one, f"{tp} emulated ranks")


@on_the_card
@pytest.mark.gpu
@pytest.mark.parametrize("dp, tp", [(3, 1), (2, 4)])
def test_training_emulated_on_a_card(dp, tp):
    how: dict[str, Any] = {"dtype": "bfloat16", "config": dataclasses.replace(ON_A_CARD, num_layers=1)}
    assert_bitwise_equal(trained(dp, tp, **how, emulated=True), trained(1, 1, **how))


@on_the_card
@pytest.mark.gpu
def test_values_on_a_card():
    """Near plain bfloat16 gradients, two layers deep."""
    one, plain = (gradients(ON_A_CARD, 1, numerics=numerics, dtype="bfloat16") for numerics in (INVARIANT, PLAIN))
    for name, got in one.items():
        want = plain[name].astype(np.float32)
        assert np.linalg.norm(got.astype(np.float32) - want) < 0.03 * np.linalg.norm(want), name


@pytest.mark.parametrize(
    "tp, unstack, message",
    [(4, False, "k_proj.weight: its 6 blocks lie on 4 ranks as no tree"), (2, True, "layers are apart")],
)
def test_norms_of_what_has_no_order_are_refused(tp, unstack, message):
    mesh = make_mesh(tp)
    model = load(SHALLOW, RandomSource(SHALLOW), INVARIANT, mesh)
    if unstack:
        model.unstack(mesh)
    _, state, specs = split(model)
    run = jax.shard_map(
        lambda s: global_norm(s, contract=Contract(), cuts=cuts(s, Contract())),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(run)(state)


def test_copies_of_a_kv_head_are_refused():
    """Their gradients would have to be added in an order that no tree gives yet."""
    assert Layout(SMALL, Contract(), 3).kv_of_head is not None
    with pytest.raises(ValueError, match=r"[kv]_proj: 3 tensor-parallel ranks do not divide the KV heads"):
        gradients(SMALL, 3)
