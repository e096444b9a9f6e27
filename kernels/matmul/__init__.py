"""Products by leaf: ``out[l, m, n] = sum_k x[m, l, k] * w[l, n, k]`` in f32, the values that the canonical tree adds.

`spec` says what the bits are, `cpu` computes them.
"""

from __future__ import annotations

import jax

from tbik_jax._problems import Problems
from tbik_jax.kernels import backend, exact
from tbik_jax.kernels.backend import SelfTestError
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.matmul import cpu
from tbik_jax.kernels.matmul.cpu import PackedWeight

__all__ = ["PackedWeight", "SelfTestError", "leaf_products", "pack"]

_DTYPES = ("float32", "bfloat16", "float16")


def leaf_products(x: jax.Array, w: jax.Array | PackedWeight) -> jax.Array:
    """The product of every leaf.

    Args:
        x: ``[M, leaves, k]``, f32, bf16 or f16.
        w: ``[leaves, N, k]`` or its :func:`pack`-ed form.

    Returns:
        ``[leaves, M, N]`` f32. Element ``[l, m, n]`` is `spec.leaf_product` of row m and column n.

    Guarantee: it depends on that row and that column alone: not on M, N, the other leaves, or the layout of ``w``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        SelfTestError: XLA computes other bits here (checked once per process, before the first product).
    """
    with Problems("matmul.leaf_products") as problems:
        problems.check(x.ndim == 3, f"x has shape {x.shape}, not [M, leaves, k]")
        _check_dtype(problems, "x", x)
        if isinstance(w, PackedWeight):
            leaves, n, k = w.leaves, w.n, w.k
        else:
            problems.check(w.ndim == 3, f"w has shape {w.shape}, not [leaves, N, k]")
            _check_dtype(problems, "w", w)
            leaves, n, k = (*w.shape, 0, 0, 0)[:3]
        if x.ndim == 3:
            problems.check(
                x.shape[1:] == (leaves, k),
                f"x has (leaves, k) = {x.shape[1:]}, w has {(leaves, k)}; both must be cut in the same leaves",
            )
        problems.check(min(n, k, leaves) > 0, f"w has an empty dimension: (leaves, N, k) = {(leaves, n, k)}")
    backend.family()
    exact.self_test()
    cpu.self_test()
    return one_by_one(cpu.leaf_products)(x, w)


def pack(w: jax.Array, *, full: bool = True) -> PackedWeight:
    """Lay out ``w [leaves, N, k]`` for the fastest products; performance-only.

    ``full=False`` halves the memory; products of 64 rows and more then cost a copy of the weight each time.
    """
    with Problems("matmul.pack") as problems:
        problems.check(w.ndim == 3, f"w has shape {w.shape}, not [leaves, N, k]")
        _check_dtype(problems, "w", w)
    backend.family()
    return cpu.pack(w, full=full)


def _check_dtype(problems: Problems, name: str, x: jax.Array) -> None:
    problems.check(x.dtype.name in _DTYPES, f"{name} is {x.dtype}; supported are {', '.join(_DTYPES)}")
