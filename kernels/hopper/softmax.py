"""Gradients of log-sum-exp, cross-entropy and log-softmax: elementwise, given numbers of the row. A block has a part of a row.

Arrays are ``[..., entries]``; numbers of a row ``[...]``, f32, or int32 where they count entries. Results are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tbik_jax.kernels.hopper import simt
from tbik_jax.kernels.hopper.formulas import exp

Array = jax.Array
_BYTES = 64  # of an array for a thread, so that enough loads are on their way


def log_sum_exp_gradient(logits: Array, total: Array, dy: Array, *held: Array) -> Array:
    """``exp(logits - total) * dy``. Behind the first ``held`` entries, if there is such a number, logits count as -inf."""
    return _by_row(_log_sum_exp, (logits,), (total, dy, *held), logits.dtype)


def cross_entropy_gradient(logits: Array, total: Array, dloss: Array, label: Array, *held: Array) -> Array:
    """``(exp(logits - total) - onehot(label)) * dloss``; of a label that is no entry, no 1. ``held`` as above."""
    return _by_row(_cross_entropy, (logits,), (total, dloss, label, *held), logits.dtype)


def log_softmax_gradient(y: Array, dy: Array, total: Array, *, dtype: DTypeLike) -> Array:
    """``dy - exp(y) * total``, of log-probabilities ``y``."""
    return _by_row(_log_softmax, (y, dy), (total,), dtype)


def _by_row(f: Callable[..., Any], arrays: tuple[Array, ...], of_rows: tuple[Array, ...], dtype: DTypeLike) -> Array:
    """``f(machine, row, column, *of_rows)`` gives what a thread does with ``(offset from the column, *elements)``."""
    out = jax.ShapeDtypeStruct(arrays[0].shape, dtype)
    *rows, width = out.shape
    if not arrays[0].size:
        return jnp.zeros(out.shape, dtype)
    itemsize = arrays[0].dtype.itemsize
    chunk = math.gcd(width, 16 // itemsize)
    chunks = _BYTES // (itemsize * chunk)
    parts = -(-width // (simt.THREADS * chunk * chunks))
    program = partial(_gradient, f=f, arrays=len(arrays), width=width, parts=parts, chunk=chunk, chunks=chunks)
    return simt.launch(program, math.prod(rows) * parts, (*arrays, *of_rows), out)


def _gradient(
    m: Any, *refs: Any, f: Callable[..., Any], arrays: int, width: int, parts: int, chunk: int, chunks: int
) -> None:
    *inputs, out = refs
    row, step = m.block // parts, simt.THREADS * chunk
    column = (m.block % parts) * (step * chunks) + m.thread * chunk
    element = f(m, row, column, *inputs[arrays:])
    first = m.wide(row) * width + column
    offsets = range(0, step * chunks, step)
    whole = width % (step * chunks) == 0
    inside = [True if whole else column < width - offset for offset in offsets]
    loaded = [
        [m.load(ref, first + offset, chunk, where) for ref in inputs[:arrays]]
        for offset, where in zip(offsets, inside, strict=True)
    ]
    for offset, where, values in zip(offsets, inside, loaded, strict=True):
        results = [element(offset + i, *elements) for i, elements in enumerate(zip(*values, strict=True))]
        m.store(out, first + offset, results, where)


def _log_sum_exp(m: Any, row: Any, column: Any, total: Any, dy: Any, *held: Any) -> Callable[..., Any]:
    (dy,) = m.load(dy, row, 1)
    p = _softmax(m, row, column, total, *held)
    return lambda offset, x: p(offset, x) * dy


def _cross_entropy(m: Any, row: Any, column: Any, total: Any, dloss: Any, label: Any, *held: Any) -> Callable[..., Any]:
    (dloss,) = m.load(dloss, row, 1)
    p = _softmax(m, row, column, total, *held)
    hit = m.integer(label, row) - column

    def element(offset: int, x: Any) -> Any:
        y = p(offset, x)
        return m.select(hit == offset, y - 1.0, y) * dloss

    return element


def _softmax(m: Any, row: Any, column: Any, total: Any, *held: Any) -> Callable[..., Any]:
    (total,) = m.load(total, row, 1)
    behind = [column - m.integer(count, row) for count in held]

    def element(offset: int, x: Any) -> Any:
        for distance in behind:
            x = m.select(distance < -offset, x, -math.inf)
        return exp(m, x - total)

    return element


def _log_softmax(m: Any, row: Any, column: Any, total: Any) -> Callable[..., Any]:
    (total,) = m.load(total, row, 1)
    return lambda offset, y, dy: dy - exp(m, y) * total
