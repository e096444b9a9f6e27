"""The bits of contract version 1, whatever the JAX and the processor. See tests/fixtures/make_bits.py."""

import json

import pytest

from tbik_jax import CONTRACT_VERSION
from tests.fixtures import make_bits

pytestmark = pytest.mark.invariance


def stored():
    return json.loads(make_bits.FILE.read_text(encoding="utf-8"))


def test_the_file_is_of_this_contract():
    assert make_bits.FILE.name == f"bits_v{CONTRACT_VERSION}.json"


def test_operations():
    found = make_bits.ops()
    assert found == {name: stored()[name] for name in found}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_model_on_three_ranks(dtype):
    found = make_bits.model(dtype, 3)
    assert found == {name: stored()[name] for name in found}
