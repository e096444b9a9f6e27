"""Meshes over the first few virtual devices, and arrays laid out by leaf."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from tbik_jax.tree import Schedule


def mesh_of(ranks: int, axis_name: str = "tp") -> Mesh:
    return Mesh(np.array(jax.devices()[:ranks]), (axis_name,))


def by_slot(leaves: np.ndarray, plan: Schedule, fill: float = np.nan) -> np.ndarray:
    """``leaves [L, ...]`` -> ``[ranks * slots, ...]``: rank r's leaves from its slot 0 on, ``fill`` in unread slots."""
    out = np.full((plan.ranks, plan.slots, *leaves.shape[1:]), fill, leaves.dtype)
    for rank, held in enumerate(plan.ranges):
        out[rank, : len(held)] = leaves[held.start : held.stop]
    return out.reshape(-1, *leaves.shape[1:])
