"""Meshes over the first few devices, and arrays laid out by leaf."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tbik_jax.tree import Schedule


def mesh_of(ranks: int, axis_name: str = "tp") -> Mesh:
    """Skips the test where there are fewer devices, which only GPUs are: without enough virtual CPUs no test starts."""
    devices = jax.devices()
    if len(devices) < ranks:
        pytest.skip(f"this takes {ranks} devices, and there are {len(devices)} ({jax.default_backend()})")
    return Mesh(np.array(devices[:ranks]), (axis_name,))


def by_slot(leaves: np.ndarray, plan: Schedule, fill: float = np.nan) -> np.ndarray:
    """``leaves [L, ...]`` -> ``[ranks * slots, ...]``: rank r's leaves from its slot 0 on, ``fill`` in unread slots."""
    out = np.full((plan.ranks, plan.slots, *leaves.shape[1:]), fill, leaves.dtype)
    for rank, held in enumerate(plan.ranges):
        out[rank, : len(held)] = leaves[held.start : held.stop]
    return out.reshape(-1, *leaves.shape[1:])


def from_slots(x: np.ndarray, plan: Schedule) -> np.ndarray:
    """The inverse of :func:`by_slot`: the leaves in order, unread slots left out."""
    by_rank = np.asarray(x).reshape(plan.ranks, plan.slots, *np.shape(x)[1:])
    return np.concatenate([by_rank[rank, : len(held)] for rank, held in enumerate(plan.ranges)])


def columns_by_slot(x: np.ndarray, plan: Schedule, fill: float = np.nan) -> np.ndarray:
    """``[M, L * n]`` -> ``[M, ranks * slots * n]``: columns as a column-parallel layer has them."""
    by_leaf = x.reshape(len(x), plan.tree.leaves, -1).swapaxes(0, 1)
    return by_slot(by_leaf, plan, fill).swapaxes(0, 1).reshape(len(x), -1)


def columns_from_slots(y: np.ndarray, plan: Schedule) -> np.ndarray:
    """The inverse of :func:`columns_by_slot`."""
    by_leaf = np.asarray(y).reshape(len(y), plan.ranks * plan.slots, -1).swapaxes(0, 1)
    return from_slots(by_leaf, plan).swapaxes(0, 1).reshape(len(y), -1)
