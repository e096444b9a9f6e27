"""Floating-point steps whose bits no compiler decides.

XLA contracts ``a * b + c`` into one fused multiply-add where it sees fit (on the CPU it depends on the local shape, down
to the last element of a vector), and drops a rounding to bf16 between two fusions. Each helper here pins one such choice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import DTypeLike

from tbik_jax.kernels.backend import SelfTestError

Array = jax.Array

_EXPONENT_AND_MANTISSA = {"bfloat16": (8, 7), "float16": (5, 10)}


def rounded(x: Array) -> Array:
    """``x`` as a value of its own: no add behind it contracts with the product that may have made it.

    The select keeps LLVM from contracting: it may not assume that a value is not NaN. ``lax.optimization_barrier`` and
    ``lax.reduce_precision`` do not do this on XLA:CPU. Nor does the select where LLVM knows better: an integer converted
    to float is no NaN, nor is its product with a constant.
    """
    return jnp.where(x == x, x, jnp.nan)


def product(a: Array, b: Array | float) -> Array:
    """``a * b``, rounded before anyone adds to it."""
    return rounded(a * b)


@partial(jax.jit, inline=True)
def reciprocal(x: Array) -> Array:
    """``1 / x``, the 1 constant outside of ``jit`` too, where JAX would pass an array: a GPU may divide otherwise."""
    return 1.0 / x


def quotient(a: Array, b: Array) -> Array:
    """``a * (1 / b)``, both steps rounded.

    XLA makes this of ``a / b`` where it sees that b is broadcast, under ``jit`` alone, and not for a single element.
    Written out, it is the same everywhere. On a GPU the reciprocal is an instruction's, within a unit in the last place.
    """
    return product(a, reciprocal(b))


def cast(x: Array, dtype: DTypeLike) -> Array:
    """Round to ``dtype`` in any case.

    ``xla_allow_excess_precision`` (on by default) lets XLA delete an f32 -> bf16 -> f32 round trip. ``reduce_precision``
    is never deleted, and after it the round trip is exact, so deleting it changes nothing. It also makes zeros of what
    float16 would hold as subnormal (below 2**-14).
    """
    dtype = jnp.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtype.name in _EXPONENT_AND_MANTISSA:
        exponent, mantissa = _EXPONENT_AND_MANTISSA[dtype.name]
        x = lax.reduce_precision(x, exponent_bits=exponent, mantissa_bits=mantissa)
    return x.astype(dtype)


def tree_sum(x: Array, axis: int = -1, *, keepdims: bool = False) -> Array:
    """Sum over one axis by halving: element i of the lower half plus element i of the upper half, until one is left.

    An odd element in the middle is carried to the next round. Additions only, element by element, so the order is a
    function of the axis length alone (``jnp.sum`` on XLA:CPU also looks at the number of rows).
    """
    axis = axis % x.ndim
    while (n := x.shape[axis]) > 1:
        half = n // 2
        low = lax.slice_in_dim(x, 0, half, axis=axis)
        high = lax.slice_in_dim(x, n - half, n, axis=axis)
        total = low + high
        if n % 2:
            total = lax.concatenate([total, lax.slice_in_dim(x, half, half + 1, axis=axis)], axis)
        x = total
    return x if keepdims else lax.squeeze(x, (axis,))


@cache
def self_test() -> None:
    """Compare the steps of this module, compiled, to NumPy's separate roundings; once per process, on any backend.

    What has no correctly rounded result to compare to (exp, log, a reciprocal on a GPU) must be the same alone and among
    other operations, in one shape and in another. Under ``--xla_cpu_fast_math_honor_nans=false`` LLVM assumes that nothing
    is NaN, and takes :func:`rounded` away; ``--xla_gpu_ftz=true`` makes zeros of small numbers.

    Raises:
        SelfTestError: naming what differs.
    """
    wrong = [*_wrong_roundings(), *_wrong_functions()]
    if jax.default_backend() != "cpu":  # where XLA's threads make zeros of them, whatever the flags
        small, smaller = np.array([[2.0**-100, 3 * 2.0**-120], [3 * 2.0**-40, 2.0**-20]], np.float32)
        if _run_now(product, small, smaller).tobytes() != (small * smaller).tobytes():
            wrong.append("numbers below 2**-126 become zero")
    if wrong:
        raise SelfTestError(
            "XLA does not keep roundings that the contract asks for, so results would depend on the mesh:\n"
            + "\n".join(f"  - {line}" for line in wrong)
            + "\nCheck XLA_FLAGS: fast math that does not honor NaNs (--xla_cpu_fast_math_honor_nans=false) and"
            " --xla_gpu_ftz=true must stay off."
        )


def _wrong_roundings() -> list[str]:
    wrong = []
    generator = np.random.default_rng(2511)
    for n in (1, 7, 8, 9, 257):
        a, b, c = generator.standard_normal((3, n), np.float32)
        got = _run_now(lambda a, b, c: product(a, b) + c, a, b, c)
        if got.tobytes() != (a * b + c).tobytes():
            wrong.append(f"a product of {n} elements is contracted with the sum behind it")
        got = _run_now(lambda a, b, c: cast(cast(a + b, jnp.bfloat16).astype(jnp.float32) + c, jnp.bfloat16), a, b, c)
        want = ((a + b).astype(jnp.bfloat16).astype(np.float32) + c).astype(jnp.bfloat16)
        if got.tobytes() != want.tobytes():
            wrong.append(f"a rounding of {n} elements to bfloat16 is dropped")
    return wrong


def _wrong_functions() -> list[str]:
    """exp, log and a quotient: rows of a matrix alone, and among products and sums, against the whole matrix."""
    from tbik_jax.kernels.elementary import exp, log

    generator = np.random.default_rng(2512)
    x, a, c = (generator.uniform(low, high, (19, 33)).astype(np.float32) for low, high in ((1, 40), (0.5, 2), (-1, 1)))
    wrong = []
    for name, f in {"exp": exp, "log": log, "a quotient": lambda x: quotient(x, x + 1.0)}.items():
        whole = _run_now(f, x * a)
        among = _run_now(lambda x, a, c, f=f: f(product(x, a)) + c, x, a, c)
        if _run_now(f, (x * a)[3]).tobytes() != whole[3].tobytes():
            wrong.append(f"{name} of a row depends on the rows beside it")
        if among.tobytes() != (whole + c).tobytes():
            wrong.append(f"{name} depends on the operations around it")
    return wrong


def _run_now(f: Callable[..., Array], *arguments: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Compiled ahead of time, ``f`` runs at once, also while a caller's program is being traced."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
    return np.asarray(jax.jit(f).lower(*shapes).compile()(*arguments))
