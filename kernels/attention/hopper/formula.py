"""Attention's arithmetic on Hopper GPUs, traced by every kernel: what is not here has no bits.

A *state* ``(acc, m, l)`` stands for a range of keys: their largest score, the sum of their weights relative to it, and the
weighted sum of their values. Scores are base 2: ``c = scale * log2(e)``.

    block:  m' = max(m, max(qk) * c)            qk = q . k on the tensor cores, -inf behind the position
            p  = exp2(fma(qk, c, -m'))          alpha = exp2(m - m')
            l' = fma(l, alpha, sum p)           acc' = acc * alpha + p v on the tensor cores, p rounded to the dtype of v
    merge:  m  = max(m1, m2)                    w1, w2 = exp2(m1 - m), exp2(m2 - m)
            l  = fma(l1, w1, l2 * w2)           acc = fma(acc1, w1, acc2 * w2)
    result: fma(acc, 1 / l, +0)                 +0 turns -0 into +0

``exp2`` and ``1 / l`` are the hardware's approximations, one instruction each. Where m' is -inf, 0 is subtracted instead: a
block, or a state, of no keys then changes nothing (weight exp2(-inf) = 0, factor exp2(0) = 1), and rows whose tile straddles
a boundary need no case of their own. Every fused multiply-add is explicit: which of two products a compiler fuses with
their sum would be its own choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import math as mlir_math

Array = jax.Array
State = tuple[Array, Array, Array]
Spread = Callable[[Array], Array]

#: Keys of a block and of a split, from position 0.
BLOCK, SPLIT = 128, 512
BLOCKS_A_SPLIT = SPLIT // BLOCK

#: Approximate exp2, log2 and reciprocals: in every kernel, or the bits differ.
PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)

TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
_NEVER = -jnp.inf


def base2(scale: float) -> float:
    """The factor of the scores."""
    return scale * math.log2(math.e)


def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    """One f32 value everywhere."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def fma(a: Array, b: Array, c: Array, layout: Any) -> Array:
    """``a * b + c``, rounded once, whatever a compiler would have contracted."""

    @plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.float32, layout=layout))
    def fused(ctx: Any, a: Any, b: Any, c: Any) -> Any:
        return a._pointwise(mlir_math.fma, b, c)

    return fused(a, b, c)


def add_values(acc: Array, p: Array, values: Any, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """``acc + p values`` on the tensor cores; ``values [BLOCK, D]`` is in shared memory."""

    def multiply(ref: Any) -> None:
        plgpu.wgmma(ref, p, values)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def empty(rows: int, dim: int) -> State:
    """The state of no keys, a tile of rows."""
    return full((rows, dim), 0.0, TILE), full((rows,), _NEVER, ROWS), full((rows,), 0.0, ROWS)


def over(row: Array, shape: tuple[int, ...]) -> Array:
    """A value per row, along the row."""
    return lax.broadcast_in_dim(row, shape, [0])


def hidden(scores: Array, visible: Array) -> Array:
    """Scores as those of keys that there are not, where they are not visible."""
    return jnp.where(visible, scores, _NEVER)


def weigh(scores: Array, state: State, c: float) -> tuple[Array, State]:
    """The weights of a block, and the state before it in their scale, with their sum; values are still to be added."""
    acc, m, total = state
    m_new = jnp.maximum(m, scores.max(axis=1) * c)
    subtracted = _finite(m_new)
    alpha = jnp.exp2(m - subtracted)
    p = jnp.exp2(fma(scores, full(scores.shape, c, TILE), over(-subtracted, scores.shape), TILE))
    return p, (acc * over(alpha, acc.shape), m_new, fma(total, alpha, p.sum(axis=1), ROWS))


def merge(first: State, later: State, spread: Spread, layout: Any, row_layout: Any) -> State:
    """The state of two neighbouring ranges; the later one's products are rounded."""
    (acc1, m1, l1), (acc2, m2, l2) = first, later
    w1, w2, m = weights(m1, m2)
    return weighted(acc1, spread(w1), acc2, spread(w2), layout), m, weighted(l1, w1, l2, w2, row_layout)


def weights(m1: Array, m2: Array) -> tuple[Array, Array, Array]:
    """Of two neighbouring ranges with these largest scores; and the larger one."""
    m = jnp.maximum(m1, m2)
    return jnp.exp2(m1 - _finite(m)), jnp.exp2(m2 - _finite(m)), m


def weighted(first: Array, w1: Array, later: Array, w2: Array, layout: Any) -> Array:
    """What a merge makes of two sums that have these weights."""
    return fma(first, w1, later * w2, layout)


def finish(state: State, spread: Spread, layout: Any, dtype: Any) -> Array:
    """The results of a state, rounded once."""
    acc, _, total = state
    return fma(acc, spread(1.0 / total), full(acc.shape, 0.0, layout), layout).astype(dtype)


def log_sum_exp2(state: State) -> Array:
    """``log2 sum_j 2^(score_j)``."""
    return state[1] + jnp.log2(state[2])


def _finite(m: Array) -> Array:
    return jnp.where(m == _NEVER, jnp.zeros_like(m), m)
