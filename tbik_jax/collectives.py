"""Reductions across a mesh axis in the order of the canonical tree; call them inside ``jax.shard_map``.

``psum`` adds in an order that depends on the number of ranks, the size of the message and the library. Here the ranks
exchange whole tree nodes in f32 and every rank finishes the same tree, so the bits are those of a single rank.

Which exchange carries the bytes (`algorithm`) is performance-only:

=====================  =======================================  ==============================  ======================
algorithm              exchange                                 values sent per rank            meshes
=====================  =======================================  ==============================  ======================
``all_gather``         everybody's nodes, then the whole tree   ranks x nodes x size            any
``all_to_all``         one slice each, then gather the slices   (nodes + 1) x size              any
``recursive_halving``  ``ppermute`` with r ^ 2**i, halves       2 x size                        one node per rank, 2**n
``butterfly``          ``ppermute`` with r ^ 2**i, whole        log2(ranks) x size              one node per rank, 2**n
``direct``             one kernel that reads and writes peers   (nodes + 1) x size              Hopper GPUs, 1 process
=====================  =======================================  ==============================  ======================

Nodes travel in f32. Slices that are gathered after the sum are rounded to the result's dtype before they travel.

``direct`` wants a mesh whose devices are the first of ``jax.devices()``, in that order, which only JAX sees, and says, when it
lowers the program. So ``auto`` never chooses it; :class:`tbik_jax.engine.Generator`, which knows its mesh, does.

References: Tree-Based Invariant Kernels, arXiv 2511.17826, section 4.2 (tree all-reduce over power-of-two ranks);
Thakur, Rabenseifner and Gropp 2005 (recursive halving and doubling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from tbik_jax._axes import all_gather, axis_size, is_of_mesh, vary, varying_axes
from tbik_jax._problems import Problems
from tbik_jax.kernels import backend
from tbik_jax.kernels.exact import cast, rounded
from tbik_jax.tree import Schedule, Tree, schedule

Array = jax.Array
Algorithm = Literal["auto", "all_gather", "all_to_all", "recursive_halving", "butterfly", "direct"]

#: One gather beats two exchanges unless it brings so many bytes more: what a link moves while an exchange starts.
#: Performance-only; that of GPUs was measured on two H200 with NVLink.
_WORTH_AN_EXCHANGE = {"gpu": 8 << 20, "cpu": 256 << 10}


def tree_psum(
    leaves: Array,
    axis_name: str,
    *,
    tree: Tree,
    dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    of_nodes: bool = False,
) -> Array:
    """The canonical sum over the leaves of all ranks, on every rank.

        out = tree.reduce([leaf_0, ..., leaf_{L-1}]),  rounded once to ``dtype``

    Args:
        leaves: ``[slots, ...]`` f32, this rank's leaf values: rank r holds leaves ``leaf_ranges(tree.leaves, ranks)[r]``
            from slot 0 on. ``slots`` is the largest number of leaves on any rank; slots behind a shorter range are
            ignored, whatever they hold.
        axis_name: Mesh axis of the enclosing ``shard_map``; 1 to ``tree.leaves`` ranks.
        tree: The canonical tree. Numerics-bearing.
        dtype: Result dtype; f32 by default. Nodes are f32 in any case.
        algorithm: Performance-only, see the module's table.
        of_nodes: ``leaves`` are this rank's node values ``[width, ...]`` already, as :func:`local_nodes` gives them: kernels
            add leaves inside. For ``direct`` only where every rank has the same additions (`Schedule.is_uniform`).

    Returns:
        ``[...]`` in ``dtype``, the same on every rank (and typed so under ``check_vma=True``).

    Guarantee: bitwise equal for every axis size, algorithm, and to ``tree.reduce`` on one device.

    Differentiation: the cotangent of every leaf is the cotangent of the result, unchanged.

    Raises:
        ValueError: more ranks than leaves, a wrong number of slots, a dtype other than f32, an algorithm that this mesh
            cannot run.
    """
    plan = _plan("tree_psum", leaves, axis_name, tree, algorithm, of_nodes)
    result = jnp.dtype(dtype or jnp.float32)
    if algorithm == "auto" or plan.ranks == 1:
        algorithm = _choose(plan, 4 * math.prod(leaves.shape[1:]), result)
    return _tree_psum(plan, axis_name, algorithm, of_nodes, result, leaves)


def sum_of_leaves(leaves: Array, axis_name: str | None, tree: Tree) -> Array:
    """:func:`tree_psum`, or, without an axis, the tree over the leaves of one device, which has all of them."""
    if axis_name is None:
        return tree.reduce(list(leaves), jnp.add)
    return tree_psum(leaves, axis_name, tree=tree)


def tree_psum_scatter(
    leaves: Array,
    axis_name: str,
    *,
    tree: Tree,
    scatter_dimension: int = 0,
    dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    of_nodes: bool = False,
) -> Array:
    """The canonical sum, of which rank r keeps the r-th slice; :func:`tree_all_gather` undoes the slicing.

    ``scatter_dimension`` counts the dimensions of one leaf value (without the slot dimension); the number of ranks must
    divide it. Everything else is as in :func:`tree_psum`, whose bits the slices are.
    """
    plan = _plan("tree_psum_scatter", leaves, axis_name, tree, algorithm, of_nodes)
    rank = leaves.ndim - 1
    with Problems("tree_psum_scatter") as problems:
        inside = problems.check(
            -rank <= scatter_dimension < rank,
            f"scatter_dimension = {scatter_dimension} is outside a leaf value of {rank} dimensions",
        )
        if inside:
            size = leaves.shape[1:][scatter_dimension]
            problems.check(
                size % plan.ranks == 0,
                f"dimension {scatter_dimension} of size {size} is not a multiple of the {plan.ranks} ranks; pad it first",
            )
    if algorithm == "auto" or plan.ranks == 1:
        algorithm = "all_to_all"  # one exchange, and nobody gets what it does not keep
    part = _tree_psum_scatter(plan, axis_name, algorithm, scatter_dimension % rank, of_nodes, leaves)
    return cast(part, dtype or jnp.float32)


def for_mesh(mesh: jax.sharding.Mesh, axis_name: str) -> Algorithm:
    """The algorithm for sums over an axis of that mesh: ``"direct"`` where it can be, else ``"auto"``. Performance-only.

    It can be on a mesh whose other axes have one rank: others were not tried.
    """
    devices = list(mesh.devices.flat)
    fits = 1 < mesh.size == mesh.shape[axis_name] and [d.id for d in devices] == list(range(mesh.size))
    if not fits or jax.default_backend() != "gpu" or _not_direct():
        return "auto"
    return "direct" if backend.reach_each_other(*(device.local_hardware_id for device in devices)) else "auto"


def tree_all_gather(x: Array, axis_name: str, *, gather_dimension: int = 0) -> Array:
    """Concatenate the ranks' slices along ``gather_dimension``; the same result on every rank. Moves bits, adds none."""
    return _all_gather(axis_name, gather_dimension % x.ndim, x)


def local_nodes(leaves: Array, axis_name: str, *, tree: Tree) -> Array:
    """This rank's node values ``[width, ...]`` from its leaf values ``[slots, ...]``: what the ranks exchange."""
    return _local_nodes(_plan("local_nodes", leaves, axis_name, tree, "auto"), axis_name, leaves)


# Checks ------------------------------------------------------------------------------------------------------------


def _plan(where: str, leaves: Array, axis_name: str, tree: Tree, algorithm: str, of_nodes: bool = False) -> Schedule:
    ranks = axis_size(axis_name)
    with Problems(where) as problems:
        problems.check(
            leaves.dtype == jnp.float32, f"leaf values are {leaves.dtype}, not float32: nodes are added in f32"
        )
        problems.check(algorithm in get_args(Algorithm), f"algorithm {algorithm!r} is not one of {get_args(Algorithm)}")
        fits = problems.check(
            ranks <= tree.leaves,
            f"axis {axis_name!r} has {ranks} ranks but the tree only {tree.leaves} leaves: "
            f"use a smaller mesh, or a contract with more leaves (which has other bits)",
        )
        if fits:
            plan = schedule(tree, ranks)
            first, kind = (plan.width, "nodes") if of_nodes else (plan.slots, "slots")
            problems.check(
                leaves.ndim >= 1 and leaves.shape[0] == first,
                f"leaf values have shape {leaves.shape}; {tree.leaves} leaves over {ranks} ranks need {first} {kind} "
                f"in the first dimension",
            )
            problems.check(
                not of_nodes or plan.is_uniform or algorithm != "direct",
                f"algorithm 'direct', node values of {tree.leaves} leaves over {ranks} ranks: the ranks have different nodes, "
                f"and this exchange then wants leaf values",
            )
            problems.check(
                algorithm not in ("butterfly", "recursive_halving") or plan.is_butterfly,
                f"algorithm {algorithm!r} wants a power of two of ranks with one node each, pairs of pairs above them; "
                f"not so for {tree.leaves} leaves of shape {tree.levels} over {ranks} ranks. 'auto' chooses one that fits",
            )
            if algorithm == "direct" and ranks > 1:
                from tbik_jax.kernels.hopper import peers

                reasons = _not_direct() + (
                    [] if is_of_mesh(axis_name) else [f"axis {axis_name!r} is vmap's, no mesh's"]
                )
                nodes = sum(to_finish(plan)[0])
                if nodes > peers.MOST_NODES:
                    reasons.append(f"{nodes} nodes are more than the {peers.MOST_NODES} that a thread holds")
                for reason in reasons:
                    problems.unsupported(f"algorithm 'direct': {reason}. 'auto' chooses one that runs here")
    return plan


def is_direct(axis_name: str) -> bool:
    """Whether kernels may reach the other ranks of that axis, as far as a program that is traced can tell."""
    return is_of_mesh(axis_name) and not _not_direct()


def _not_direct() -> list[str]:
    """Why one kernel cannot sum over the GPUs of this process."""
    here = jax.default_backend()
    if here != "gpu":
        return [f"GPUs read each other's memory over NVLink, and the default backend is {here!r}"]
    backend.family()  # raises on GPUs other than Hopper's
    count = jax.process_count()
    return [f"there are {count} processes, and a GPU has no address in another one"] if count > 1 else []


def _choose(plan: Schedule, size: int, result: np.dtype[Any]) -> Algorithm:
    """For nodes of ``size`` bytes, summed on every rank."""
    others = plan.ranks - 1
    gathered = others * plan.width * size
    exchanged = others * (plan.width * size + size * result.itemsize // 4) // plan.ranks
    worth = _WORTH_AN_EXCHANGE["cpu" if jax.default_backend() == "cpu" else "gpu"]
    return "all_gather" if gathered - exchanged <= worth else "all_to_all"


# The tree, on one rank and across ranks -------------------------------------------------------------------------------


def _local_nodes(plan: Schedule, axis_name: str, leaves: Array) -> Array:
    def reduce(rank: int, leaves: Array) -> Array:
        nodes = plan.reduce_local(rank, list(leaves), jnp.add)
        idle = [jnp.zeros_like(nodes[0])] * (plan.width - len(nodes))
        return jnp.stack(nodes + idle)

    leaves = rounded(leaves)  # a caller's product must not contract with the first add
    if plan.is_uniform:
        return reduce(0, leaves)
    # Ranks with the same additions share a branch.
    shapes = [plan.local_shape(rank) for rank in range(plan.ranks)]
    kinds = list(dict.fromkeys(shapes))
    branches = [partial(reduce, shapes.index(kind)) for kind in kinds]
    kind_of_rank = jnp.array([kinds.index(shape) for shape in shapes])
    return lax.switch(kind_of_rank[lax.axis_index(axis_name)], branches, vary(leaves, axis_name))


def _finish(plan: Schedule, nodes: Array) -> Array:
    """``nodes [ranks, width, ...]`` of all ranks to the root."""
    return plan.finish([[nodes[r, i] for i in range(plan.width)] for r in range(plan.ranks)], jnp.add)


def _scatter_first(plan: Schedule, axis_name: str, algorithm: str, nodes: Array) -> Array:
    """``nodes [width, n]``, n a multiple of the ranks -> this rank's ``[n / ranks]`` of the sum."""
    ranks, n = plan.ranks, nodes.shape[1]
    if algorithm == "direct":
        return _direct(plan, axis_name, nodes, nodes.dtype, scatter=True)
    if algorithm == "recursive_halving":
        return _halving(axis_name, ranks, nodes[0])
    if algorithm == "butterfly":
        return _own_slice(axis_name, ranks, _butterfly(axis_name, ranks, nodes[0]))
    if algorithm == "all_gather":
        return _own_slice(axis_name, ranks, _finish(plan, lax.all_gather(nodes, axis_name)))
    slices = nodes.reshape(plan.width, ranks, n // ranks).swapaxes(0, 1)
    return _finish(plan, lax.all_to_all(slices, axis_name, split_axis=0, concat_axis=0, tiled=True))


def _given(plan: Schedule, axis_name: str, algorithm: str, of_nodes: bool, values: Array) -> Array:
    if algorithm == "direct":
        return to_send(plan, axis_name, values, of_nodes=of_nodes)
    return values if of_nodes else _local_nodes(plan, axis_name, values)


def to_send(plan: Schedule, axis_name: str, values: Array, *, of_nodes: bool) -> Array:
    """``[width, ...]``: what this rank gives to kernels that exchange, from its leaf values or (``of_nodes``) node values."""
    return values if of_nodes or plan.sends_leaves else _local_nodes(plan, axis_name, values)


def to_finish(plan: Schedule) -> tuple[list[int], Callable[..., Any]]:
    """How many values every rank gives by :func:`to_send`, and the additions that make the root of them."""
    if plan.sends_leaves:
        return [len(r) for r in plan.ranges], plan.finish_leaves
    return [len(nodes) for nodes in plan.rank_nodes], plan.finish


def _direct(plan: Schedule, axis_name: str, nodes: Array, dtype: np.dtype[Any], *, scatter: bool = False) -> Array:
    """The sum, or this rank's slice of it, typed as what it is: the same on all ranks, or not."""
    from tbik_jax.kernels.hopper import peers

    counts, finish = to_finish(plan)
    total = peers.tree_sum(nodes, axis_name, counts, finish, dtype=dtype, scatter=scatter)
    return vary(total, *sorted(varying_axes(nodes) - (frozenset() if scatter else {axis_name})))


def _own_slice(axis_name: str, ranks: int, x: Array) -> Array:
    size = x.shape[0] // ranks
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * size, size)


def _halving(axis_name: str, ranks: int, x: Array) -> Array:
    """Recursive halving, nearest partner first, so that every step adds two sibling nodes of the tree.

    Each step keeps one half of what is left, the lower partner the first: rank r ends with the slice whose number is r
    with its bits reversed. So the slices are put in that order beforehand.
    """
    bits = ranks.bit_length() - 1
    order = [int(format(r, f"0{bits}b")[::-1], 2) if bits else 0 for r in range(ranks)]
    x = x.reshape(ranks, -1)[jnp.array(order)]
    rank, step = lax.axis_index(axis_name), 1
    while step < ranks:
        upper = (rank & step) != 0
        first, second = jnp.split(x, 2)
        keep, send = jnp.where(upper, second, first), jnp.where(upper, first, second)
        # Addition commutes, so both partners may write it the same way round.
        x = keep + lax.ppermute(send, axis_name, [(r, r ^ step) for r in range(ranks)])
        step *= 2
    return x[0]


def _butterfly(axis_name: str, ranks: int, x: Array) -> Array:
    """Recursive doubling: partners exchange whole nodes and add siblings."""
    step = 1
    while step < ranks:
        x = x + lax.ppermute(x, axis_name, [(r, r ^ step) for r in range(ranks)])
        step *= 2
    return x


# Differentiable entry points -----------------------------------------------------------------------------------------
# Transposing an exchange by autodiff would insert psum. The true cotangents need no sum at all: every leaf enters the
# result once, with weight one.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _tree_psum(
    plan: Schedule, axis_name: str, algorithm: str, of_nodes: bool, dtype: np.dtype[Any], values: Array
) -> Array:
    nodes = vary(_given(plan, axis_name, algorithm, of_nodes, values), axis_name)
    shape, nodes = nodes.shape[1:], nodes.reshape(plan.width, -1)
    if algorithm == "direct":
        return _direct(plan, axis_name, nodes, dtype).reshape(shape)
    if algorithm == "all_gather":
        return cast(_finish(plan, all_gather(nodes, axis_name)), dtype).reshape(shape)
    size = nodes.shape[1]
    nodes = jnp.pad(nodes, ((0, 0), (0, -size % plan.ranks)))
    if algorithm == "butterfly":
        total = _butterfly(axis_name, plan.ranks, nodes[0])
        if axis_name not in varying_axes(total):  # check_vma=False, or vmap: nobody asks for the type
            return cast(total[:size], dtype).reshape(shape)
        part = _own_slice(axis_name, plan.ranks, total)  # only a gather makes a value invariant by type
    else:
        part = _scatter_first(plan, axis_name, algorithm, nodes)
    return all_gather(cast(part, dtype), axis_name, tiled=True)[:size].reshape(shape)


def _spread(plan: Schedule, axis_name: str, of_nodes: bool, cotangent: Array) -> Array:
    """The cotangent of every node or slot; unread slots get zero."""
    if of_nodes:
        return jnp.broadcast_to(vary(cotangent, axis_name), (plan.width, *cotangent.shape))
    held = jnp.array([len(r) for r in plan.ranges])[lax.axis_index(axis_name)]
    cotangent = jnp.broadcast_to(vary(cotangent, axis_name), (plan.slots, *cotangent.shape))
    if plan.slots * plan.ranks == plan.tree.leaves:
        return cotangent
    used = jnp.arange(plan.slots) < held
    return jnp.where(used.reshape(-1, *[1] * (cotangent.ndim - 1)), cotangent, 0.0)


def _tree_psum_fwd(
    plan: Schedule, axis_name: str, algorithm: str, of_nodes: bool, dtype: np.dtype[Any], values: Array
) -> tuple[Array, None]:
    return _tree_psum(plan, axis_name, algorithm, of_nodes, dtype, values), None


def _tree_psum_bwd(
    plan: Schedule, axis_name: str, algorithm: str, of_nodes: bool, dtype: np.dtype[Any], _: None, cotangent: Array
) -> tuple[Array]:
    return (_spread(plan, axis_name, of_nodes, cotangent.astype(jnp.float32)),)


_tree_psum.defvjp(_tree_psum_fwd, _tree_psum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _tree_psum_scatter(
    plan: Schedule, axis_name: str, algorithm: str, axis: int, of_nodes: bool, values: Array
) -> Array:
    nodes = _given(plan, axis_name, algorithm, of_nodes, values)
    nodes = jnp.moveaxis(vary(nodes, axis_name), axis + 1, 1)
    shape, nodes = nodes.shape[1:], nodes.reshape(plan.width, -1)
    part = _scatter_first(plan, axis_name, algorithm, nodes)
    return jnp.moveaxis(part.reshape(shape[0] // plan.ranks, *shape[1:]), 0, axis)


def _tree_psum_scatter_fwd(
    plan: Schedule, axis_name: str, algorithm: str, axis: int, of_nodes: bool, values: Array
) -> tuple[Array, None]:
    return _tree_psum_scatter(plan, axis_name, algorithm, axis, of_nodes, values), None


def _tree_psum_scatter_bwd(
    plan: Schedule, axis_name: str, algorithm: str, axis: int, of_nodes: bool, _: None, cotangent: Array
) -> tuple[Array]:
    return (_spread(plan, axis_name, of_nodes, _all_gather(axis_name, axis, cotangent)),)


_tree_psum_scatter.defvjp(_tree_psum_scatter_fwd, _tree_psum_scatter_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather(axis_name: str, axis: int, x: Array) -> Array:
    return all_gather(x, axis_name, axis=axis, tiled=True)


def _all_gather_fwd(axis_name: str, axis: int, x: Array) -> tuple[Array, None]:
    return _all_gather(axis_name, axis, x), None


def _all_gather_bwd(axis_name: str, axis: int, _: None, cotangent: Array) -> tuple[Array]:
    size = cotangent.shape[axis] // axis_size(axis_name)
    start = lax.axis_index(axis_name) * size
    return (lax.dynamic_slice_in_dim(vary(cotangent, axis_name), start, size, axis),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)
