"""Sixteen virtual CPU devices, arranged before JAX starts."""

import gc

import jax
import numpy as np
import pytest
from hypothesis import settings

# A busy machine must not fail a property.
settings.register_profile("tbik_jax", deadline=None)
settings.load_profile("tbik_jax")
jax.config.update("jax_num_cpu_devices", 16)
assert len(jax.devices("cpu")) >= 16  # starts JAX: whoever asks for another number later finds it decided


# Programs are traced into millions of objects that stay: looking for garbage among them every 700 took 7 % of the time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251117)
