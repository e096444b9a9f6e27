"""AdamW and the norm of all gradients, in steps whose bits do not depend on how parameters are sharded.

An optimizer is elementwise, and yet its bits depend on the shard. Behind a clipped gradient, in one program, the moments that
``optax.adamw`` gives 70 000 elements differ on XLA:CPU in 36 % of them from those that it gives the same elements among three
million: which product of ``b1 * mu + (1 - b1) * g`` is fused with the sum depends on the shape. Here every product is rounded
before it is added to anything.

``adamw`` has the signature of an ``optax.GradientTransformation`` and may stand in a chain of such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax._axes import axis_size, varying_axes
from tbik_jax._problems import Problems
from tbik_jax.collectives import sum_of_leaves
from tbik_jax.contract import Contract
from tbik_jax.kernels.exact import cast, product, quotient, reciprocal, rounded, tree_sum
from tbik_jax.kernels.token_sum import token_sum
from tbik_jax.tree import schedule

Array = jax.Array


class Transformation(NamedTuple):
    """``init(params) -> state`` and ``update(gradients, state, params) -> (updates, state)``, as Optax has them."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


class AdamWState(NamedTuple):
    """f32 moments, laid out as the parameters; the powers of the decays, which correct their bias."""

    steps: Array
    powers: Array  #: ``[b1 ** steps, b2 ** steps]``
    mu: Any
    nu: Any


def adamw(
    learning_rate: float | Callable[[Array], Array],
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
) -> Transformation:
    """Adam with decoupled weight decay.

        mu = b1 * mu + (1 - b1) * g                        nu = b2 * nu + (1 - b2) * g^2
        update = -lr * ((mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps) + weight_decay * p)

    Args:
        learning_rate: A number, or a schedule ``count -> number`` (the first step has count 0), as Optax has them.
        b1, b2, eps, weight_decay: As in the formula.
        mask: Which parameters decay: a pytree of bools like them (or a prefix), or a function of them; None: all.

    State and updates are f32, whatever the dtype of parameters and gradients.

    Guarantee: an element depends on its gradient, moments and parameter alone: not on the shape, the sharding, or what XLA
    fuses around it. On Hopper GPUs roots and reciprocals are approximations of the device's; an H200 gave pieces, other shapes
    and single operations the same bits.

    Raises:
        ValueError: settings out of range; gradients, state and parameters that are not alike; all listed.

    References: Loshchilov and Hutter, arXiv 1711.05101.
    """

    with Problems("adamw") as problems:
        for name, value in (("b1", b1), ("b2", b2)):
            problems.check(0 <= value < 1, f"{name} = {value} is outside [0, 1)")
        problems.check(eps > 0, f"eps = {eps} is not above 0")
        problems.check(weight_decay >= 0, f"weight_decay = {weight_decay} is below 0")

    def init(params: Any) -> AdamWState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return AdamWState(jnp.zeros((), jnp.int32), jnp.ones(2, jnp.float32), zeros, zeros)

    def update(gradients: Any, state: AdamWState, params: Any = None) -> tuple[Any, AdamWState]:
        _check_alike(gradients, state, params)
        powers = product(state.powers, jnp.array([b1, b2], jnp.float32))
        # Behind barriers, so that scalars are computed on the device, once and for all: XLA would fold those of a first step
        # that it knows, dividing otherwise than a GPU does, or have a loop over elements recompute them in its own way.
        count, powers = lax.optimization_barrier((state.steps, powers))
        rate: Any = learning_rate(count) if callable(learning_rate) else learning_rate
        rate, corrections = lax.optimization_barrier((jnp.float32(rate), reciprocal(1.0 - powers)))
        decays = jax.tree.broadcast(True if mask is None else mask(params) if callable(mask) else mask, params)

        def moment(old: Array, new: Array, decay: float) -> Array:
            return product(old, decay) + product(new, 1.0 - decay)

        wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        mu = jax.tree.map(lambda m, g: moment(m, g, b1), state.mu, wide)
        nu = jax.tree.map(lambda n, g: moment(n, product(g, g), b2), state.nu, wide)

        def one(m: Array, n: Array, p: Array, decays: bool) -> Array:
            step = quotient(product(m, corrections[0]), _root(product(n, corrections[1])) + eps)
            if decays and weight_decay:
                step = step + product(p.astype(jnp.float32), weight_decay)
            return product(step, -rate)

        updates = jax.tree.map(one, mu, nu, params, decays)
        return updates, AdamWState(state.steps + 1, powers, mu, nu)

    return Transformation(init, update)


def _root(x: Array) -> Array:
    """A root of its own: XLA would make an approximate inverse root of a quotient by it."""
    return rounded(lax.sqrt(x))


def _check_alike(gradients: Any, state: AdamWState, params: Any) -> None:
    with Problems("adamw") as problems:
        if problems.check(params is not None, "update wants the parameters too, for their decay"):
            wanted = jax.tree.structure(state.mu)
            for name, of in (("gradients", gradients), ("parameters", params)):
                same = jax.tree.structure(of) == wanted  # type: ignore[operator]
                if not problems.check(same, f"the {name} are no pytree like the parameters that the state was made of"):
                    continue
                for (path, x), moment in zip(jax.tree.leaves_with_path(of), jax.tree.leaves(state.mu), strict=True):
                    problems.check(
                        jnp.shape(x) == moment.shape and jnp.issubdtype(jnp.result_type(x), jnp.floating),
                        f"{name}{jax.tree_util.keystr(path)} is {jnp.result_type(x)}{jnp.shape(x)}; the moments there have "
                        f"shape {moment.shape}, and only floats have a gradient",
                    )


def apply_updates(params: Any, updates: Any) -> Any:
    """``params + updates`` in f32, rounded once to each parameter's dtype."""
    return jax.tree.map(lambda p, u: cast(p.astype(jnp.float32) + u, p.dtype), params, updates)


class Cut(NamedTuple):
    """A dimension of an array that a mesh axis may split, in so many leaves; the same on every mesh.

    Where the ranks divide the leaves, a rank holds an even slice of the dimension, or its leaves one an index. Else they are by
    leaf, one an index, in as many slots on every rank (:func:`tbik_jax.leaf_ranges`); even slices would be no whole leaves.
    ``axis_name`` None: one rank has all.
    """

    axis_name: str | None
    dimension: int
    leaves: int


def global_norm(arrays: Any, *, contract: Contract, cuts: Any = ()) -> Array:
    """``sqrt(sum of the squares of all elements of all arrays)``, an f32 scalar, the same on every rank.

    Args:
        arrays: A pytree; this rank's parts, inside ``shard_map``.
        contract: Numerics-bearing: the tree over leaves.
        cuts: For every array the :class:`Cut` s along which a mesh may split it, outer ones first: a list in the order of
            ``jax.tree.leaves(arrays)``; ``()``: no mesh splits any.

    Guarantee: bitwise equal on every mesh that the cuts allow. Squares of a leaf are added by halving, leaves by the tree,
    arrays by halving.

    Raises:
        ValueError: cuts that do not fit, all listed.
    """
    found = jax.tree.leaves_with_path(arrays)
    of_each = list(cuts) or [()] * len(found)
    with Problems("global_norm") as problems:
        problems.check(bool(found), "there are no arrays")
        problems.check(len(of_each) == len(found), f"{len(of_each)} tuples of cuts for {len(found)} arrays")
        for (path, x), of in zip(found, of_each, strict=False):
            _check_cuts(problems, f"arrays{jax.tree_util.keystr(path)}", x, of, contract)
    sums = [_square_sum(x, of, contract) for (_, x), of in zip(found, of_each, strict=True)]
    with Problems("global_norm") as problems:
        for (path, _), total in zip(found, sums, strict=True):
            problems.check(
                not varying_axes(total),
                f"arrays{jax.tree_util.keystr(path)} differs over {sorted(varying_axes(total))}, which its cuts do not name",
            )
    return _root(token_sum(jnp.stack(sums)))


def _check_cuts(problems: Problems, name: str, x: Array, cuts: Any, contract: Contract) -> None:
    problems.check(
        jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0, f"{name} is {x.dtype}{x.shape}; give floats, at least one"
    )
    alike = not isinstance(cuts, Cut) and all(isinstance(cut, Cut) for cut in cuts)
    if not problems.check(alike, f"{name}: its cuts are {cuts!r}, not a tuple of Cut"):
        return
    for cut in cuts:
        ranks = 1 if cut.axis_name is None else axis_size(cut.axis_name)
        inside = problems.check(
            0 <= cut.dimension < x.ndim, f"{name} has shape {x.shape}, without a dimension of {cut}"
        )
        if problems.check(ranks <= cut.leaves, f"{name}: {ranks} ranks for {cut}") and inside:
            slots, size = schedule(contract.tree_over(cut.leaves), ranks).slots, x.shape[cut.dimension]
            problems.check(
                size == slots or (size % slots == 0 and cut.leaves % ranks == 0),
                f"{name} has shape {x.shape}, which {cut} over {ranks} ranks does not cut in {slots} slots of whole leaves",
            )
    dimensions = [cut.dimension for cut in cuts]
    problems.check(len(set(dimensions)) == len(dimensions), f"{name} is cut twice along a dimension: {cuts}")


def _square_sum(x: Array, cuts: Sequence[Cut], contract: Contract) -> Array:
    x = x.astype(jnp.float32)
    squares = product(x, x)
    plans = [
        schedule(contract.tree_over(cut.leaves), 1 if cut.axis_name is None else axis_size(cut.axis_name))
        for cut in cuts
    ]
    slots = [plan.slots for plan in plans]
    # Dimension d becomes (slots, rest of d); slots go to the front, in the order of the cuts.
    shape: list[int] = []
    fronts = [0] * len(cuts)
    for dimension, size in enumerate(x.shape):
        at = next((i for i, cut in enumerate(cuts) if cut.dimension == dimension), None)
        if at is not None:
            fronts[at] = len(shape)
            shape.append(slots[at])
            size //= slots[at]
        shape.append(size)
    by_slot = jnp.moveaxis(squares.reshape(shape), fronts, range(len(cuts)))
    sums = tree_sum(by_slot.reshape(*slots, -1))
    for cut, plan in reversed(list(zip(cuts, plans, strict=True))):
        sums = sum_of_leaves(jnp.moveaxis(sums, -1, 0), cut.axis_name, plan.tree)
    return sums


def clip_by_global_norm(gradients: Any, max_norm: float, *, contract: Contract, cuts: Any = ()) -> tuple[Any, Array]:
    """``(gradients * min(1, max_norm / norm), norm)`` by :func:`global_norm`, whose arguments it takes; in their dtypes."""
    with Problems("clip_by_global_norm") as problems:
        problems.check(max_norm > 0, f"max_norm = {max_norm} is not above 0")
    norm = global_norm(gradients, contract=contract, cuts=cuts)
    factor = lax.optimization_barrier(jnp.minimum(1.0, quotient(jnp.float32(max_norm), norm)))
    return jax.tree.map(lambda g: cast(product(g.astype(jnp.float32), factor), g.dtype), gradients), norm
