"""Bitwise comparison, for the tests of this package and of whoever builds on it."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np


def bits(x: Any) -> np.ndarray:
    """``x`` as unsigned integers of the same width."""
    x = np.ascontiguousarray(np.asarray(x))
    return x.view(np.dtype(f"u{x.dtype.itemsize}")) if x.dtype != np.bool_ else x.astype(np.uint8)


def digest(*arrays: Any) -> str:
    """SHA-256 over shapes, dtypes and all bits."""
    sha = hashlib.sha256()
    for x in map(np.asarray, arrays):
        sha.update(f"{x.dtype}{x.shape}".encode())
        sha.update(np.ascontiguousarray(x).tobytes())
    return sha.hexdigest()


def _ordered(x: np.ndarray) -> np.ndarray:
    """Bit patterns as integers in the order of the floats they stand for."""
    b = bits(x).astype(np.int64)
    top = 1 << (8 * x.dtype.itemsize - 1)
    return np.where(b >= top, top - b - 1, b)


def assert_bitwise_equal(got: Any, want: Any, what: str = "arrays") -> None:
    """Fail unless two pytrees of arrays agree in structure, shape, dtype and every bit (NaN and -0.0 included).

    The message names the first difference: where, both values, both bit patterns, the distance in units in the last
    place, and the share of elements that differ.
    """
    got_tree, want_tree = str(jax.tree.structure(got)), str(jax.tree.structure(want))
    if got_tree != want_tree:
        raise AssertionError(f"{what}: other structure, {got_tree} against {want_tree}")
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        name = what + jax.tree_util.keystr(path)
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{name}: {a.dtype}{a.shape} against {b.dtype}{b.shape}")
        different = bits(a) != bits(b)
        if different.any():
            at = tuple(int(i) for i in np.argwhere(different)[0])
            ulp = ""
            if np.issubdtype(a.dtype, np.floating) or a.dtype.name == "bfloat16":
                ulp = f", {abs(int(_ordered(a)[at]) - int(_ordered(b)[at]))} ULP apart"
            raise AssertionError(
                f"{name}: {different.mean():.2%} of {a.size} elements differ; first at {at}: "
                f"{a[at]!r} (0x{bits(a)[at]:x}) against {b[at]!r} (0x{bits(b)[at]:x}){ulp}"
            )
