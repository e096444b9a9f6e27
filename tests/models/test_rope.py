import dataclasses
import math

import numpy as np
import pytest

from tbik_jax.models import rope
from tbik_jax.models.config import ModelConfig, RopeScaling
from tbik_jax.models.rope import rope_inverse_frequencies, rope_tables
from tests.models.checkpoints import llama_json

LLAMA31 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=32768)


def config_of(scaling=None, head_dim=128, theta=500000.0):
    config = ModelConfig.from_hf(llama_json(head_dim=head_dim))
    return dataclasses.replace(config, rope_theta=theta, rope_scaling=scaling)


def plain(head_dim, theta):
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


# The oracles are loops over Python floats, written from the papers; 1e-13 is a few hundred float64 steps.
TOLERANCE = 1e-13


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e4), (128, 5e5), (32, 1e6), (2, 1e4)])
def test_default(head_dim, theta):
    frequencies, scale = rope_inverse_frequencies(config_of(None, head_dim, theta))
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, plain(head_dim, theta), rtol=TOLERANCE)
    assert scale == 1.0


def test_linear():
    frequencies, scale = rope_inverse_frequencies(config_of(RopeScaling("linear", 3.0)))
    np.testing.assert_allclose(frequencies, [f / 3.0 for f in plain(128, 5e5)], rtol=TOLERANCE)
    assert scale == 1.0


def test_llama3():
    expected, branches = [], set()
    for frequency in plain(128, 5e5):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4.0:
            expected.append(frequency)
            branches.add("short")
        elif wavelength > 8192 / 1.0:
            expected.append(frequency / 8.0)
            branches.add("long")
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
            branches.add("between")
    assert branches == {"short", "long", "between"}
    frequencies, scale = rope_inverse_frequencies(config_of(LLAMA31))
    np.testing.assert_allclose(frequencies, expected, rtol=TOLERANCE)
    assert scale == 1.0


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    d, base, length, factor, alpha, beta = 128, 1e6, 32768, 4.0, 1.0, 32.0

    def pair_with(turns):  # the solution of length * base ** (-2 i / d) == 2 pi turns for i
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(beta), pair_with(alpha)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    expected = []
    for i, frequency in enumerate(plain(d, base)):
        gamma = min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(gamma * frequency / factor + (1 - gamma) * frequency)
    frequencies, scale = rope_inverse_frequencies(config_of(dataclasses.replace(YARN, truncate=truncate), d, base))
    np.testing.assert_allclose(frequencies, expected, rtol=TOLERANCE)
    assert frequencies[0] == 1.0
    np.testing.assert_allclose(frequencies[-1], plain(d, base)[-1] / factor, rtol=TOLERANCE)
    assert scale == pytest.approx(0.1 * math.log(4.0) + 1.0, rel=TOLERANCE)


def test_yarn_attention_factor():
    assert rope_inverse_frequencies(config_of(dataclasses.replace(YARN, attention_factor=1.25)))[1] == 1.25
    ratio = dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.4)
    expected = (0.1 * 0.7 * math.log(4.0) + 1.0) / (0.1 * 0.4 * math.log(4.0) + 1.0)
    assert rope_inverse_frequencies(config_of(ratio))[1] == pytest.approx(expected, rel=TOLERANCE)


def test_yarn_ramp_of_no_width():
    # Both ends of the ramp fall before the first pair.
    short = dataclasses.replace(YARN, original_max_position_embeddings=1)
    frequencies, _ = rope_inverse_frequencies(config_of(short))
    assert np.isfinite(frequencies).all()


def nearest_float32(angles, scale, function):
    """From 64 bits of precision; skipped where a long double has no more than a double."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is float64 on this platform: no independent reference")
    return (np.longdouble(scale) * function(angles.astype(np.longdouble))).astype(np.float32)


@pytest.mark.parametrize("scaling", [None, LLAMA31, YARN])
def test_tables_are_correctly_rounded(scaling):
    config = config_of(scaling)
    frequencies, scale = rope_inverse_frequencies(config)
    cos, sin = rope_tables(config, 3000)
    assert cos.shape == sin.shape == (3000, 64)
    assert cos.dtype == sin.dtype == np.float32
    angles = np.arange(3000, dtype=np.float64)[:, None] * frequencies
    assert (cos.view(np.int32) == nearest_float32(angles, scale, np.cos).view(np.int32)).all()
    assert (sin.view(np.int32) == nearest_float32(angles, scale, np.sin).view(np.int32)).all()
    assert (cos[0] == np.float32(scale)).all()
    assert (sin[0] == 0.0).all()


def test_rows_do_not_depend_on_the_length():
    config = config_of(YARN)
    whole = rope_tables(config, 1025)
    for length in (1, 7, 1024):
        for part, table in zip(rope_tables(config, length), whole, strict=True):
            assert (part.view(np.int32) == table[:length].view(np.int32)).all()


def test_entries_do_not_depend_on_the_library(monkeypatch):
    # A cosine that is wrong by up to 2**-32 relative, and a margin that knows it: the exact path mends every entry
    # that the error could have moved. Without the margin some entries move.
    config = config_of(YARN, head_dim=32)
    expected = rope_tables(config, 400)
    rng = np.random.default_rng(0)
    for name in ("cos", "sin"):
        exact = getattr(np, name)
        monkeypatch.setattr(
            rope.np, name, lambda x, f=exact: f(x) * (1 + rng.integers(-(2**20), 2**20, x.shape) * 2.0**-52)
        )
    monkeypatch.setattr(rope, "_LIBRARY_ERROR", 2.0**-31)
    for ours, table in zip(rope_tables(config, 400), expected, strict=True):
        assert (ours.view(np.int32) == table.view(np.int32)).all()
    monkeypatch.setattr(rope, "_LIBRARY_ERROR", 0.0)
    assert any((ours != table).any() for ours, table in zip(rope_tables(config, 400), expected, strict=True))


@pytest.mark.parametrize("length", [0, -1, 2.0, True])
def test_bad_length(length):
    with pytest.raises(ValueError, match=r"rope_tables: length = .* is not a positive integer"):
        rope_tables(config_of(), length)
