"""Rotary frequencies and tables, computed on the host, once per model.

The tables are numerics-bearing and the same on every host. Each entry is the float32 nearest to the real
number ``scale * cos(angle)`` for the float64 angle ``position * frequency``: nothing in it depends on the
processor's vector cosine, on the length of the table, or on the C library's ``pow``.

References: RoFormer (rotary embeddings), arXiv 2104.09864. Position interpolation (linear), arXiv
2306.15595. YaRN, arXiv 2309.00071. The Llama 3 herd of models (llama3), arXiv 2407.21783.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from tbik_jax.models.config import ModelConfig, RopeScaling

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

# The only transcendental functions here are decimal's, which are correctly rounded on every platform.
_DIGITS = decimal.Context(prec=80)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")

#: Far above the relative error of any float64 cosine, far below half a float32 step.
_LIBRARY_ERROR = 2.0**-44


def rope_inverse_frequencies(config: ModelConfig) -> tuple[Float64, float]:
    """The angle per position of each rotated pair, and the factor on cosine and sine.

    ``frequency[i] = theta ** (-2 i / head_dim)`` for i in 0..head_dim/2 - 1, then scaled as
    ``config.rope_scaling`` says. Returns float64 [head_dim/2] and a Python float, 1.0 but for YaRN.

    Guarantee: a function of the configuration alone, equal on every host.

    References: see the module.
    """
    frequencies = unscaled_frequencies(config.rope_theta, config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return np.divide(frequencies, scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    return _yarn_frequencies(frequencies, scaling, config.rope_theta), _yarn_attention_factor(scaling)


def rope_tables(config: ModelConfig, length: int) -> tuple[Float32, Float32]:
    """Cosines and sines of positions 0..length - 1, each float32 [length, head_dim/2].

    ``angle = position * frequency`` in float64, then ``scale * cos(angle)`` and ``scale * sin(angle)``
    rounded once, to float32. Entry [p, i] turns dimensions i and i + head_dim/2 of a head at position p
    (Hugging Face's pairing).

    Guarantee: correctly rounded, so row p has the same bits in a table of any length on every host.

    Raises:
        ValueError: ``length`` is not a positive integer.
    """
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 1:
        raise ValueError(f"rope_tables: length = {length!r} is not a positive integer")
    frequencies, scale = rope_inverse_frequencies(config)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    quarter = _PI / 2
    cos = _round_once(scale * np.cos(angles), angles, lambda angle: _times(scale, _sin(angle + quarter)))
    sin = _round_once(scale * np.sin(angles), angles, lambda angle: _times(scale, _sin(angle)))
    return cos, sin


def unscaled_frequencies(theta: float, head_dim: int) -> Float64:
    """``theta ** (-2 i / head_dim)``, correctly rounded to float64 [head_dim/2]."""
    with decimal.localcontext(_DIGITS):
        log = Decimal(theta).ln()
        return np.array([float((-log * (2 * i) / head_dim).exp()) for i in range(head_dim // 2)])


def llama3_frequencies(frequencies: Float64, scaling: RopeScaling) -> Float64:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, others blended."""
    assert scaling.low_freq_factor and scaling.high_freq_factor and scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * (frequencies / scaling.factor) + kept * frequencies


def _yarn_frequencies(frequencies: Float64, scaling: RopeScaling, theta: float) -> Float64:
    """YaRN ("NTK by parts"): a ramp over the dimensions from kept to stretched frequencies."""
    assert scaling.original_max_position_embeddings
    original, half = scaling.original_max_position_embeddings, len(frequencies)

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        return half * _log(original / (turns * 2 * math.pi)) / _log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound counts dimensions, not pairs, in the released models' code; so it does here.
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
    mixed: Float64 = stretched * (frequencies / scaling.factor) + (1 - stretched) * frequencies
    return mixed


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """``0.1 ln(factor) + 1`` on cosine and sine, so its square on the attention scores."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(weight: float) -> float:
        return 0.1 * weight * _log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def _round_once(values: Float64, angles: Float64, exact: Callable[[Decimal], Decimal]) -> Float32:
    """``values`` in float32 as if they were exact: the few near the middle of a step are worked out."""
    error = np.abs(values) * _LIBRARY_ERROR
    below, above = (values - error).astype(np.float32), (values + error).astype(np.float32)
    table = values.astype(np.float32)
    with decimal.localcontext(_DIGITS):
        for index in zip(*np.nonzero(below != above), strict=True):
            low, high = (Decimal(float(side[index])) for side in (below, above))
            nearer = above if exact(Decimal(float(angles[index]))) > (low + high) / 2 else below
            table[index] = nearer[index]
    return table


def _sin(angle: Decimal) -> Decimal:
    """The Taylor series after reduction to -pi..pi."""
    angle = angle.remainder_near(2 * _PI)
    term, total, square, n = angle, angle, angle * angle, 1
    while abs(term) > Decimal("1e-60"):
        term *= -square / ((n + 1) * (n + 2))
        total += term
        n += 2
    return total


def _times(scale: float, value: Decimal) -> Decimal:
    return Decimal(scale) * value


def _log(value: float) -> float:
    with decimal.localcontext(_DIGITS):
        return float(Decimal(value).ln())
