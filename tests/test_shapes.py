"""The catalogue: sizes that can be checked by hand, and that it hangs together."""

import pytest

from tbik_jax.contract import Contract
from tbik_jax.shapes import MODELS, PRODUCTS, Product, ProductShape, shape, shapes


@pytest.mark.parametrize(
    "model, name, tp, n, k, leaves, parallel",
    [
        ("qwen3-8b", "qkv", 1, 6144, 4096, 1, "column"),
        ("qwen3-8b", "down", 2, 4096, 6144, 4, "row"),
        ("llama-3.1-8b", "gate_up", 8, 3584, 4096, 1, "column"),
        ("llama-3.1-8b", "lm_head", 8, 16032, 4096, 1, "column"),
        ("qwen3-32b", "attention_out", 4, 5120, 2048, 2, "row"),
        ("qwen3-32b", "attention_out", 1, 5120, 8192, 8, "row"),
        ("smollm2-135m", "attention_out", 1, 576, 576, 9, "row"),
    ],
)
def test_known_sizes(model, name, tp, n, k, leaves, parallel):
    assert shape(model, name, tp) == ProductShape(model, name, tp, n, k, leaves, parallel)


def test_ranks_together_are_the_whole_product():
    for one in shapes():
        whole = shape(one.model, one.name, 1)
        assert one.n * one.k * one.tp == whole.n * whole.k
        assert one.leaves * (one.tp if one.parallel == "row" else 1) == whole.leaves
        assert one.k % one.leaves == 0


def test_large_models_have_every_product_at_every_size():
    large = shapes(("qwen3-8b", "llama-3.1-8b", "qwen3-32b"))
    assert len(large) == len(set(large)) == 3 * len(PRODUCTS) * 4
    assert {one.name for one in shapes(("smollm2-135m",), tp=(8,))} == {"gate_up", "down", "lm_head"}
    assert {one.model for one in shapes()} == set(MODELS)


def test_another_contract_has_other_leaves():
    assert shape("qwen3-8b", "down", 1, Contract(leaves=16)).leaves == 16


def test_work():
    one = ProductShape("qwen3-8b", "qkv", 1, 10, 20, 1, "column")
    assert one.flops(3) == 2 * 3 * 10 * 20
    assert one.bytes(3, "bfloat16") == 2 * (3 * 20 + 10 * 20 + 3 * 10)
    assert one.bytes(3, "float32") == 2 * one.bytes(3, "float16")


@pytest.mark.parametrize(
    "direction, leaves, stored, by_leaf, result",
    [
        ("forward", 4, ((6, 20), (10, 20)), ((6, 4, 5), (10, 4, 5)), (6, 10)),
        ("weight-gradient", 3, ((6, 10), (6, 20)), ((3, 2, 10), (3, 2, 20)), (10, 20)),
        ("input-gradient", 5, ((6, 10), (10, 20)), ((6, 5, 2), (5, 2, 20)), (6, 20)),
    ],
)
def test_operands_of_a_product(direction, leaves, stored, by_leaf, result):
    product = Product(direction, ProductShape("qwen3-8b", "qkv", 1, 10, 20, 1, "column"), 6, leaves)
    assert (product.stored, product.by_leaf, product.result) == (stored, by_leaf, result)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: shape("gpt-2", "qkv"), "model 'gpt-2': choose from qwen3-8b"),
        (lambda: shape("qwen3-8b", "o"), "product 'o': choose from qkv"),
        (lambda: shape("qwen3-8b", "qkv", 3), "tp = 3 does not divide the 8 KV heads"),
        (lambda: shape("qwen3-8b", "down", 16), "tp = 16 does not divide the 8 leaves"),
        (lambda: shapes(("gpt-2",)), "model 'gpt-2'"),
        (lambda: shape("qwen3-8b", "qkv").bytes(1, "int8"), "dtype 'int8'"),
        (lambda: Product("backward", shape("qwen3-8b", "qkv"), 1, 1), "direction 'backward'"),
        (lambda: Product("forward", shape("qwen3-8b", "qkv"), 1, 3), "3 leaves do not divide the contraction of 4096"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
