"""Elementwise stages, row sums and their gradients on Hopper GPUs, as programs of single threads.

`simt` is what a thread can do; `formulas` are the stages as arithmetic; `maps` (no sums), `norms` (sums over a row),
`norms_backward` (over tokens, too), `sums` (leaves of the vocabulary) and `softmax` (its gradients) are the kernels; `call` is
how the rest of the package runs them.

Every order is a function of one length: how many rows there are, and which block has them, moves no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tbik_jax._axes import vary_like
from tbik_jax._problems import Problems
from tbik_jax.kernels.batching import one_by_one

DTYPES = ("float32", "bfloat16", "float16")


def call(where: str, f: Callable[..., Any], *arrays: jax.Array, integers: Sequence[jax.Array] = ()) -> Any:
    """``f(*arrays, *integers)``, example by example under ``jax.vmap``; results vary over the mesh as the arguments do.

    Raises:
        NotImplementedError: a dtype that no kernel reads.
    """
    with Problems(where) as problems:
        for i, x in enumerate(arrays):
            if x.dtype.name not in DTYPES:
                problems.unsupported(
                    f"argument {i} is {x.dtype}; Hopper's kernels read {', '.join(DTYPES)}: cast it, or run on the CPU"
                )
    arguments = *arrays, *(x.astype(jnp.int32) for x in integers)
    return jax.tree.map(lambda y: vary_like(y, *arguments), one_by_one(f)(*arguments))
