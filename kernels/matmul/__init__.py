"""Products whose contraction is cut in leaves, in the order of the canonical tree; by `backend.family`.

    leaf[l, m, n] = sum_k x[m, l, k] * w[l, n, k]     f32, one fixed order per family
    node          = the tree's sum of its leaves      f32

`spec` and `cpu` are the family ``cpu``: ``spec`` says what the bits are, ``cpu`` computes them. `hopper` is ``sm90``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tbik_jax._axes import vary_like
from tbik_jax._problems import Problems
from tbik_jax.kernels import backend, exact
from tbik_jax.kernels.backend import SelfTestError
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.matmul import cpu
from tbik_jax.kernels.matmul.cpu import PackedWeight
from tbik_jax.kernels.swiglu import swiglu
from tbik_jax.tree import Node

__all__ = [
    "Layout",
    "PackedWeight",
    "SelfTestError",
    "gated_products",
    "input_gradient",
    "leaf_products",
    "node_products",
    "pack",
    "parted_products",
    "weight_gradient",
]

Array = jax.Array

#: How a weight is stored: leaves, outputs, contraction. ``"nlk"`` is ``[N, K]`` with K cut in leaves, ``"lkn"`` so is ``[K, N]``.
Layout = Literal["lnk", "nlk", "lkn"]

_NAMES = {"l": "leaves", "n": "N", "k": "k"}
_DTYPES = ("float32", "bfloat16", "float16")


def leaf_products(x: Array, w: Array | PackedWeight) -> Array:
    """The product of every leaf.

    Args:
        x: ``[M, leaves, k]``, f32, bf16 or f16.
        w: ``[leaves, N, k]`` or its :func:`pack`-ed form.

    Returns:
        ``[leaves, M, N]`` f32. On the CPU, element ``[l, m, n]`` is `spec.leaf_product` of row m and column n.

    Guarantee: it depends on that row and that column alone: not on M, N, the other leaves, or the layout of ``w``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: a backend without kernels.
        SelfTestError: XLA computes other bits here (checked once per process, before the first product).
    """
    leaves = _check("leaf_products", x, w)
    return node_products(x, w, tuple(Node(i, i + 1) for i in range(leaves)))


def node_products(
    x: Array,
    w: Array | PackedWeight,
    nodes: Sequence[Node],
    *,
    layout: Layout = "lnk",
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """The products of the leaves, added to the nodes of a tree.

    Args:
        x: ``[M, leaves, k]``.
        w: ``[leaves, N, k]``, or as ``layout`` says, or packed.
        nodes: They cover the leaves, in order.
        layout: How ``w`` is stored; no bit depends on it, and a Hopper GPU copies none of them.
        dtype: Of the result, rounded to once. Nodes that are still to be added to others stay f32.

    Returns:
        ``[nodes, M, N]``.

    Guarantee: as :func:`leaf_products`; a node's value is that of adding the leaves one by one.
    """
    _check("node_products", x, w, layout=layout)
    if _family() == "sm90":
        return _hopper(f"mlk,{layout}->mn", x, w, nodes, dtype)[0]
    leaves = one_by_one(cpu.leaf_products)(x, w if isinstance(w, PackedWeight) else _by_leaf(w, layout))
    if len(nodes) < leaves.shape[0]:
        leaves = exact.rounded(leaves)
        leaves = jnp.stack([node.evaluate(lambda i: leaves[i], jnp.add) for node in nodes])
    return exact.cast(leaves, dtype)


def parted_products(
    x: Array, w: Array | PackedWeight, parts: Sequence[int], *, dtype: DTypeLike = jnp.float32
) -> tuple[Array, ...]:
    """Products of one leaf with the projections that lie side by side in ``w [1, N, k]``, each an array of its own.

    On a Hopper GPU a kernel writes them apart, which spares the copies that cutting its result would cost.
    """
    _check("parted_products", x, w)
    if _family() == "sm90":
        return tuple(y[0] for y in _hopper("mlk,lnk->mn", x, w, (Node(0, 1),), dtype, parts))
    y = node_products(x, w, (Node(0, 1),), dtype=dtype)[0]
    return tuple(jnp.split(y, list(itertools.accumulate(parts))[:-1], axis=-1))


def gated_products(x: Array, w: Array | PackedWeight) -> Array:
    """``swiglu(gate, up)`` of the two projections of one leaf in ``w [1, 2 N, K]``, gate above up; ``x [M, K]``.

    Guarantee: the bits of :func:`parted_products` in the dtype of ``x``, then :func:`tbik_jax.kernels.swiglu.swiglu`. On a
    Hopper GPU, of many rows, one kernel does both, and neither projection goes to memory.
    """
    _check("gated_products", x[:, None], w)
    if _family() == "sm90" and not isinstance(w, PackedWeight):
        from tbik_jax.kernels.matmul import hopper

        if hopper.is_gated(x, w):
            return vary_like(one_by_one(lambda x, w: hopper.gated(x, w))(x, w), x, w)
    n = (w.n if isinstance(w, PackedWeight) else w.shape[1]) // 2
    return swiglu(*parted_products(x[:, None], w, (n, n), dtype=x.dtype))


def input_gradient(dy: Array, w: Array, *, layout: Layout = "lnk") -> Array:
    """``dx[m, l, k] = sum_n dy[m, n] * w[l, n, k]``: one leaf over n. ``dy [M, N]``, ``w`` as stored; f32 ``[M, leaves, k]``."""
    if _family() == "sm90":
        stored = layout.translate(str.maketrans("lnk", "bkn"))  # the letters of a product over n
        return _hopper(f"mk,{stored}->mbn", dy, w, (Node(0, 1),), jnp.float32)[0][0]
    w = _by_leaf(w, layout)
    leaves, n, _ = w.shape
    dy = jnp.broadcast_to(dy[:, None], (dy.shape[0], leaves, n))
    return one_by_one(cpu.leaf_products)(dy, w.swapaxes(1, 2)).swapaxes(0, 1)


def weight_gradient(dy: Array, x: Array, *, layout: Layout = "lnk") -> Array:
    """``dw[l, n, k] = sum_m dy[m, n] * x[m, l, k]``: one leaf over the rows. ``dy [M, N]``, ``x [M, leaves, k]``; f32.

    It is laid out as the weight.
    """
    if _family() == "sm90":
        stored = layout.translate(str.maketrans("lnk", "bmn"))
        return _hopper(f"km,kbn->{stored}", dy, x, (Node(0, 1),), jnp.float32)[0][0]
    m, leaves, _ = x.shape
    dy = jnp.broadcast_to(dy.T[:, None], (dy.shape[1], leaves, m))
    dw = one_by_one(cpu.leaf_products)(dy, x.transpose(1, 2, 0))
    return dw.transpose(["lnk".index(axis) for axis in layout])


def _by_leaf(w: Array, layout: Layout) -> Array:
    return w if layout == "lnk" else w.transpose([layout.index(axis) for axis in "lnk"])


def pack(w: Array, *, full: bool = True) -> PackedWeight | Array:
    """Lay out ``w [leaves, N, k]`` for the fastest products; performance-only. A Hopper GPU reads it as it is.

    ``full=False`` halves the memory; products of 64 rows and more then cost a copy of the weight each time.
    """
    with Problems("matmul.pack") as problems:
        problems.check(w.ndim == 3, f"w has shape {w.shape}, not [leaves, N, k]")
        _check_dtype(problems, "w", w)
    return w if backend.family() == "sm90" else cpu.pack(w, full=full)


def _family() -> backend.Family:
    family = backend.family()
    exact.self_test()
    if family == "cpu":
        cpu.self_test()
    return family


def _hopper(
    spec: str,
    a: Array,
    b: Array | PackedWeight,
    nodes: Sequence[Node],
    dtype: DTypeLike,
    parts: Sequence[int] | None = None,
) -> tuple[Array, ...]:
    """``[nodes, ...]`` of every part, which vary over the mesh as the operands do.

    Operands of different dtypes are both widened to f32, which is exact.
    """
    from tbik_jax.kernels.matmul import hopper

    if isinstance(b, PackedWeight):
        raise NotImplementedError("a weight packed for the CPU does not serve a Hopper GPU; give it as it is stored")
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    products = partial(hopper.products, spec, nodes=tuple(nodes), parts=parts, dtype=dtype)
    outs = tuple(vary_like(out, a, b) for out in one_by_one(lambda a, b: products(a, b))(a, b))
    return tuple(out[None] for out in outs) if len(nodes) == 1 else outs


def _check(where: str, x: Array, w: Array | PackedWeight, *, layout: Layout = "lnk") -> int:
    with Problems(f"matmul.{where}") as problems:
        problems.check(x.ndim == 3, f"x has shape {x.shape}, not [M, leaves, k]")
        _check_dtype(problems, "x", x)
        if isinstance(w, PackedWeight):
            leaves, n, k = w.leaves, w.n, w.k
        else:
            problems.check(w.ndim == 3, f"w has shape {w.shape}, not [{', '.join(_NAMES[d] for d in layout)}]")
            _check_dtype(problems, "w", w)
            sizes = dict(zip(layout, (*w.shape, 0, 0, 0), strict=False))
            leaves, n, k = sizes["l"], sizes["n"], sizes["k"]
        if x.ndim == 3:
            problems.check(
                x.shape[1:] == (leaves, k),
                f"x has (leaves, k) = {x.shape[1:]}, w has {(leaves, k)}; both must be cut in the same leaves",
            )
        problems.check(min(n, k, leaves) > 0, f"w has an empty dimension: (leaves, N, k) = {(leaves, n, k)}")
    return leaves


def _check_dtype(problems: Problems, name: str, x: Array) -> None:
    problems.check(x.dtype.name in _DTYPES, f"{name} is {x.dtype}; supported are {', '.join(_DTYPES)}")
