"""Steps of an optimizer, and norms: the same bits on every shard of every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, emulate
from tbik_jax.kernels.exact import product, quotient, reciprocal
from tbik_jax.optimizer import Cut, adamw, apply_updates, clip_by_global_norm, global_norm
from tbik_jax.testing import assert_bitwise_equal, bits
from tests.meshes import mesh_of

pytestmark = pytest.mark.invariance

CONTRACT = Contract()
#: So many that XLA:CPU computes them in another way than a few, on several threads.
SIZE = 3_000_017


def drawn(rng: np.random.Generator, size: int = SIZE) -> tuple[Any, ...]:
    return tuple(rng.standard_normal(size).astype(np.float32) for _ in range(4))


def three_steps(params: Any, *gradients: Any, **how: Any) -> Any:
    """With a schedule."""
    optimizer = adamw(lambda count: quotient(jnp.float32(1e-2), 1.0 + count), weight_decay=0.1, **how)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(g, state, params)
        params = apply_updates(params, updates)
    return params, state


def clipped_steps(p: Any, *gradients: Any) -> Any:
    """Of gradients that are clipped in the same program; the last argument is their norm."""
    factor = jnp.minimum(1.0, reciprocal(gradients[-1]))
    return three_steps(p, *(product(g, factor) for g in gradients[:-1]))


def plain_moment(g: Any, mu: Any, norm: Any) -> Any:
    """Of a clipped gradient, as Optax writes it."""
    return (1 - 0.9) * (g * jnp.minimum(1.0, 1.0 / norm)) + 0.9 * mu


NORM = np.float32(1.7)
PIECES = [slice(0, 1), slice(0, 7), slice(5, 38), slice(77, 60_077)]


@pytest.mark.gpu  # here and there
def test_a_piece_of_an_array_has_the_bits_of_the_whole(rng):
    p, *gradients = drawn(rng)
    steps = jax.jit(clipped_steps)
    whole, of_whole = steps(p, *gradients, NORM)
    for piece in PIECES:
        part, of_part = steps(p[piece], *(g[piece] for g in gradients), NORM)
        assert_bitwise_equal((part, of_part.mu, of_part.nu), (whole[piece], of_whole.mu[piece], of_whole.nu[piece]))
    square, _ = steps(*(x[:2_000_000].reshape(2000, 1000) for x in (p, *gradients)), NORM)
    assert_bitwise_equal(square.reshape(-1), whole[:2_000_000], "another shape")
    assert_bitwise_equal(clipped_steps(p[:99], *(g[:99] for g in gradients), NORM)[0], whole[:99], "without jit")


def test_twin_a_plain_moment_depends_on_the_shape(rng):
    """Where XLA fuses another of the two products for few elements than for many."""
    g, mu, *_ = drawn(rng)
    moment = jax.jit(plain_moment)
    whole = moment(g, mu, NORM)
    if not any((bits(moment(g[piece], mu[piece], NORM)) != bits(whole)[piece]).any() for piece in PIECES):
        pytest.skip("XLA fuses alike in all shapes here: this processor or its number of threads hides the difference")


def test_values_of_steps(rng):
    """Against the formula in float64; moments of f32, and a step of about the rate."""
    p, *gradients = drawn(rng, 500)
    with np.errstate(all="ignore"):
        want = p.astype(np.float64)
        mu = nu = np.zeros(500)
        for t, g in enumerate(np.asarray(gradients, np.float64)):
            mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
            step = (mu / (1 - 0.9 ** (t + 1))) / (np.sqrt(nu / (1 - 0.999 ** (t + 1))) + 1e-8)
            want -= 1e-2 / (1 + t) * (step + 0.1 * want)
    got, state = three_steps(p, *gradients)
    # 1 - b2**t is 0.001 at first, known to a part in 20 000 in f32; of a step of 0.01.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert int(state.steps) == 3


def test_which_parameters_decay(rng):
    p, *gradients = drawn(rng, 50)
    both = {"w": p, "scale": p}
    given = [{"w": g, "scale": g} for g in gradients]
    decayed, kept = three_steps(p, *gradients)[0], three_steps(p, *gradients, mask=False)[0]
    for mask in ({"w": True, "scale": False}, lambda params: {name: name == "w" for name in params}):
        found, _ = three_steps(both, *given, mask=mask)
        assert_bitwise_equal(found, {"w": decayed, "scale": kept})
    assert (bits(decayed) != bits(kept)).any()


def test_parameters_of_bfloat16_keep_moments_of_float32(rng):
    p, g, *_ = (jnp.asarray(x, jnp.bfloat16) for x in drawn(rng, 50))
    after, state = three_steps(p, g)
    assert (after.dtype, state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    wide, _ = three_steps(p.astype(jnp.float32), g.astype(jnp.float32))
    assert_bitwise_equal(after, wide.astype(jnp.bfloat16))


def test_in_a_chain_of_optax(rng):
    optax = pytest.importorskip("optax", reason="Optax is not installed")
    p, g, *_ = drawn(rng, 50)
    chain = optax.chain(optax.scale(1.0), adamw(1e-2))
    updates, _ = chain.update(g, chain.init(p), p)
    assert_bitwise_equal(updates, adamw(1e-2).update(g, adamw(1e-2).init(p), p)[0])


# Norms -----------------------------------------------------------------------------------------------------------------


def arrays(rng: np.random.Generator) -> dict[str, Any]:
    """Cut along rows, by slots in the second dimension, along two dimensions, and not at all."""
    shapes = {"a": (24, 33), "b": (3, 8, 17), "c": (16, 5, 9), "d": (101,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def norms(rng: np.random.Generator, dp: int, tp: int) -> Any:
    given = arrays(rng)
    cuts = [(Cut("tp", 0, 8),), (Cut("tp", 1, 8),), (Cut("tp", 0, 8), Cut("dp", 2, 3)), ()]
    specs = {"a": P("tp"), "b": P(None, "tp"), "c": P("tp", None, "dp"), "d": P()}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: dp * tp]).reshape(dp, tp), ("dp", "tp"))

    def run(given: Any) -> Any:
        return clip_by_global_norm(given, 0.5, contract=CONTRACT, cuts=cuts)

    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=(specs, P())))(given)


def test_norms_on_every_mesh():
    one = norms(np.random.default_rng(4), 1, 1)
    for dp, tp in ((1, 2), (3, 1), (3, 4), (1, 8)):
        assert_bitwise_equal(norms(np.random.default_rng(4), dp, tp), one, f"dp {dp} x tp {tp}")
    given = arrays(np.random.default_rng(4))
    want = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in given.values()))
    np.testing.assert_allclose(one[1], want, rtol=1e-6)
    for name, x in one[0].items():
        np.testing.assert_allclose(x, given[name] * 0.5 / want, rtol=1e-6, atol=0, err_msg=name)


def test_norms_of_uneven_shares(rng):
    """Three ranks with three, three and two of eight leaves: what the idle slot holds does not count."""
    x = rng.standard_normal((8, 77)).astype(np.float32)
    padded = np.concatenate([x, np.full((1, 77), np.nan, np.float32)])
    found = [
        emulate(
            lambda x: global_norm([x], contract=CONTRACT, cuts=[(Cut("tp", 0, 8),)]),
            ranks=ranks,
            in_specs=(P("tp"),),
            out_specs=P(),
        )(given)
        for ranks, given in ((1, x), (3, padded))
    ]
    assert_bitwise_equal(found[1], found[0])


def test_who_looks_at_the_norm_changes_nothing(rng):
    """XLA would make another root of one that only a quotient needs."""

    def clip(x: Any) -> Any:
        return clip_by_global_norm(x, 0.5, contract=CONTRACT)

    both, alone = jax.jit(clip), jax.jit(lambda x: clip(x)[0])
    for _ in range(10):
        given = [rng.standard_normal(33).astype(np.float32)]
        assert_bitwise_equal(alone(given), both(given)[0])


def test_small_gradients_are_not_clipped(rng):
    given = arrays(rng)
    clipped, norm = jax.jit(lambda x: clip_by_global_norm(x, 1e6, contract=CONTRACT))(given)
    assert_bitwise_equal(clipped, given)
    assert norm > 1


def test_twin_a_plain_norm_differs():
    given = arrays(np.random.default_rng(4))["a"]

    def run(x: Any) -> Any:
        return jnp.sqrt(jax.lax.psum(jnp.sum(x * x), "tp"))

    found = [
        jax.jit(jax.shard_map(run, mesh=mesh_of(ranks), in_specs=P("tp"), out_specs=P()))(given * scale)
        for scale in (1, 3, 7)
        for ranks in (1, 2, 4, 8)
    ]
    assert any((bits(found[4 * i + j]) != bits(found[4 * i])).any() for i in range(3) for j in range(4))


def test_what_does_not_fit_is_refused(rng):
    x = rng.standard_normal((6, 5)).astype(np.float32)
    for cuts, message in (
        (
            [(Cut(None, 0, 4),)],
            r"which Cut\(axis_name=None, dimension=0, leaves=4\) over 1 ranks does not cut in 4 slots",
        ),
        ([(Cut(None, 0, 3), Cut(None, 0, 2))], "cut twice along a dimension"),
        ([(), ()], "2 tuples of cuts for 1 arrays"),
        ([(Cut("tp", 0, 3),)], "axis 'tp' is not bound"),
        ([Cut(None, 0, 3)], "not a tuple of Cut"),
        ([(Cut(None, -1, 5),)], "without a dimension of"),
    ):
        with pytest.raises(ValueError, match=message):
            global_norm([x], contract=CONTRACT, cuts=cuts)
    for wrong in (x.astype(np.complex64), x.astype(np.int32), x[:0]):
        with pytest.raises(ValueError, match="give floats, at least one"):
            global_norm([wrong], contract=CONTRACT)
    with pytest.raises(ValueError, match="max_norm = -1 is not above 0"):
        clip_by_global_norm([x], -1, contract=CONTRACT)
    y = rng.standard_normal((72, 5)).astype(np.float32)
    for ranks, cuts, message in (
        (2, (), r"differs over \['tp'\], which its cuts do not name"),
        (3, [(Cut("tp", 0, 8),)], "over 3 ranks does not cut in 3 slots of whole leaves"),
    ):
        run = jax.shard_map(
            lambda y, cuts=cuts: global_norm([y], contract=CONTRACT, cuts=cuts),
            mesh=mesh_of(ranks),
            in_specs=P("tp"),
            out_specs=P(),
        )
        with pytest.raises(ValueError, match=message):
            jax.jit(run)(y)
    optimizer = adamw(1e-3)
    with pytest.raises(ValueError, match="update wants the parameters too"):
        optimizer.update(x, optimizer.init(x))
    with pytest.raises(ValueError, match="the gradients are no pytree like the parameters"):
        optimizer.update({"x": x}, optimizer.init(x), x)
    with pytest.raises(ValueError, match=r"gradients is float32\(5,\); the moments there have shape \(6, 5\)"):
        optimizer.update(x[0], optimizer.init(x), x)
    with pytest.raises(ValueError, match=r"b1 = 1.0 is outside \[0, 1\)\s.*eps = 0 is not above 0"):
        adamw(1e-3, b1=1.0, eps=0)
