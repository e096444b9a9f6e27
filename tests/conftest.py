"""Sixteen virtual CPU devices, arranged before JAX starts."""

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 16)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20251117)
