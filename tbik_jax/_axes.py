"""What a mesh axis looks like from inside ``shard_map``: its size, and whether a value varies over it.

An axis may also be bound by ``jax.vmap(..., axis_name=...)``, as :func:`tbik_jax.emulate` does. No mesh knows that axis, and
types do not track it: a value that ``vmap`` has not batched is one that does not vary.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

Array = jax.Array


def axis_size(axis_name: str) -> int:
    """The number of ranks; raises ``ValueError`` outside a ``shard_map`` (or ``vmap``) that has the axis."""
    try:
        return int(lax.axis_size(axis_name))
    except NameError:
        raise ValueError(
            f"axis {axis_name!r} is not bound: call this inside jax.shard_map over a mesh with an axis {axis_name!r}, "
            f"or inside tbik_jax.emulate"
        ) from None


def is_of_mesh(axis_name: str) -> bool:
    """Whether ``shard_map`` bound the axis, and not ``vmap``."""
    return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which ``x`` may differ (empty under ``check_vma=False``, which does not track them)."""
    return axes_of_type(jax.typeof(x))


def axes_of_type(of: Any) -> frozenset[str]:
    """:func:`varying_axes` of whatever has that type."""
    return frozenset(of.manual_axis_type.varying)


def vary(x: Array, *axis_names: str) -> Array:
    """Mark ``x`` as varying over the axes of the mesh, as far as it is not yet; no data moves."""
    missing = tuple(name for name in axis_names if is_of_mesh(name) and name not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: Array, *others: Any) -> Array:
    """Mark ``x`` as varying over every axis that one of ``others`` varies over."""
    return vary(x, *sorted(frozenset().union(*(varying_axes(other) for other in others))))


def all_gather(x: Array, axis_name: str, *, axis: int = 0, tiled: bool = False) -> Array:
    """``lax.all_gather`` whose result is typed as the same on every rank."""
    if is_of_mesh(axis_name):
        return lax.all_gather(vary(x, axis_name), axis_name, axis=axis, tiled=tiled, to="invarying")
    # Under vmap the result is not batched, which says the same; jax 0.10 does not take `to` there.
    return lax.all_gather(x, axis_name, axis=axis, tiled=tiled)
