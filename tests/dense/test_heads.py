"""Norms of heads that an axis splits: one scale, whose gradient has the same bits on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tbik_jax import Contract, emulate
from tbik_jax.dense import head_parallel_norm_rope, norm_rope
from tbik_jax.testing import assert_bitwise_equal, bits
from tbik_jax.tree import schedule
from tests.kernels import families
from tests.meshes import by_slot, from_slots, mesh_of

pytestmark = pytest.mark.invariance

CONTRACT, EPS = Contract(leaves=8), 1e-6
TOKENS, DIM = (2, 9), 16
HEADS = P(None, None, "tp")
SPECS = (HEADS, HEADS, P(), P(), P(), P(), HEADS, HEADS)


def case(rng: np.random.Generator, dtype: Any) -> list[np.ndarray]:
    """Eight leaves of three query heads, and of one KV head: q, k, scales, angles, cotangents."""
    of = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    angle = rng.standard_normal((*TOKENS, DIM // 2))
    tables = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return [
        of(*TOKENS, 24, DIM),
        of(*TOKENS, 8, DIM),
        of(DIM),
        of(DIM),
        *tables,
        of(*TOKENS, 24, DIM),
        of(*TOKENS, 8, DIM),
    ]


def gradients(leaves: tuple[int | None, int | None] = (8, 8), axis_name: str | None = "tp") -> Any:
    def run(q, k, q_scale, k_scale, cos, sin, dq, dk):
        def forward(q, k, q_scale, k_scale):
            return head_parallel_norm_rope(
                q, k, q_scale, k_scale, cos, sin, eps=EPS, axis_name=axis_name, contract=CONTRACT, leaves=leaves
            )

        y, pull = jax.vjp(forward, q, k, q_scale, k_scale)
        return y, pull((dq, dk))

    return run


@jax.jit
def without_a_mesh(q, k, q_scale, k_scale, cos, sin, dq, dk):
    y, pull = jax.vjp(lambda *of: norm_rope(*of, cos, sin, eps=EPS), q, k, q_scale, k_scale)
    return y, pull((dq, dk))


def leaf_by_leaf(q, k, q_scale, k_scale, cos, sin, dq, dk):
    """The gradients of each leaf's heads alone; those of the scales in f32, and then the tree over leaves."""
    scales = [scale.astype(np.float32) for scale in (q_scale, k_scale)]
    leaves = zip(*(np.split(x, 8, 2) for x in (q, k, dq, dk)), strict=True)
    each = [without_a_mesh(q, k, *scales, cos, sin, dq, dk)[1] for q, k, dq, dk in leaves]
    *rows, of_q, of_k = (list(map(np.asarray, parts)) for parts in zip(*each, strict=True))
    d_scales = [CONTRACT.tree_over(8).reduce(parts, np.add).astype(q_scale.dtype) for parts in (of_q, of_k)]
    return [np.concatenate(parts, 2) for parts in rows], d_scales


def slotted(x: np.ndarray, ranks: int) -> np.ndarray:
    plan = schedule(CONTRACT.tree_over(8), ranks)
    by_leaf = np.moveaxis(x.reshape(*TOKENS, 8, -1, DIM), 2, 0)
    return np.moveaxis(by_slot(by_leaf, plan), 0, 2).reshape(*TOKENS, -1, DIM)


def unslotted(x: Any, ranks: int) -> np.ndarray:
    plan = schedule(CONTRACT.tree_over(8), ranks)
    by_leaf = np.moveaxis(np.asarray(x).reshape(*TOKENS, ranks * plan.slots, -1, DIM), 2, 0)
    return np.moveaxis(np.asarray(from_slots(by_leaf, plan)), 0, 2).reshape(*TOKENS, -1, DIM)


@pytest.mark.parametrize(
    "ranks, dtype",
    [
        (3, "float32"),
        pytest.param(3, "bfloat16", marks=pytest.mark.slow),
        pytest.param(8, "float32", marks=pytest.mark.slow),
    ],
)
def test_any_mesh(rng, ranks, dtype):
    """Against the stage without a mesh, and its scales' gradients leaf by leaf; NaN where no rank may read."""
    arguments = case(rng, dtype)
    y, (*d_rows, _, _) = without_a_mesh(*arguments)
    _, d_scales = leaf_by_leaf(*arguments)
    given = [slotted(x, ranks) if spec == HEADS else x for x, spec in zip(arguments, SPECS, strict=True)]
    lie = {"in_specs": SPECS, "out_specs": ((HEADS, HEADS), (HEADS, HEADS, P(), P()))}

    def check(run: Any) -> None:
        found_y, (found_dq, found_dk, *found_scales) = run(*given)
        assert_bitwise_equal([unslotted(x, ranks) for x in found_y], list(y))
        assert_bitwise_equal([unslotted(x, ranks) for x in (found_dq, found_dk)], d_rows)
        assert_bitwise_equal(found_scales, d_scales)

    check(emulate(gradients(), ranks=ranks, **lie))
    check(jax.jit(jax.shard_map(gradients(), mesh=mesh_of(ranks), **lie)))


@pytest.mark.parametrize("ranks", [3, 8])
def test_leaves_in_one_launch(rng, monkeypatch, ranks):
    """Family ``sm90`` has a kernel for heads of 64, which takes all leaves at once: every mesh against one leaf after another."""
    if jax.default_backend() == "cpu":
        families.hopper(monkeypatch)
    monkeypatch.setitem(globals(), "DIM", 64)
    jax.clear_caches()
    arguments = case(rng, "bfloat16")
    want_rows, want_scales = leaf_by_leaf(*arguments)
    given = [slotted(x, ranks) if spec == HEADS else x for x, spec in zip(arguments, SPECS, strict=True)]
    lie = {"in_specs": SPECS, "out_specs": ((HEADS, HEADS), (HEADS, HEADS, P(), P()))}
    _, (found_dq, found_dk, *found_scales) = jax.jit(emulate(gradients(), ranks=ranks, **lie))(*given)
    assert_bitwise_equal([unslotted(x, ranks) for x in (found_dq, found_dk)], want_rows)
    assert_bitwise_equal(found_scales, want_scales)
    alone = jax.jit(gradients(axis_name=None))(*arguments)[1]
    assert_bitwise_equal(alone, (*want_rows, *want_scales))
    jax.clear_caches()


def test_one_device_without_an_axis(rng):
    arguments = case(rng, "float32")
    lie = {"in_specs": SPECS, "out_specs": ((HEADS, HEADS), (HEADS, HEADS, P(), P()))}
    want = jax.jit(jax.shard_map(gradients(), mesh=mesh_of(1), **lie))(*arguments)
    assert_bitwise_equal(jax.jit(gradients(axis_name=None))(*arguments), want)


def test_twin_the_sum_of_all_ranks_has_other_bits(rng):
    arguments = case(rng, "float32")

    def plain(q, k, q_scale, k_scale, cos, sin, dq, dk):
        _, pull = jax.vjp(
            lambda scale: norm_rope(q, k, scale, k_scale, cos, sin, eps=EPS)[0], lax.pcast(q_scale, "tp", to="varying")
        )
        return lax.psum(pull(dq)[0], "tp")

    one, many = (
        jax.jit(jax.shard_map(plain, mesh=mesh_of(ranks), in_specs=SPECS, out_specs=P()))(*arguments)
        for ranks in (1, 4)
    )
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-4)
    assert (bits(one) != bits(many)).any()


def test_refusals(rng):
    arguments = case(rng, "float32")
    with pytest.raises(ValueError, match="q has 24 heads for 5 slots: 5 leaves over 1 ranks"):
        jax.eval_shape(gradients((5, 8), None), *arguments)
    lie = {"in_specs": SPECS, "out_specs": ((HEADS, HEADS), (HEADS, HEADS, P(), P()))}
    with pytest.raises(ValueError, match=r"^dense\.head_parallel_norm_rope: 2 problems"):
        jax.eval_shape(jax.shard_map(gradients((3, 2)), mesh=mesh_of(4), **lie), *arguments)
    with pytest.raises(ValueError, match=r"their scale has no gradient yet\. Use a mesh that divides the KV heads"):
        jax.eval_shape(jax.shard_map(gradients((8, None)), mesh=mesh_of(4), **lie), *arguments)
