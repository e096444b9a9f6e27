"""Column- and row-parallel products, and a ``dot_general`` of the same numerics for Flax's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from tbik_jax._axes import all_gather, axis_size, vary, vary_like
from tbik_jax._problems import Problems
from tbik_jax.collectives import Algorithm, to_finish, to_send, tree_psum, tree_psum_scatter
from tbik_jax.contract import Contract
from tbik_jax.kernels import backend, matmul
from tbik_jax.kernels.exact import cast, rounded, tree_sum
from tbik_jax.kernels.matmul import PackedWeight
from tbik_jax.kernels.swiglu import swiglu
from tbik_jax.tree import Node, Schedule, Tree, schedule

if TYPE_CHECKING:
    from tbik_jax.kernels.hopper.mailbox import Mailbox

Array = jax.Array
Dtype = np.dtype[Any]


def column_parallel(
    x: Array,
    w: Array | PackedWeight,
    bias: Array | None = None,
    *,
    axis_name: str | None,
    contract: Contract,
    leaves: int | None = None,
    dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
) -> Array:
    """A product whose output columns are split over the axis: no exchange forward, a tree over columns backward.

        y = x @ w.T + bias            y [..., N_local],  K is whole on every rank

    Args:
        x: ``[..., K]``, the same on every rank.
        w: This rank's rows of the ``[N, K]`` weight (Hugging Face's orientation): ``[N_local, K]``, or ``[slots, n, K]``
            by leaf where the ranks' shares differ (:func:`tbik_jax.tree.leaf_ranges`), or packed.
        bias: ``[N_local]``; added in f32 before the one rounding.
        axis_name: Axis of the enclosing ``shard_map``; ``None`` where one device holds everything.
        contract: Numerics-bearing.
        leaves: Leaves of N over the whole axis, for the backward pass; by default ``contract.leaves`` (2-d ``w``).
            Slots on several ranks do not tell: without ``leaves`` they have no gradient.
        dtype: Output dtype; the dtype of ``x`` by default.
        algorithm: Performance-only, of the sum in the backward pass; see :func:`tbik_jax.tree_psum`.

    Guarantee: column n of row m depends on that row and that row of ``w`` alone: not on the mesh, the batch, or N. The
    input gradient is the tree over the leaves of N. Weight and bias gradients reduce over the tokens at hand.

    Raises:
        ValueError: shapes, dtypes, leaves or mesh that do not fit, all listed.
        NotImplementedError: the gradient of a packed weight.
    """
    lead, k, result = x.shape[:-1], x.shape[-1], jnp.dtype(dtype or x.dtype)
    rows = x.reshape(-1, k)
    if isinstance(w, PackedWeight):
        with Problems("dense.column_parallel") as problems:
            problems.check(
                w.leaves == 1 and w.k == k, f"x has K = {k}; the packed weight {(w.leaves, w.n, w.k)} is no [1, N, K]"
            )
        y = _packed_products((Node(0, 1),), rows[:, None], w)[0]
    else:
        slots, tree = _cut("dense.column_parallel", w, 0, axis_name, contract, leaves)
        with Problems("dense.column_parallel") as problems:
            problems.check(w.shape[-1] == k, f"x has K = {k}, w has shape {w.shape}; w is [N, K] (output, input)")
        of_product = jnp.dtype(jnp.float32) if bias is not None else result
        y = _column(axis_name, tree, algorithm, of_product, result, rows, w.reshape(slots, -1, k))
    return _finish("dense.column_parallel", y, bias, result).reshape(*lead, -1)


def column_parallel_parts(
    x: Array,
    w: Array | PackedWeight,
    parts: Sequence[int],
    biases: Sequence[Array] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[Array, ...]:
    """:func:`column_parallel` for projections of one input whose weights lie side by side, for inference.

    Args:
        x: ``[..., K]``, the same on every rank.
        w: This rank's rows of all of them, ``[sum(parts), K]`` or ``[1, sum(parts), K]``, or packed from the latter.
        parts: How many columns each projection has on this rank.
        biases: ``[n]`` for each, or none.
        dtype: Of the results; the dtype of ``x`` by default.

    Guarantee: the bits of :func:`column_parallel` with each weight alone.

    Raises:
        ValueError: sizes that do not fit.
        NotImplementedError: differentiation.
    """
    lead, k, result = x.shape[:-1], x.shape[-1], jnp.dtype(dtype or x.dtype)
    if not isinstance(w, PackedWeight):
        w = w.reshape(1, -1, w.shape[-1])
    n, of_w = (w.n, w.k) if isinstance(w, PackedWeight) else w.shape[1:]
    with Problems("dense.column_parallel_parts") as problems:
        problems.check(of_w == k, f"x has K = {k}, w has K = {of_w}")
        problems.check(sum(parts) == n, f"parts {tuple(parts)} make {sum(parts)} columns, w has {n}")
        problems.check(biases is None or len(biases) == len(parts), "give one bias per part, or none")
    of_product = jnp.dtype(jnp.float32) if biases else result
    ys = _parted(tuple(parts), of_product, x.reshape(-1, k), w)
    return tuple(
        _finish("dense.column_parallel_parts", y, biases[i] if biases else None, result).reshape(*lead, -1)
        for i, y in enumerate(ys)
    )


def column_parallel_swiglu(x: Array, w: Array | PackedWeight, biases: Sequence[Array] | None = None) -> Array:
    """``swiglu(gate, up)`` of two projections of one input whose weights lie side by side, for inference.

        y = silu(x @ gate.T + b_gate) * (x @ up.T + b_up)

    Args:
        x: ``[..., K]``, the same on every rank.
        w: This rank's rows of both, gate above up: ``[2 N, K]`` or ``[1, 2 N, K]``, or packed from the latter.
        biases: ``[N]`` for each, or none.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Guarantee: the bits of :func:`column_parallel_parts`, then :func:`tbik_jax.dense.swiglu`. One kernel does both where there
    is one: the projections are rounded to the dtype of ``x`` in any case.

    Raises:
        ValueError: sizes that do not fit.
        NotImplementedError: differentiation.
    """
    if not isinstance(w, PackedWeight):
        w = w.reshape(1, -1, w.shape[-1])
    n, k = (w.n, w.k) if isinstance(w, PackedWeight) else w.shape[1:]
    with Problems("dense.column_parallel_swiglu") as problems:
        problems.check(k == x.shape[-1], f"x has K = {x.shape[-1]}, w has K = {k}")
        problems.check(n % 2 == 0, f"w has {n} rows; gate and up have as many each")
        problems.check(biases is None or len(biases) == 2, "give one bias for gate and one for up, or none")
    if biases:
        return swiglu(*column_parallel_parts(x, w, (n // 2, n // 2), biases))
    return _gated(x.reshape(-1, k), w).reshape(*x.shape[:-1], -1)


def row_parallel(
    x: Array,
    w: Array | PackedWeight,
    bias: Array | None = None,
    *,
    axis_name: str | None,
    contract: Contract,
    leaves: int | None = None,
    dtype: DTypeLike | None = None,
    scatter_dimension: int | None = None,
    algorithm: Algorithm = "auto",
) -> Array:
    """A product whose contraction is split over the axis: one canonical tree over the leaves of K, on any mesh.

        y = tree_psum_l( x[..., l] @ w[l].T ) + bias          y [..., N] on every rank

    Args:
        x: ``[..., K_local]``, this rank's part of the contraction, leaf by leaf.
        w: ``[N, K_local]``, or ``[slots, N, k]`` by leaf, or packed from that.
        bias: ``[N]``, the same on every rank; added in f32 after the tree, before the one rounding.
        axis_name: Axis of the enclosing ``shard_map``; ``None`` where one device holds everything.
        contract: Numerics-bearing.
        leaves: Leaves of K over the whole axis; by default ``contract.leaves`` (2-d ``w``). Slots on several ranks do
            not tell and need it.
        dtype: Output dtype; the dtype of ``x`` by default.
        scatter_dimension: Keep only this rank's slice along that dimension of ``y`` (sequence parallelism).
        algorithm: Performance-only, see :func:`tbik_jax.tree_psum`.

    Guarantee: bitwise equal on every mesh of up to ``leaves`` ranks, for every batch.

    Raises:
        ValueError: shapes, dtypes, leaves or mesh that do not fit, all listed.
        NotImplementedError: the gradient of a packed weight.
    """
    w, layout, tree = _cut_row("dense.row_parallel", w, axis_name, contract, leaves)
    return _summed(
        x,
        w,
        layout,
        bias,
        tree,
        axis_name=axis_name,
        dtype=dtype,
        scatter_dimension=scatter_dimension,
        algorithm=algorithm,
    )


def row_parallel_add_norm(
    x: Array,
    w: Array | PackedWeight,
    residual: Array,
    scale: Array,
    *,
    eps: float,
    axis_name: str,
    contract: Contract,
    leaves: int | None = None,
    mailbox: Mailbox,
) -> tuple[Array, Array]:
    """:func:`row_parallel`, the residual sum and the next norm, whose exchange takes no launch of its own. For inference.

        total = residual + row_parallel(x, w),    normal = rms_norm(total, scale)

    Args:
        x: ``[..., K_local]``, w: as in :func:`row_parallel`.
        residual: ``[..., N]``, the same on every rank; ``scale [N]``.
        mailbox: Opened by the same program, on every rank, for so many rows of N; see
            :func:`tbik_jax.kernels.hopper.mailbox.open_mailbox`.

    Guarantee: the bits of :func:`row_parallel` and of :func:`tbik_jax.kernels.rms_norm.add_rms_norm` behind it.

    Raises:
        ValueError: as :func:`row_parallel`; a mailbox that is too small.
        NotImplementedError: its gradient.
    """
    w, layout, tree = _cut_row("dense.row_parallel_add_norm", w, axis_name, contract, leaves)
    parts, plan = _parts("dense.row_parallel_add_norm", x, w, layout, tree, axis_name, jnp.dtype(jnp.float32), x.dtype)
    nodes = to_send(plan, axis_name, parts, of_nodes=plan.is_uniform)
    n = residual.shape[-1]
    total, normal = _mailed(plan, float(eps), mailbox, nodes.reshape(plan.width, -1, n), residual.reshape(-1, n), scale)
    return (
        vary_like(total.reshape(residual.shape), residual),
        vary_like(normal.reshape(residual.shape), residual),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mailed(
    plan: Schedule, eps: float, mailbox: Mailbox, nodes: Array, residual: Array, scale: Array
) -> tuple[Array, Array]:
    from tbik_jax.kernels.hopper.mailbox import sum_add_norm

    counts, finish = to_finish(plan)
    return sum_add_norm(mailbox, nodes, counts, finish, residual, scale, eps)


def _mailed_fwd(
    plan: Schedule, eps: float, mailbox: Mailbox, nodes: Array, residual: Array, scale: Array
) -> tuple[tuple[Array, Array], None]:
    return _mailed(plan, eps, mailbox, nodes, residual, scale), None


def _mailed_bwd(plan: Schedule, eps: float, _: None, given: Any) -> Any:
    raise NotImplementedError(
        "dense.row_parallel_add_norm is for inference; differentiate row_parallel and add_rms_norm, whose bits are the same"
    )


_mailed.defvjp(_mailed_fwd, _mailed_bwd)


def _summed(
    x: Array,
    w: Array | PackedWeight,
    layout: matmul.Layout,
    bias: Array | None,
    tree: Tree,
    *,
    axis_name: str | None,
    dtype: DTypeLike | None,
    scatter_dimension: int | None = None,
    algorithm: Algorithm = "auto",
) -> Array:
    """What :func:`row_parallel` returns, of a weight that is cut in slots already."""
    result = jnp.dtype(dtype or x.dtype)
    # Nothing is added to a product of all leaves, and the kernel rounds.
    alone = _local_nodes(tree, axis_name)[0].ranks == 1 and scatter_dimension is None
    of_product = result if alone and bias is None else jnp.dtype(jnp.float32)
    parts, plan = _parts("dense.row_parallel", x, w, layout, tree, axis_name, of_product, result)
    if axis_name is None:
        total = parts[0]
    elif alone:
        total = _of_one_rank(parts, axis_name)
    elif scatter_dimension is None:
        rounded_early = result if bias is None else jnp.dtype(jnp.float32)
        total = tree_psum(
            parts, axis_name, tree=tree, dtype=rounded_early, algorithm=algorithm, of_nodes=plan.is_uniform
        )
    else:
        total = tree_psum_scatter(
            parts,
            axis_name,
            tree=tree,
            scatter_dimension=scatter_dimension,
            algorithm=algorithm,
            of_nodes=plan.is_uniform,
        )
    return _finish("dense.row_parallel", total, bias, result)


def _of_one_rank(parts: Array, axis_name: str) -> Array:
    """The root, ``parts [1, ...]``, of an axis of one rank: the same on all ranks, by type."""
    return all_gather(vary(parts, axis_name), axis_name, axis=0, tiled=True)[0]


def _parts(
    where: str,
    x: Array,
    w: Array | PackedWeight,
    layout: matmul.Layout,
    tree: Tree,
    axis_name: str | None,
    of_product: Dtype,
    result: Dtype,
) -> tuple[Array, Schedule]:
    """``[nodes or slots, ..., N]``: what this rank adds to the sum, see `_local_nodes`."""
    slots, k = (w.leaves, w.k) if isinstance(w, PackedWeight) else (w.shape[layout.index(d)] for d in "lk")
    with Problems(where) as problems:
        problems.check(x.shape[-1] == slots * k, f"x has K = {x.shape[-1]}, w has {slots} slots of {k}")
    plan, nodes = _local_nodes(tree, axis_name)
    rows = x.reshape(-1, slots, k)
    if isinstance(w, PackedWeight):
        parts = _packed_products(nodes, rows, w)
    else:
        parts = _node_products(nodes, layout, of_product, result, rows, w)
    return parts.reshape(parts.shape[0], *x.shape[:-1], parts.shape[-1]), plan


def make_dot_general(contract: Contract, *, axis_name: str | None = None, leaves: int = 1) -> Callable[..., Array]:
    """A ``dot_general`` for ``flax.nnx.Linear(dot_general=...)`` and ``flax.linen.Dense(dot_general=...)``.

    ``leaves=1`` has the numerics of :func:`column_parallel`; more leaves with an ``axis_name`` those of
    :func:`row_parallel` (then give the layer no bias, or one whose addition after the sum is meant).

    The layer keeps its kernel ``[K, N]``: the bits of its transpose in those functions. A CPU copies it to that form at each
    call, a Hopper GPU reads it as it is.

    Raises:
        NotImplementedError: contractions other than the last dimension of the input with the first of the kernel.
    """

    def dot_general(
        lhs: Array,
        rhs: Array,
        dimension_numbers: tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]],
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
        **unsupported: Any,
    ) -> Array:
        (lhs_contract, rhs_contract), batch = dimension_numbers
        with Problems("dense.dot_general") as problems:
            if [d % lhs.ndim for d in lhs_contract] != [lhs.ndim - 1] or [d % rhs.ndim for d in rhs_contract] != [0]:
                problems.unsupported(
                    f"dimension_numbers {dimension_numbers}: only the last of lhs with the first of rhs"
                )
            if tuple(map(tuple, batch)) != ((), ()) or rhs.ndim != 2:
                problems.unsupported(
                    f"batch dimensions {batch} or a kernel of shape {rhs.shape}; only 2-d kernels [K, N]"
                )
            if precision is not None:
                problems.unsupported(
                    f"precision={precision!r}: the contract fixes the accumulation, f32 from the leaves up"
                )
            for name, value in unsupported.items():
                if value is not None:
                    problems.unsupported(f"{name}={value!r}")
        dtype = preferred_element_type or jnp.result_type(lhs.dtype, rhs.dtype)
        over = None if leaves == 1 else axis_name  # one leaf: K is whole on every rank
        slots, tree = _cut("dense.dot_general", rhs, 0, over, contract, leaves)
        assert tree is not None, "leaves are given"
        return _summed(lhs, rhs.reshape(slots, -1, rhs.shape[1]), "lkn", None, tree, axis_name=over, dtype=dtype)

    return dot_general


# Pieces ------------------------------------------------------------------------------------------------------------


def _finish(where: str, total: Array, bias: Array | None, dtype: DTypeLike) -> Array:
    if bias is not None:
        with Problems(where) as problems:
            problems.check(
                bias.shape == total.shape[-1:],
                f"bias has shape {bias.shape}, the result {total.shape}; give one value per local column",
            )
        total = _add_bias(total, bias)
    return cast(total, dtype)


@jax.custom_vjp
def _add_bias(total: Array, bias: Array) -> Array:
    # Varied in here: outside, autodiff would add the ranks' gradients by psum.
    return total + vary_like(bias, total).astype(jnp.float32)


def _add_bias_fwd(total: Array, bias: Array) -> tuple[Array, Array]:
    return _add_bias(total, bias), bias


def _add_bias_bwd(bias: Array, dy: Array) -> tuple[Array, Array]:
    # Autodiff's own sum over the rows goes in an order that depends on the number of local columns.
    return dy, cast(tree_sum(rounded(dy).reshape(-1, bias.shape[0]), axis=0), bias.dtype)


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


def _cut(
    where: str, w: Array | PackedWeight, split: int, axis_name: str | None, contract: Contract, leaves: int | None
) -> tuple[int, Tree | None]:
    """The slots of ``w``, and the tree over the leaves of the dimension that the axis splits.

    No tree if nobody says how many leaves: three slots on each of three ranks may be seven, eight or nine of them.
    """
    ranks = 1 if axis_name is None else axis_size(axis_name)
    with Problems(where) as problems:
        if isinstance(w, PackedWeight):
            slots = w.leaves
        elif problems.check(w.ndim in (2, 3), f"w has shape {w.shape}; give [N, K], or [slots, ., .] by leaf"):
            slots = w.shape[0] if w.ndim == 3 else 0
        else:
            problems.raise_if_any()
        if leaves is None and slots and ranks > 1:
            return slots, None
        total = leaves if leaves is not None else slots or contract.leaves
        fits = problems.check(
            ranks <= total,
            f"axis {axis_name!r} has {ranks} ranks but the dimension only {total} leaves: use a smaller mesh, or a "
            f"contract with more leaves (which has other bits)",
        )
        if fits:
            wanted = schedule(contract.tree_over(total), ranks).slots
            if slots:
                problems.check(slots == wanted, f"w has {slots} slots; {total} leaves over {ranks} ranks need {wanted}")
            elif not isinstance(w, PackedWeight):
                problems.check(
                    total % ranks == 0 and w.shape[split] % wanted == 0,
                    f"w has {w.shape[split]} local units for {total} leaves over {ranks} ranks: they are no whole, equal "
                    f"leaves. Give w by leaf, [slots, ., .], or choose leaves that both the mesh and the dimension divide",
                )
    return wanted, contract.tree_over(total)


def _cut_row(
    where: str, w: Array | PackedWeight, axis_name: str | None, contract: Contract, leaves: int | None
) -> tuple[Array | PackedWeight, matmul.Layout, Tree]:
    """A row-parallel weight by slots, its layout, and the tree over the leaves of K."""
    slots, tree = _cut(where, w, -1, axis_name, contract, leaves)
    if tree is None:
        raise _unknown_leaves(where, slots)
    if isinstance(w, PackedWeight) or w.ndim == 3:
        return w, "lnk", tree
    return w.reshape(w.shape[0], slots, -1), "nlk", tree


def _unknown_leaves(where: str, slots: int) -> ValueError:
    return ValueError(f"{where}: {slots} slots per rank do not say how many leaves all ranks hold; pass leaves=")


def _cotangent(dy: Array, result: Dtype, x: Array, w: Array) -> Array:
    """``dy`` as its products take it.

    It arrives in f32 but comes from a value of the result's dtype: taking it back is exact, and products of 16-bit operands
    are fast. Logits are f32 all the same; there it is rounded on Hopper GPUs, as by the cast that ordinary models have behind
    such products, where a product of f32 would take eight times as long.
    """
    if result == jnp.float32 and backend.family() == "sm90":
        return cast(dy, jnp.result_type(x, w))
    return dy.astype(result)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _column(
    axis_name: str | None, tree: Tree | None, algorithm: Algorithm, dtype: Dtype, result: Dtype, x: Array, w: Array
) -> Array:
    """``x [M, K]`` invariant, ``w [slots, n, K]`` local -> ``[M, slots * n]``."""
    return matmul.node_products(x[:, None], w.reshape(1, -1, w.shape[-1]), (Node(0, 1),), dtype=dtype)[0]


def _column_fwd(
    axis_name: str | None, tree: Tree | None, algorithm: Algorithm, dtype: Dtype, result: Dtype, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _column(axis_name, tree, algorithm, dtype, result, x, w), (x, w)


def _column_bwd(
    axis_name: str | None,
    tree: Tree | None,
    algorithm: Algorithm,
    dtype: Dtype,
    result: Dtype,
    saved: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, w = saved
    slots, n, k = w.shape
    if tree is None:
        raise _unknown_leaves("dense.column_parallel, input gradient", slots)
    dy = _cotangent(dy, result, x, w)
    plan, nodes = _local_nodes(tree, axis_name)
    of_product = x.dtype if plan.ranks == 1 else jnp.dtype(jnp.float32)
    parts = matmul.node_products(dy.reshape(-1, slots, n), w, nodes, layout="lkn", dtype=of_product)
    if axis_name is None:
        dx = parts[0]
    elif plan.ranks == 1:
        dx = _of_one_rank(parts, axis_name)
    else:
        dx = tree_psum(parts, axis_name, tree=tree, dtype=x.dtype, algorithm=algorithm, of_nodes=plan.is_uniform)
    dw = matmul.weight_gradient(dy, vary_like(x, dy)[:, None])[0]
    return vary_like(dx, x), cast(dw.reshape(slots, n, k), w.dtype)


_column.defvjp(_column_fwd, _column_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _parted(parts: tuple[int, ...], dtype: Dtype, x: Array, w: Array | PackedWeight) -> tuple[Array, ...]:
    return matmul.parted_products(x[:, None], w, parts, dtype=dtype)


def _parted_fwd(parts: tuple[int, ...], dtype: Dtype, x: Array, w: Array | PackedWeight) -> tuple[Any, None]:
    return _parted(parts, dtype, x, w), None


def _parted_bwd(parts: tuple[int, ...], dtype: Dtype, _: None, dy: Any) -> tuple[Any, Any]:
    raise _for_inference()


def _for_inference() -> NotImplementedError:
    return NotImplementedError(
        "projections side by side are for inference; to differentiate, give each its own [N, K] weight"
    )


_parted.defvjp(_parted_fwd, _parted_bwd)


@jax.custom_vjp
def _gated(x: Array, w: Array | PackedWeight) -> Array:
    return matmul.gated_products(x, w)


def _gated_fwd(x: Array, w: Array | PackedWeight) -> tuple[Array, None]:
    return _gated(x, w), None


def _gated_bwd(_: None, dy: Array) -> tuple[Any, Any]:
    raise _for_inference()


_gated.defvjp(_gated_fwd, _gated_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _node_products(
    nodes: tuple[Node, ...], layout: matmul.Layout, dtype: Dtype, result: Dtype, x: Array, w: Array
) -> Array:
    """:func:`tbik_jax.kernels.matmul.node_products` with gradients of the same kind: chains over n and over m."""
    return matmul.node_products(x, w, nodes, layout=layout, dtype=dtype)


def _node_products_fwd(
    nodes: tuple[Node, ...], layout: matmul.Layout, dtype: Dtype, result: Dtype, x: Array, w: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _node_products(nodes, layout, dtype, result, x, w), (x, w)


def _node_products_bwd(
    nodes: tuple[Node, ...], layout: matmul.Layout, dtype: Dtype, result: Dtype, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, w = saved  # [M, slots, k], a weight in that layout; dy [nodes, M, N]
    leaf, dx, dw = layout.index("l"), [], []
    for node, of_node in zip(nodes, _cotangent(dy, result, x, w), strict=True):
        of_w = lax.slice_in_dim(w, node.start, node.stop, axis=leaf)
        dx.append(matmul.input_gradient(of_node, of_w, layout=layout))
        dw.append(matmul.weight_gradient(of_node, x[:, node.start : node.stop], layout=layout))
    return cast(jnp.concatenate(dx, axis=1), x.dtype), cast(jnp.concatenate(dw, axis=leaf), w.dtype)


_node_products.defvjp(_node_products_fwd, _node_products_bwd)


def _local_nodes(tree: Tree, axis_name: str | None) -> tuple[Schedule, tuple[Node, ...]]:
    """What a rank's product leaves the kernel as, over its slots.

    Whole nodes where all ranks have the same ones: those of rank 0, which holds the leaves from 0 on. Else leaves, and the
    mesh adds them.
    """
    plan = schedule(tree, 1 if axis_name is None else axis_size(axis_name))
    leaves = tuple(Node(i, i + 1) for i in range(plan.slots))
    return plan, plan.rank_nodes[0] if plan.is_uniform else leaves


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_products(nodes: tuple[Node, ...], x: Array, w: PackedWeight) -> Array:
    return matmul.node_products(x, w, nodes)


def _packed_fwd(nodes: tuple[Node, ...], x: Array, w: PackedWeight) -> tuple[Array, None]:
    return _packed_products(nodes, x, w), None


def _packed_bwd(nodes: tuple[Node, ...], _: None, dy: Array) -> tuple[Any, Any]:
    raise NotImplementedError("packed weights are laid out for inference; differentiate with the [N, K] weight instead")


_packed_products.defvjp(_packed_fwd, _packed_bwd)
