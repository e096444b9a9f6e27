"""What is split over heads, but has one scale for all of them."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from tbik_jax._axes import axis_size, vary_like
from tbik_jax._problems import Problems
from tbik_jax.collectives import sum_of_leaves
from tbik_jax.contract import Contract
from tbik_jax.kernels.exact import cast
from tbik_jax.kernels.norm_rope import norm_rope, norm_rope_gradients_by_leaf
from tbik_jax.tree import Tree, schedule

Array = jax.Array


def head_parallel_norm_rope(
    q: Array,
    k: Array,
    q_scale: Array,
    k_scale: Array,
    cos: Array,
    sin: Array,
    *,
    eps: float,
    axis_name: str | None,
    contract: Contract,
    leaves: tuple[int | None, int | None],
) -> tuple[Array, Array]:
    """RMSNorm of queries and keys and their rotation (Qwen3), where the axis splits the heads and all share two scales.

        y = rope(rms_norm(x, scale), cos, sin)        d_scale = sum over tokens and heads

    Args:
        q, k: ``[..., slots * heads per leaf, D]``, this rank's.
        q_scale, k_scale: ``[D]``, the same on every rank.
        cos, sin: ``[..., D / 2]`` f32.
        eps: Of the norms.
        axis_name: Axis of the enclosing ``shard_map``; ``None`` where one device holds everything.
        contract: Numerics-bearing.
        leaves: Leaves of the query heads and of the KV heads over the whole axis, for the backward pass. None: the heads of
            all ranks are no such leaves (copies), and there is no gradient.

    Guarantee: forward :func:`tbik_jax.kernels.norm_rope.norm_rope`, row by row. The scales' gradients are f32: the tree of
    their norm over a leaf's tokens and heads, then the canonical tree over leaves; bitwise equal on every mesh. The tokens
    are those at hand.

    Raises:
        ValueError: heads that do not fit the leaves; None for leaves, where a gradient is taken.
    """
    ranks = 1 if axis_name is None else axis_size(axis_name)
    trees: list[Tree | None] = []
    with Problems("dense.head_parallel_norm_rope") as problems:
        for name, x, count in (("q", q, leaves[0]), ("k", k, leaves[1])):
            if count is None:
                trees.append(None)
                continue
            if problems.check(ranks <= count, f"axis {axis_name!r} has {ranks} ranks, {name} only {count} leaves"):
                slots = schedule(tree := contract.tree_over(count), ranks).slots
                problems.check(
                    x.shape[-2] % slots == 0,
                    f"{name} has {x.shape[-2]} heads for {slots} slots: {count} leaves over {ranks} ranks",
                )
                trees.append(tree)
    return _norm_rope(axis_name, float(eps), tuple(trees), q, k, q_scale, k_scale, cos, sin)


_Trees = tuple[Tree | None, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _norm_rope(axis_name: str | None, eps: float, trees: _Trees, *arrays: Array) -> tuple[Array, Array]:
    return norm_rope(*arrays, eps=eps)


def _forward(
    axis_name: str | None, eps: float, trees: _Trees, *arrays: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    return _norm_rope(axis_name, eps, trees, *arrays), arrays


def _backward(
    axis_name: str | None, eps: float, trees: _Trees, saved: tuple[Array, ...], given: tuple[Array, Array]
) -> tuple[Array, ...]:
    if None in trees:
        raise ValueError(
            "dense.head_parallel_norm_rope: the heads of all ranks are no leaves of a tree, since some are on several ranks; "
            "their scale has no gradient yet. Use a mesh that divides the KV heads"
        )
    q, k, q_scale, k_scale, cos, sin = saved
    plans = [schedule(tree, 1 if axis_name is None else axis_size(axis_name)) for tree in trees if tree is not None]
    # Whose gradients are this rank's.
    scales = [vary_like(scale, x, dy) for scale, x, dy in zip((q_scale, k_scale), (q, k), given, strict=True)]
    (dq, dk), parts = norm_rope_gradients_by_leaf(
        (q, k), scales, given, cos, sin, eps=eps, leaves=[plan.slots for plan in plans]
    )
    dq_scale, dk_scale = (
        cast(sum_of_leaves(of_leaves, axis_name, plan.tree), scale.dtype)
        for plan, of_leaves, scale in zip(plans, parts, (q_scale, k_scale), strict=True)
    )
    return dq, dk, dq_scale, dk_scale, jnp.zeros_like(cos), jnp.zeros_like(sin)


_norm_rope.defvjp(_forward, _backward)
