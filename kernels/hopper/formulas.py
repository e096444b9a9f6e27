"""The stages as arithmetic on f32, for any machine of `simt`. What is written as a sum of a product rounds twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Float = Any
Machine = Any

#: log2 e, and what f32 loses of it.
_LOG2_E, _LOG2_E_LOW = 1.44269502162933349609, 1.92596299112661746887e-8
_LN2 = 0.693147180559945309
_FARTHEST = 88.0  # e**88 is still a float; beyond e**-88 results are zero


def exp(m: Machine, x: Float) -> Float:
    """``e**x``, within 2**-21; of 88 above it, and 0 below -87.34.

    t = x * log2 e,   y = 2**t by ex2.approx.ftz,   y + y * (r * ln 2)   with r = what t was rounded by
    """
    x = m.clip(x, -_FARTHEST, _FARTHEST)
    t = x * _LOG2_E
    r = m.fma(x, _LOG2_E_LOW, m.fma(x, _LOG2_E, -t))
    y = m.exp2(t)
    return m.fma(y, r * _LN2, y)


def sigmoid(m: Machine, g: Float) -> Float:
    """``1 / (1 + exp(-g))`` by rcp.approx.ftz."""
    return m.about_inverse(exp(m, -g) + 1.0)


def swiglu(m: Machine, g: Float, u: Float) -> tuple[Float]:
    """``(g * sigmoid(g)) * u``."""
    return ((g * sigmoid(m, g)) * u,)


def swiglu_gradients(m: Machine, g: Float, u: Float, dy: Float) -> tuple[Float, Float]:
    """``(dy * u) * (s + silu * (1 - s))`` and ``dy * silu``."""
    s = sigmoid(m, g)
    silu = g * s
    return (dy * u) * (s + silu * (1.0 - s)), dy * silu


def add(m: Machine, x: Float, y: Float) -> tuple[Float]:
    """The residual sum."""
    return (x + y,)


def rotate(x1: Float, x2: Float, cos: Float, sin: Float) -> tuple[Float, Float]:
    """A pair of the two halves, turned."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin


def pairwise(values: Sequence[Any], plus: Callable[[Any, Any], Any] = lambda a, b: a + b) -> Any:
    """Neighbours first: ``((0 + 1) + (2 + 3)) + ...``; the last of an odd number goes on to the next level."""
    values = list(values)
    while len(values) > 1:
        pairs = [plus(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(values) - len(values) % 2 :]
    return values[0]
