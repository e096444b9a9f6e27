"""What a mesh axis looks like from inside ``shard_map``: its size, and whether a value varies over it."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

Array = jax.Array


def axis_size(axis_name: str) -> int:
    """The number of ranks; raises ``ValueError`` outside a ``shard_map`` that has the axis."""
    try:
        return int(lax.axis_size(axis_name))
    except NameError:
        raise ValueError(
            f"axis {axis_name!r} is not bound: call this inside jax.shard_map over a mesh with an axis {axis_name!r}"
        ) from None


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which ``x`` may differ (empty under ``check_vma=False``, which does not track them)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array, *axis_names: str) -> Array:
    """Mark ``x`` as varying over the axes, as far as it is not yet; no data moves."""
    missing = tuple(name for name in axis_names if name not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: Array, *others: Any) -> Array:
    """Mark ``x`` as varying over every axis that one of ``others`` varies over."""
    return vary(x, *sorted(frozenset().union(*(varying_axes(other) for other in others))))
