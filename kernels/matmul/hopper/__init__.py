"""Products in the order of the tree on Hopper GPUs (compute capability 9.0), with Pallas' Mosaic GPU kernels.

    out[node][m, n] = sum over the leaves of the node, in its order, of  leaf_l[m, n]
    leaf_l[m, n]    = sum_k a[m, l, k] * b[n, l, k]   on the tensor cores: f32 from +0, k ascending in steps of 16

`tbik_jax.program` turns a tree into steps; ``large`` and ``small`` are the kernels, for many rows and for few, with the same
bits; ``settling`` adds and keeps sums that wait; ``split`` makes bfloat16 operands of float32; ``tuning`` chooses tiles.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tbik_jax._problems import Problems
from tbik_jax.kernels.backend import multiprocessors as _multiprocessors
from tbik_jax.kernels.matmul.hopper import large, small, split, tuning
from tbik_jax.kernels.matmul.hopper.large import Operand, Problem, Tiles
from tbik_jax.kernels.matmul.hopper.small import SmallTiles
from tbik_jax.program import program
from tbik_jax.tree import Node

__all__ = ["SmallTiles", "Tiles", "gated", "is_gated", "product", "products"]

Array = jax.Array

DTYPES = ("bfloat16", "float16", "float32")

#: Other tiles than those chosen by shape; for measurements.
Change = Callable[[Any], Any]


def product(
    spec: str,
    a: Array,
    b: Array,
    nodes: Sequence[Node],
    *,
    dtype: DTypeLike | None = None,
    tiles: Tiles | SmallTiles | Change | None = None,
) -> Array:
    """A product whose contraction is cut in leaves, reduced to nodes of the canonical tree.

    Args:
        spec: Where the dimensions are, like ``"mlk,nlk->mn"``: rows ``m``, columns ``n``, leaves ``l`` (absent: one leaf),
            ``k`` inside a leaf, and a batch ``b`` of products. Weights stored ``[N, K]`` are ``"nlk"``, or ``"lnk"`` leaf by
            leaf. The last dimension of an operand is ``k``, or its ``m`` or ``n`` (as in gradients: ``"lkm,lkn->mn"``).
        a, b: bf16, f16 or f32, both the same. f32 is multiplied in bfloat16 pieces (`split`), at an eighth of the speed.
        nodes: Nodes that cover leaves 0, 1, ... in order; the root alone gives the whole sum.
        dtype: Of the result, rounded to once: that of ``a`` by default, or f32.
        tiles: Performance-only; chosen by shape, or what a function makes of that choice.

    Returns:
        ``[m, n]`` as ``spec`` orders it, for one node; else ``[nodes, m, n]``.

    Guarantee: an element is a function of its row of ``a``, its row of ``b`` and its node: not of the sizes, the layout,
    the tiles, or what else is computed.

    Raises:
        ValueError: a spec, shapes or nodes that do not fit.
        NotImplementedError: another dtype, or a layout whose last dimension is the leaf or the batch.
    """
    return products(spec, a, b, nodes, None, dtype=dtype, tiles=tiles)[0]


def products(
    spec: str,
    a: Array,
    b: Array,
    nodes: Sequence[Node],
    parts: Sequence[int] | None,
    *,
    dtype: DTypeLike | None = None,
    tiles: Tiles | SmallTiles | Change | None = None,
) -> tuple[Array, ...]:
    """:func:`product`, its ``n`` cut in ``parts``, each an array of its own: projections that share an input and a weight."""
    of_a, of_b, of_out = _parse(spec)
    swapped = parts is None and {"m", "n"} <= set(of_out) and of_out.index("n") < of_out.index("m")
    if swapped:  # results leave the kernel row by row; a product commutes, so that the operands may change places
        of_a, of_b, of_out = (axes.translate(str.maketrans("mn", "nm")) for axes in (of_b, of_a, of_out))
        a, b = b, a
    sizes: dict[str, int] = {}
    with Problems("hopper.product") as problems:
        problems.check(
            set(of_a) <= set("bmlk") and {"m", "k"} <= set(of_a), f"a is {of_a!r}: give m, k, perhaps l and b"
        )
        problems.check(
            set(of_b) <= set("bnlk") and {"n", "k"} <= set(of_b), f"b is {of_b!r}: give n, k, perhaps l and b"
        )
        problems.check(
            sorted(of_out) == sorted({"m", "n"} | ({"b"} & set(of_a + of_b))),
            f"the result is {of_out!r}: give m and n, and b where an operand has it",
        )
        problems.check(
            ("l" in of_a) == ("l" in of_b), f"one of {of_a!r} and {of_b!r} is cut in leaves, the other is not"
        )
        for name, axes, x in (("a", of_a, a), ("b", of_b, b)):
            if problems.check(x.ndim == len(axes), f"{name} has shape {x.shape}, not {len(axes)} dimensions {axes!r}"):
                for axis, size in zip(axes, x.shape, strict=True):
                    problems.check(size > 0, f"{name} has no elements along {axis!r}")
                    problems.check(
                        sizes.setdefault(axis, size) == size, f"{axis!r} is {sizes[axis]} in a and {size} in b"
                    )
            if axes[-1] in "lb":
                problems.unsupported(
                    f"{name} is laid out {axes!r}; the last dimension must be k, m or n: transpose it first"
                )
            if x.dtype.name not in DTYPES:
                problems.unsupported(f"{name} is {x.dtype}; supported are {', '.join(DTYPES)}")
        problems.check(a.dtype == b.dtype, f"a is {a.dtype} and b {b.dtype}; cast one of them")
        parts = (sizes.get("n", 0),) if parts is None else tuple(parts)
        problems.check(
            len(parts) == 1 or of_out[-1] == "n", f"parts of n, which is not the last dimension of {of_out!r}"
        )
        problems.check(
            sum(parts) == sizes.get("n", 0) and all(n > 0 for n in parts),
            f"parts {parts} do not make the {sizes.get('n')} columns of b",
        )
        leaves = sizes.get("l", 1)
        spans = [node.span for node in nodes]
        problems.check(
            bool(spans) and [s for s, _ in spans] == [0, *[e for _, e in spans[:-1]]] and spans[-1][1] == leaves,
            f"nodes {spans} do not cover the {leaves} leaves one after the other",
        )
        out_dtype = jnp.dtype(dtype or a.dtype)
        if out_dtype.name not in DTYPES:
            problems.unsupported(f"results of {out_dtype}; supported are {', '.join(DTYPES)}")
    if a.dtype == jnp.float32:
        left, right = (split.right, split.left) if swapped else (split.left, split.right)
        a, b = left(a, of_a.index("k")), right(b, of_b.index("k"))
    steps = program(nodes)
    k = a.shape[of_a.index("k")]
    of_rows, of_columns = Operand(of_a, "m"), Operand(of_b, "n")
    batch = sizes.get("b", 1)
    axes = "s" + of_out
    problem = Problem(sizes["m"], sizes["n"], k, batch, of_rows, of_columns, axes, a.dtype, out_dtype, steps)
    a, b = _padded(of_rows, a), _padded(of_columns, b)
    blocks = _multiprocessors()
    change, tiles = (tiles, None) if callable(tiles) else (_unchanged, tiles)
    if tiles is None and of_out == "mn" and of_rows.k_major and of_columns.k_major and problem.m <= tuning.SMALL_ROWS:
        tiles = tuning.small_tiles(problem, blocks)
        tiles = tiles and change(tiles)
    if isinstance(tiles, SmallTiles):
        outs = small.products(problem, tuple(nodes), tiles, a, b, parts)
    else:  # of many rows a kernel for each part
        starts = itertools.accumulate(parts, initial=0)
        outs = tuple(
            _part(problem, n, start, tiles or change, a, b, blocks) for n, start in zip(parts, starts, strict=False)
        )
    return tuple(out[0] for out in outs) if len(nodes) == 1 else outs


def is_gated(a: Array, b: Array) -> bool:
    """Whether :func:`gated` has a kernel: many rows, in bf16 or f16, of widths that TMA can begin at."""
    return a.shape[0] > tuning.SMALL_ROWS and a.dtype == b.dtype != jnp.float32 and b.shape[1] % 16 == 0


def gated(a: Array, b: Array, *, tiles: Tiles | None = None) -> Array:
    """``swiglu(a @ gate.T, a @ up.T)`` in one kernel: ``a [M, K]``, ``b [1, 2 N, K]``, gate above up. Where :func:`is_gated`.

    Guarantee: the bits of the stages one after the other: gate and up are rounded to the dtype of ``a`` first.
    """
    (m, k), n = a.shape, b.shape[1] // 2
    rows, columns = Operand("mk", "m"), Operand("lnk", "n")
    a, b = _padded(rows, a), _padded(columns, b)
    problem = Problem(m, n, k, 1, rows, columns, "smn", a.dtype, a.dtype, program((Node(0, 1),)), up=n)
    blocks = _multiprocessors()
    tiles = tiles or tuning.large_tiles(problem, blocks)
    return large.product(problem, tiles, a, b, blocks=blocks)[0]


def _unchanged(tiles: Any) -> Any:
    return tiles


def _part(problem: Problem, n: int, start: int, tiles: Tiles | Change, a: Array, b: Array, blocks: int) -> Array:
    """Columns ``start`` to ``start + n`` of many rows. TMA reads columns by eights, or by 64 where they lie side by side."""
    if start % (8 if problem.b.k_major else 64):
        axis = problem.b.axes.index("n")
        b, start = _padded(problem.b, jax.lax.slice_in_dim(b, start, start + n, axis=axis)), 0
    part = dataclasses.replace(problem, n=n, first=start)
    chosen = tiles(tuning.large_tiles(part, blocks)) if callable(tiles) else tiles
    return large.product(part, chosen, a, b, blocks=blocks)


def _parse(spec: str) -> tuple[str, str, str]:
    try:
        operands, out = spec.replace(" ", "").split("->")
        a, b = operands.split(",")
    except ValueError:
        raise ValueError(f"hopper.product: spec {spec!r} is not of the form 'mlk,nlk->mn'") from None
    return a, b, out


def _padded(operand: Operand, x: Array) -> Array:
    """What TMA asks of sizes: the fast dimension in whole 128-byte rows, the slow one in eights. Zeros add nothing."""
    fast, slow = ("k", operand.free) if operand.k_major else (operand.free, "k")
    pad = [(0, 0)] * x.ndim
    for axis, of in ((fast, 64), (slow, 8)):
        i = operand.axes.index(axis)
        if axis == slow and x.shape[i] < of:
            continue  # smaller than one tile is fine, and spares decode a copy
        pad[i] = (0, -x.shape[i] % of)
    return jnp.pad(x, pad) if any(after for _, after in pad) else x
