"""Compiler flags that would take the bits away are found before the first result; each runs in a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax.numpy as jnp
from tbik_jax.kernels import matmul
matmul.leaf_products(jnp.ones((2, 1, 8)), jnp.ones((1, 4, 8)))
print("computed")
"""


def run(flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


def test_default_flags_are_fine():
    assert run("").stdout.strip() == "computed"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--xla_cpu_enable_fast_math=true --xla_cpu_fast_math_honor_nans=false", "contracted with the sum behind it"),
        ("--xla_cpu_max_isa=SSE4_2", "does not compute dots as ascending fma chains here"),
    ],
)
def test_flags_that_change_bits_are_refused(flags, message):
    result = run(flags)
    assert result.returncode != 0
    assert "SelfTestError" in result.stderr
    assert message in result.stderr
    assert "computed" not in result.stdout
