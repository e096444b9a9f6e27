import dataclasses
import math

import numpy as np
import pytest

from tbik_jax.models.config import ModelConfig
from tbik_jax.models.source import check_rows, expected_tensors, no_such_tensor, validate
from tests.models.checkpoints import llama_json, mistral_json, qwen3_json, random_tensors

LLAMA = ModelConfig.from_hf(llama_json())


class ArraySource:
    """Arrays in memory as a source."""

    def __init__(self, arrays):
        self.arrays = arrays

    def names(self):
        return frozenset(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def dtype(self, name):
        return self.arrays[name].dtype

    def read(self, name, start=0, stop=None):
        return self.arrays[name][start:stop].copy()


def test_expected_tensors_of_llama():
    layer = {
        "input_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "post_attention_layernorm.weight": (64,),
        "mlp.gate_proj.weight": (96, 64),
        "mlp.up_proj.weight": (96, 64),
        "mlp.down_proj.weight": (64, 96),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,), "lm_head.weight": (96, 64)}
    assert expected_tensors(LLAMA) == expected
    assert expected_tensors(ModelConfig.from_hf(mistral_json())) == expected


def test_expected_tensors_that_only_some_models_have():
    base = expected_tensors(LLAMA)
    assert "lm_head.weight" not in expected_tensors(dataclasses.replace(LLAMA, tie_word_embeddings=True))
    biased = expected_tensors(dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True))
    block = {name.removeprefix("model.layers.1."): biased[name] for name in biased.keys() - base.keys()}
    assert {name: shape for name, shape in block.items() if not name.startswith("model.")} == {
        "self_attn.q_proj.bias": (64,),
        "self_attn.k_proj.bias": (32,),
        "self_attn.v_proj.bias": (32,),
        "self_attn.o_proj.bias": (64,),
        "mlp.gate_proj.bias": (96,),
        "mlp.up_proj.bias": (96,),
        "mlp.down_proj.bias": (64,),
    }
    qwen3 = expected_tensors(ModelConfig.from_hf(qwen3_json()))
    assert qwen3["model.layers.0.self_attn.q_norm.weight"] == (32,)
    assert qwen3["model.layers.1.self_attn.k_norm.weight"] == (32,)
    assert qwen3["model.layers.0.self_attn.q_proj.weight"] == (128, 64)
    assert qwen3["model.layers.0.self_attn.o_proj.weight"] == (64, 128)


def test_parameter_count_of_a_published_model():
    # SmolLM2-135M has 134,515,008 parameters.
    config = dataclasses.replace(
        LLAMA,
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    assert sum(math.prod(shape) for shape in expected_tensors(config).values()) == 134_515_008


def test_a_complete_source_passes():
    validate(ArraySource(random_tensors(LLAMA)), LLAMA)


def violations(arrays, config=LLAMA):
    with pytest.raises(ValueError, match=r"^weights: ") as caught:
        validate(ArraySource(arrays), config)
    return str(caught.value)


def test_every_kind_of_violation_at_once():
    arrays = random_tensors(LLAMA)
    del arrays["model.norm.weight"]
    arrays["lm_head.weight"] = arrays["lm_head.weight"].T
    arrays["model.layers.0.mlp.up_proj.weight"] = arrays["model.layers.0.mlp.up_proj.weight"].astype(np.int8)
    arrays["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)
    text = violations(arrays)
    assert text.startswith("weights: 4 problems")
    for line in [
        "model.norm.weight [64] is missing",
        "lm_head.weight has shape [64, 96], and the configuration asks for [96, 64]",
        "model.layers.0.mlp.up_proj.weight is stored as int8; weights are float32, bfloat16 or float16",
        "model.layers.0.self_attn.sinks [4] is not part of this architecture; it would be ignored",
    ]:
        assert line in text


def test_long_lists_are_cut_with_a_count():
    deep = dataclasses.replace(LLAMA, num_layers=30)
    text = violations({}, deep)
    assert text.count("is missing") == 20
    assert "and 253 more, 273 in all" in text


def test_extras_that_carry_nothing():
    arrays = random_tensors(LLAMA) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    validate(ArraySource(arrays), LLAMA)
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    validate(ArraySource(arrays), tied)
    arrays["lm_head.weight"][95, 63] += 1.0
    assert "lm_head.weight differs from model.embed_tokens.weight, though tie_word_embeddings is true" in violations(
        arrays, tied
    )


def test_check_rows():
    assert check_rows("w", 8, 0, None) == (0, 8)
    assert check_rows("w", 8, 3, 3) == (3, 3)
    for start, stop in ((-1, 4), (5, 4), (0, 9)):
        with pytest.raises(ValueError, match=rf"w: rows {start}\.\.{stop} are not a range inside its 8 rows"):
            check_rows("w", 8, start, stop)
    assert "no tensor 'x'" in str(no_such_tensor("here", "x"))
