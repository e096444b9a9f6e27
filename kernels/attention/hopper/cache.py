"""Where the blocks of keys and values lie: side by side, or in pages. Kernels see 128 rows in shared memory either way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from tbik_jax.kernels.attention.hopper.formula import BLOCK

Array = jax.Array
Ref = Any


@dataclass(frozen=True)
class Cache:
    """How keys and values are stored.

    Attributes:
        size: Positions of a sequence that there is room for.
        page: Rows of a page; 0: the whole sequence side by side, ``[B, kv_heads, S, D]``.
    """

    size: int
    page: int = 0

    @property
    def copies(self) -> int:
        """Copies that bring one block."""
        return BLOCK // self.page if 0 < self.page < BLOCK else 1

    def places(self, table: Ref, batch: Array, block: Array) -> list[tuple[Array, Array | int]]:
        """``(first index, row)`` of every copy of a block. Behind the last page comes the last page once more, masked."""
        if not self.page:
            return [(batch, block * BLOCK)]
        if self.page >= BLOCK:
            per_page = jnp.int32(self.page // BLOCK)
            return [(table[batch, lax.div(block, per_page)], lax.rem(block, per_page) * BLOCK)]
        last = self.size // self.page - 1
        return [(table[batch, jnp.minimum(block * self.copies + i, last)], 0) for i in range(self.copies)]

    def load(self, ref: Ref, places: list[tuple[Array, Array | int]], head: Array, slot: Ref, barrier: Ref) -> None:
        """Bring a block of one head to ``slot [128, D]``; ``barrier`` expects :attr:`copies` arrivals."""
        rows = BLOCK // self.copies
        for i, (first, row) in enumerate(places):
            to = slot if self.copies == 1 else slot.at[pl.ds(i * rows, rows)]
            plgpu.copy_gmem_to_smem(ref.at[first, head, pl.ds(row, rows)], to, barrier)


def swizzled(dtype: Any) -> tuple[Any, Any]:
    """The layout of operands in shared memory that the tensor cores read, rows of 128 bytes."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)
