"""What XLA may hand to a kernel."""

from __future__ import annotations

import jax
from jax import lax


def unsliced(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Operands of a Mosaic GPU kernel, each in memory of its own.

    XLA gives a kernel a part of a larger array instead of a copy if the part begins at a multiple of 128 bytes. Mosaic takes
    multiples of 256 only, and fails on others while the program runs (seen with jaxlib 0.11.2).
    """
    return tuple(lax.optimization_barrier(x) for x in arrays)
