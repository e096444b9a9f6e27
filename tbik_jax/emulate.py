"""What every rank of a mesh would compute, on one device: a mesh axis made of ``jax.vmap``.

Collectives over a ``vmap`` axis are exchanges within one array, the kernels run for one rank after another, and everything
else is elementwise or a move of bits. So whoever has one GPU can see what eight would give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from tbik_jax._problems import Problems

Array = jax.Array


def emulate(
    f: Callable[..., Any],
    *,
    ranks: int,
    axis_name: str = "tp",
    in_specs: Any,
    out_specs: Any,
    check_replicas: bool = True,
) -> Callable[..., Any]:
    """``jax.shard_map(f, mesh=..., in_specs=in_specs, out_specs=out_specs)`` for ``ranks`` ranks, on one device.

    >>> eight = emulate(layer, ranks=8, in_specs=(P(), P("tp")), out_specs=P(None, "tp"))
    >>> one = emulate(layer, ranks=1, in_specs=(P(), P("tp")), out_specs=P(None, "tp"))
    >>> assert_bitwise_equal(eight(x, w), one(x, w))

    Args:
        f: The program of one rank, as for ``shard_map``: it calls :func:`tbik_jax.tree_psum`, ``lax.axis_index`` and so
            on by ``axis_name``. Gradients are taken inside of it, and returned.
        ranks: Size of the axis.
        axis_name: The axis.
        in_specs, out_specs: ``PartitionSpec`` for every array, or for whole subtrees, as for ``shard_map``:
            ``P(None, "tp")`` slices dimension 1 evenly, ``P()`` gives every rank the whole.
        check_replicas: Compare what an out spec ``P()`` declares the same on all ranks, in every bit. A caller's own
            ``jit`` or ``vmap`` leaves no values to look at, and no check: ``y[None]`` with ``P("tp")`` shows all ranks.

    Returns:
        A function of whole arrays, compiled. Where outputs are the same on all ranks it returns those of rank 0.

    For a mesh of two axes, emulate the rank of one inside the rank of the other:
    ``emulate(emulate(f, ranks=4, ...), ranks=2, axis_name="dp", ...)``, whose inner specs slice what the outer ones left.
    Inside of a ``shard_map`` over another axis that has to be one of ``check_vma=False``, a limit of JAX.

    Guarantee: for programs of this package's collectives, kernels and layers, the bits of ``shard_map`` on devices of the
    same backend family. Other dots and sums may be batched to other bits (``jnp.dot``), and ``lax.psum`` adds in the order
    of no real mesh. Gradients are those of ``check_vma=False``: no sum over ranks is inserted.

    Raises:
        ValueError: specs, shapes or ranks that do not fit, all listed; replicas that differ.
        NotImplementedError: a gradient taken around the emulation.
    """
    with Problems("emulate") as problems:
        problems.check(
            isinstance(ranks, int) and not isinstance(ranks, bool) and ranks >= 1,
            f"ranks = {ranks!r} is not a positive integer",
        )
        if problems.check(
            isinstance(axis_name, str) and bool(axis_name), f"axis_name = {axis_name!r} is not the name of an axis"
        ):
            _check_specs(problems, "in_specs", in_specs, axis_name)
            _check_specs(problems, "out_specs", out_specs, axis_name)

    @jax.custom_vjp
    def all_ranks(*arguments: Any) -> tuple[Any, dict[str, Array]]:
        leaves, structure = jax.tree.flatten(arguments)
        with Problems("emulate") as problems:
            dimensions = _dimensions(problems, "argument", in_specs, arguments, axis_name)
            for (path, x), dimension in zip(jax.tree.leaves_with_path(arguments), dimensions, strict=True):
                if dimension is not None:
                    problems.check(
                        jnp.shape(x)[dimension] % ranks == 0,
                        f"argument{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}: dimension {dimension} is not a "
                        f"multiple of the {ranks} ranks",
                    )

        def one_rank(rank: Array, leaves: list[Array]) -> Any:
            del rank  # there so that something is mapped
            return f(*jax.tree.unflatten(structure, leaves))

        slices = [x if d is None else _cut(x, d, ranks) for x, d in zip(leaves, dimensions, strict=True)]
        mapped = jax.vmap(one_rank, in_axes=(0, dimensions), axis_name=axis_name, axis_size=ranks)
        by_rank = mapped(jnp.arange(ranks), slices)

        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), by_rank)
        with Problems("emulate") as problems:
            dimensions = _dimensions(problems, "output", out_specs, one, axis_name)
        outputs, agreement = [], {}
        for (path, x), dimension in zip(jax.tree.leaves_with_path(by_rank), dimensions, strict=True):
            if dimension is None:
                agreement[jax.tree_util.keystr(path)] = _equal_to_first(x)
            outputs.append(x[0] if dimension is None else _side_by_side(x, dimension))
        return jax.tree.unflatten(jax.tree.structure(by_rank), outputs), agreement

    all_ranks.defvjp(_no_gradient, _no_gradient)
    compiled = jax.jit(all_ranks)

    @wraps(f)
    def emulated(*arguments: Any) -> Any:
        outputs, agreement = compiled(*arguments)
        if check_replicas:
            with Problems("emulate") as problems:
                for name, equal in agreement.items():
                    if not isinstance(equal, jax.core.Tracer):
                        others = np.flatnonzero(~np.asarray(equal)).tolist()
                        problems.check(
                            not others,
                            f"output{name} has a spec P(), the same on all ranks, but ranks {others} differ from rank 0",
                        )
        return outputs

    return emulated


def _no_gradient(*_: Any) -> Any:
    # Through the copy of rank 0 it would miss the other ranks' share, and JAX cannot: it looks for the axis outside of vmap.
    raise NotImplementedError(
        "emulate: take gradients inside the emulated program, jax.vjp within f, and return them; around it there are none"
    )


# Specs ---------------------------------------------------------------------------------------------------------------


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _text(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"


def _names(entry: Any) -> tuple[Any, ...]:
    """The axes that one entry of a spec names."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _check_specs(problems: Problems, name: str, specs: Any, axis_name: str) -> None:
    for path, spec in jax.tree.leaves_with_path(specs, is_leaf=_is_spec):
        at = f"{name}{jax.tree_util.keystr(path)}"
        if problems.check(_is_spec(spec), f"{at} = {spec!r} is not a PartitionSpec"):
            names = [axis for entry in spec for axis in _names(entry)]
            others = [axis for axis in names if axis != axis_name]
            problems.check(not others, f"{at} = {_text(spec)} names {others}; the emulated axis is {axis_name!r} alone")
            problems.check(names.count(axis_name) <= 1, f"{at} = {_text(spec)} splits more than one dimension")


def _dimensions(problems: Problems, name: str, specs: Any, arrays: Any, axis_name: str) -> list[int | None]:
    """For every leaf of ``arrays``, the dimension that its spec splits."""
    found: list[PartitionSpec] = []
    try:
        jax.tree.map(
            lambda spec, part: found.extend([spec] * len(jax.tree.leaves(part))), specs, arrays, is_leaf=_is_spec
        )
    except ValueError as error:
        problems.add(f"the {name}s do not have the structure of their specs: {error}")
        problems.raise_if_any()
    dimensions: list[int | None] = []
    for (path, x), spec in zip(jax.tree.leaves_with_path(arrays), found, strict=True):
        fits = problems.check(
            len(spec) <= jnp.ndim(x),
            f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, fewer dimensions than its spec "
            f"{_text(spec)}",
        )
        split = [i for i, entry in enumerate(spec) if axis_name in _names(entry)]
        dimensions.append(split[0] if split and fits else None)
    return dimensions


# Slices and replicas -------------------------------------------------------------------------------------------------


def _cut(x: Array, dimension: int, ranks: int) -> Array:
    """``[.., n, ..]`` -> ``[.., ranks, n / ranks, ..]``."""
    shape = jnp.shape(x)
    return jnp.reshape(x, (*shape[:dimension], ranks, shape[dimension] // ranks, *shape[dimension + 1 :]))


def _side_by_side(x: Array, dimension: int) -> Array:
    """The slices ``[ranks, ...]`` one after another along ``dimension`` of a slice."""
    shape = list(x.shape[1:])
    shape[dimension] *= x.shape[0]
    return jnp.moveaxis(x, 0, dimension).reshape(shape)


def _equal_to_first(x: Array) -> Array:
    """``[ranks]``: whether each rank has the bits of rank 0."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return _equal_to_first(x.real) & _equal_to_first(x.imag)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return jnp.all(x == x[:1], axis=tuple(range(1, x.ndim)))
