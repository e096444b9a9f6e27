"""Gradients whose sums over a batch have the order of the canonical tree: on any data-parallel mesh, in any number of steps.

A batch is cut in leaves, as everything else that a mesh may split. A leaf's gradient is what autodiff makes of it alone; the
gradients of all leaves are added by the tree, inside a rank while it goes from leaf to leaf, and across ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from tbik_jax._axes import axes_of_type, axis_size, vary
from tbik_jax._problems import Problems
from tbik_jax.collectives import Algorithm, tree_psum, tree_psum_scatter
from tbik_jax.contract import Contract
from tbik_jax.kernels.exact import cast, rounded
from tbik_jax.program import program
from tbik_jax.tree import Schedule, leaf_ranges, schedule

Array = jax.Array


def tree_value_and_grad(
    f: Callable[..., Any],
    *,
    axis_name: str | None,
    contract: Contract,
    leaves: int | None = None,
    has_aux: bool = False,
    dtype: DTypeLike | None = None,
    scatter_dimensions: Any = None,
    algorithm: Algorithm = "auto",
) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of a sum over a batch that a data-parallel axis splits.

        value = tree_l  f(params, batch_l)            grad = tree_l  d f(params, batch_l) / d params

    >>> def loss(params, tokens):  # a sum over the leaf's tokens; divide by the global count for a mean
    ...     return dense.token_sum(dense.cross_entropy(model(params, tokens[:, :-1]), tokens[:, 1:], vocabulary))
    >>> step = tree_value_and_grad(loss, axis_name="dp", contract=contract)
    >>> value, gradients = step(params, tokens)  # inside jax.shard_map; a rank's tokens are [slots * b, T]

    A rank takes its leaves one after the other (gradient accumulation). In memory are one leaf's activations, the sums of
    gradients that wait, and the nodes that the rank sends, in f32: of eight leaves on one rank three and one for a balanced tree,
    one and one for a chain; cut over ranks, a chain has up to one node a leaf.

    Args:
        f: ``(params, *batch_l) -> scalar``, of one leaf. It does not communicate over ``axis_name``; over other axes it may.
        axis_name: Axis of the enclosing ``shard_map`` (or :func:`tbik_jax.emulate`) that splits the batch; 1 to ``leaves``
            ranks. ``None`` where one device holds everything.
        contract: Numerics-bearing.
        leaves: Leaves of the whole batch, numerics-bearing: the largest number of ranks and steps that it may ever be split
            in. By default ``contract.leaves``.
        has_aux: f returns ``(scalar, aux)``. What a rank's leaves give beside is stacked by slot, ``[slots, ...]``, and that of
            other ranks is theirs; the value comes as ``(value, aux)``.
        dtype: Of the gradients; by default each has its parameter's. Sums are f32 in any case.
        scatter_dimensions: For parameters kept in shards (FSDP): a pytree like ``params`` (or a prefix of it) of the dimension
            along which a rank keeps its even slice of the gradient, or None where it keeps all.
        algorithm: Performance-only, see :func:`tbik_jax.tree_psum`.

    Returns:
        ``(params, *batch) -> (value, gradients)``: ``params`` whole, the same on every rank, floats; arrays of the batch
        ``[slots * b, ...]``, b examples of every leaf that the rank holds, see :func:`batch_slots`. The value is f32. Both are
        the same on every rank, and typed so, but for slices.

    Guarantee: bitwise equal on every number of ranks, if f gives a leaf the same bits wherever it is computed. Made of this
    package's layers, :func:`tbik_jax.dense.token_sum` and elementwise steps without contractions, it does. Autodiff gives the
    gradient of a bf16 parameter in bf16, leaf by leaf: keep parameters in f32 where that rounding matters.

    Raises:
        ValueError: more ranks than leaves, a batch that is no whole leaves, parameters that are no floats, an f whose result
            is no scalar, dimensions that do not fit; all listed.
    """

    @wraps(f)
    def value_and_grad(params: Any, *batch: Any) -> tuple[Any, Any]:
        plan = _plan(axis_name, contract.leaves if leaves is None else leaves, contract)
        _check(plan, params, batch, dtype, algorithm)
        kept = _kept(params, scatter_dimensions, plan)

        # Of parameters typed as the same on every rank, autodiff would add the gradients by psum.
        local, batch = (
            jax.tree.map(lambda x: x if axis_name is None else vary(x, axis_name), of) for of in (params, batch)
        )

        def of_leaf(batch: Any) -> tuple[tuple[Array, ...], Any]:
            (value, aux), gradients = jax.value_and_grad(_scalar(f, has_aux), has_aux=True)(local, *batch)
            wide = (rounded(x.astype(jnp.float32)) for x in (value, *jax.tree.leaves(gradients)))
            return tuple(x if axis_name is None else vary(x, axis_name) for x in wide), jax.tree.map(jnp.asarray, aux)

        by_slot = jax.tree.map(lambda x: x.reshape(plan.slots, x.shape[0] // plan.slots, *x.shape[1:]), batch)
        (value, *found), aux = _summed(plan, axis_name, of_leaf, by_slot, [None, *kept], algorithm)
        gradients = [cast(g, dtype or p.dtype) for g, p in zip(found, jax.tree.leaves(params), strict=True)]
        return (value, aux) if has_aux else value, jax.tree.unflatten(jax.tree.structure(params), gradients)

    return value_and_grad


def batch_slots(batch: Any, *, leaves: int, ranks: int) -> Any:
    """Lay a whole batch ``[leaves * b, ...]`` out for ``ranks`` ranks: ``[ranks * slots * b, ...]``, to be split evenly.

    Where the ranks have equal shares that is the batch itself. Else the ranks with fewer leaves have slots that no sum
    reads; they hold copies of the first leaf.

    Raises:
        ValueError: more ranks than leaves, or a batch that is no whole leaves.
    """
    ranges = leaf_ranges(leaves, ranks)
    slots = max(map(len, ranges))
    order = [leaf for held in ranges for leaf in (*held, *[0] * (slots - len(held)))]
    with Problems("batch_slots") as problems:
        for path, x in jax.tree.leaves_with_path(batch):
            name = jax.tree_util.keystr(path)
            problems.check(
                np.ndim(x) > 0 and np.shape(x)[0] % leaves == 0,
                f"batch{name} has shape {np.shape(x)}: its first dimension is not a multiple of the {leaves} leaves",
            )
    if order == list(range(leaves)):
        return batch

    def laid_out(x: Any) -> Any:
        by_leaf = x.reshape(leaves, -1, *x.shape[1:])
        return by_leaf[np.array(order)].reshape(-1, *x.shape[1:])

    return jax.tree.map(laid_out, batch)


# Checks ------------------------------------------------------------------------------------------------------------------


def _plan(axis_name: str | None, leaves: int, contract: Contract) -> Schedule:
    ranks = 1 if axis_name is None else axis_size(axis_name)
    with Problems("tree_value_and_grad") as problems:
        problems.check(
            ranks <= leaves,
            f"axis {axis_name!r} has {ranks} ranks but the batch only {leaves} leaves: use a smaller mesh, or more leaves "
            f"(which have other bits)",
        )
    return schedule(contract.tree_over(leaves), ranks)


def _check(plan: Schedule, params: Any, batch: Any, dtype: DTypeLike | None, algorithm: str) -> None:
    with Problems("tree_value_and_grad") as problems:
        problems.check(
            dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating), f"dtype = {dtype}: gradients are floats"
        )
        problems.check(algorithm in get_args(Algorithm), f"algorithm {algorithm!r} is not one of {get_args(Algorithm)}")
        for path, x in jax.tree.leaves_with_path(params):
            name = jax.tree_util.keystr(path)
            kind = getattr(x, "dtype", type(x).__name__)
            problems.check(
                hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating),
                f"params{name} is {kind}, which has no gradient; give arrays of floats, and the rest beside them",
            )
        found = jax.tree.leaves_with_path(batch)
        problems.check(bool(found), "there is no batch to sum over")
        sizes = {x.shape[0] for _, x in found if x.ndim}
        problems.check(len(sizes) <= 1, f"the arrays of the batch have {sorted(sizes)} examples; give as many of each")
        for path, x in found:
            problems.check(
                x.ndim > 0 and x.shape[0] > 0 and x.shape[0] % plan.slots == 0,
                f"batch{jax.tree_util.keystr(path)} has shape {x.shape}: {plan.tree.leaves} leaves over {plan.ranks} ranks need "
                f"a multiple of {plan.slots} examples on a rank (batch_slots lays a batch out)",
            )


_ALL = object()


def _kept(params: Any, scatter_dimensions: Any, plan: Schedule) -> list[int | None]:
    """Along which dimension a rank keeps a slice of each parameter's gradient."""
    # None would be a pytree without leaves.
    given = jax.tree.map(lambda d: _ALL if d is None else d, scatter_dimensions, is_leaf=lambda d: d is None)
    dimensions = [None if d is _ALL else d for d in jax.tree.leaves(jax.tree.broadcast(given, params))]
    with Problems("tree_value_and_grad") as problems:
        for (path, x), dimension in zip(jax.tree.leaves_with_path(params), dimensions, strict=True):
            fits = dimension is None or (-x.ndim <= dimension < x.ndim and x.shape[dimension] % plan.ranks == 0)
            problems.check(
                fits,
                f"params{jax.tree_util.keystr(path)} has shape {x.shape}: its dimension {dimension} is not there or no "
                f"multiple of the {plan.ranks} ranks",
            )
    return dimensions


def _scalar(f: Callable[..., Any], has_aux: bool) -> Callable[..., tuple[Array, Any]]:
    def checked(*arguments: Any) -> tuple[Array, Any]:
        result = f(*arguments)
        with Problems("tree_value_and_grad") as problems:
            pair = isinstance(result, tuple) and len(result) == 2
            problems.check(
                pair or not has_aux, f"f returned {type(result).__name__}; with has_aux=True it is (scalar, aux)"
            )
            value, aux = result if has_aux and pair else (result, None)
            found = jax.tree.leaves(value)
            if problems.check(
                len(found) == 1 and found[0] is value, "f returned a pytree; for (scalar, aux) say has_aux=True"
            ):
                kind = jax.typeof(value := jnp.asarray(value))
                problems.check(
                    kind.shape == () and jnp.issubdtype(kind.dtype, jnp.floating),
                    f"f returned {kind}; it must be a float scalar, the sum over a leaf (dense.token_sum)",
                )
        return value, aux

    return checked


# The tree over leaves ----------------------------------------------------------------------------------------------------


def _summed(
    plan: Schedule,
    axis_name: str | None,
    of_leaf: Callable[[Any], tuple[tuple[Array, ...], Any]],
    by_slot: Any,
    kept: list[int | None],
    algorithm: Algorithm,
) -> tuple[list[Array], Any]:
    """The canonical sum over all ranks' leaves of every array that ``of_leaf`` returns; what it returns beside, by slot."""
    if plan.slots == 1:
        nodes, aux = jax.tree.map(lambda x: x[None], of_leaf(jax.tree.map(lambda x: x[0], by_slot)))
    else:
        nodes, aux = _nodes(plan, axis_name, of_leaf, by_slot)
    if axis_name is None:
        return [of_array[0] for of_array in nodes], aux
    total = []
    for of_array, dimension in zip(nodes, kept, strict=True):
        how: dict[str, Any] = {"tree": plan.tree, "algorithm": algorithm, "of_nodes": True}
        if dimension is None:
            total.append(tree_psum(of_array, axis_name, **how))
        else:
            total.append(tree_psum_scatter(of_array, axis_name, scatter_dimension=dimension, **how))
    return total, aux


def _nodes(
    plan: Schedule, axis_name: str | None, of_leaf: Callable[[Any], tuple[tuple[Array, ...], Any]], by_slot: Any
) -> tuple[list[Array], Any]:
    """``[width, ...]`` of every array: this rank's node values, its leaves computed one after the other. And what is beside.

    Every rank runs the same loop over slots. What is added and where the sum then waits are tables by rank, since ranks of
    unequal shares have other nodes.
    """
    programs = [program(nodes) for nodes in plan.rank_nodes]
    storages = max(p.storages for p in programs)
    places = storages + plan.width  # sums that wait, then nodes that are whole
    pops = np.zeros((plan.ranks, plan.slots, storages), bool)
    pushes = np.full((plan.ranks, plan.slots), -1)  # an idle slot goes nowhere
    for rank, steps in enumerate(programs):
        for slot, behind in enumerate(steps.steps):
            pops[rank, slot, list(behind.pops)] = True
            pushes[rank, slot] = storages + steps.ends.index(slot) if behind.push is None else behind.push
    mine: Any = 0 if axis_name is None else lax.axis_index(axis_name)
    tables = jnp.asarray(pops)[mine], jnp.asarray(pushes)[mine]

    kinds = jax.make_jaxpr(lambda leaf: of_leaf(leaf)[0])(jax.tree.map(lambda x: x[0], by_slot)).out_avals
    zeros = [vary(jnp.zeros(kind.shape, kind.dtype), *sorted(axes_of_type(kind))) for kind in kinds]
    begin = tuple((zero,) * places for zero in zeros)

    def step(waiting: Any, of_slot: Any) -> tuple[Any, Any]:
        leaf, pops, push = of_slot
        values, aux = of_leaf(leaf)
        after = []
        for value, sums in zip(values, waiting, strict=True):
            for storage in range(storages):
                value = jnp.where(pops[storage], sums[storage] + value, value)
            after.append(tuple(jnp.where(push == place, value, old) for place, old in enumerate(sums)))
        return tuple(after), aux

    held, aux = lax.scan(step, begin, (by_slot, *tables))
    return [jnp.stack(sums[storages:]) for sums in held], aux
