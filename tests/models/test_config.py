import dataclasses
import json
import math

import pytest

from tbik_jax.models.config import ModelConfig, RopeScaling
from tests.models.checkpoints import FIXTURES, llama_json, mistral_json, qwen3_json

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refused(data, kind=ValueError):
    with pytest.raises(kind) as caught:
        ModelConfig.from_hf(data)
    assert caught.type is kind
    return str(caught.value)


def test_llama():
    assert ModelConfig.from_hf(llama_json()) == ModelConfig(
        architecture="llama",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_architectures_and_what_each_has():
    qwen3 = ModelConfig.from_hf(qwen3_json(tie_word_embeddings=True, attention_bias=True))
    assert (qwen3.architecture, qwen3.qk_norm, qwen3.head_dim, qwen3.tie_word_embeddings) == ("qwen3", True, 32, True)
    assert qwen3.attention_bias
    assert not qwen3.mlp_bias
    mistral = ModelConfig.from_hf(mistral_json())
    assert (mistral.architecture, mistral.qk_norm) == ("mistral", False)
    assert ModelConfig.from_hf(llama_json(mlp_bias=True)).mlp_bias


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen3"])
def test_configs_written_by_transformers(name):
    data = json.loads((FIXTURES / name / "config.json").read_text())
    config = ModelConfig.from_hf(data)
    assert config.num_layers == data["num_hidden_layers"]
    assert config.head_dim == data["head_dim"]
    assert config.rope_theta == data["rope_parameters"]["rope_theta"]
    assert config.dtype == data["dtype"]


def test_transformers_4_and_5_mean_the_same():
    new, old = (json.loads((FIXTURES / "tiny-llama" / name).read_text()) for name in ("config.json", "config_v4.json"))
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)
    assert ModelConfig.from_hf(new).rope_scaling == RopeScaling(
        "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )


def test_head_dim_and_kv_heads_default_as_in_transformers():
    config = ModelConfig.from_hf(llama_json(num_key_value_heads=..., head_dim=None))
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert ModelConfig.from_hf(mistral_json(num_key_value_heads=None)).num_kv_heads == 4
    assert "num_key_value_heads is missing" in refused(mistral_json(num_key_value_heads=...))
    text = refused(qwen3_json(num_key_value_heads=..., head_dim=...))
    assert "num_key_value_heads is missing" in text
    assert "head_dim is missing; in Qwen3 it is not hidden_size / num_attention_heads" in text


@pytest.mark.parametrize(("ids", "expected"), [(2, (2,)), ([3, 5], (3, 5)), (None, ()), (..., ())])
def test_eos_is_an_integer_a_list_or_nothing(ids, expected):
    assert ModelConfig.from_hf(llama_json(eos_token_id=ids)).eos_token_ids == expected


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_by_either_name_of_its_type(key):
    config = ModelConfig.from_hf(llama_json(rope_scaling={key: "linear", "factor": 4}))
    assert config.rope_scaling == RopeScaling("linear", 4)


def test_yarn_defaults():
    scaling = ModelConfig.from_hf(qwen3_json(rope_scaling={"type": "yarn", "factor": 4.0})).rope_scaling
    assert scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0)
    full = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "rope_theta": 10000.0,
    }
    scaling = ModelConfig.from_hf(qwen3_json(rope_theta=..., rope_parameters=full)).rope_scaling
    assert scaling is not None
    assert (scaling.attention_factor, scaling.beta_fast, scaling.truncate) == (1.5, 16, False)


def test_rope_theta_defaults_to_ten_thousand():
    assert ModelConfig.from_hf(llama_json(rope_theta=...)).rope_theta == 10000.0


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "su"])
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_length_dependent_frequencies_are_refused_with_the_reason(rope_type, style):
    text = refused(llama_json(**{style: {"rope_type": rope_type, "factor": 2.0}}), NotImplementedError)
    assert f"rope type {rope_type!r} is not supported" in text
    assert "depend on the length of the sequence" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures = ['GemmaForCausalLM'] is not supported"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "is not supported; supported are LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; the MLP is SwiGLU"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 changes the function"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "heads are rotated whole"),
        ({"num_local_experts": 8}, "num_local_experts = 8 changes the function"),
        ({"num_experts": 128}, "num_experts = 128 changes the function"),
        ({"attention_sinks": True}, "attention_sinks = True changes the function"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} changes the function"),
        ({"attention_dropout": 0.1}, "it would have to be 0"),
        ({"final_logit_softcapping": 30.0}, "it would have to be null"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map names its own model code, 'm.M'"),
        ({"rope_scaling": {"rope_type": "mystery"}}, "rope type 'mystery' is not supported (unknown)"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 3}}, "rope_scaling.warp = 3 is unknown"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters differs between layers"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types names linear_attention"),
    ],
)
def test_what_would_change_the_function_is_refused(changes, message):
    assert message in refused(llama_json(**changes), NotImplementedError)


def test_biases_that_an_architecture_does_not_have_are_refused():
    assert "mistral has no such bias" in refused(mistral_json(attention_bias=True), NotImplementedError)
    assert "qwen3 has no such bias" in refused(qwen3_json(mlp_bias=True), NotImplementedError)


def test_inert_values_of_the_same_fields_are_accepted():
    ModelConfig.from_hf(
        llama_json(
            partial_rotary_factor=1.0,
            num_experts=None,
            attention_dropout=0.0,
            auto_map={"AutoConfig": "c.C"},
            layer_types=["full_attention"] * 2,
            pretraining_tp=1,
            use_cache=True,
        )
    )


def test_sliding_windows():
    # Mistral v0.1, and the default of a file without the key.
    text = refused(mistral_json(sliding_window=64), NotImplementedError)
    assert "sliding_window = 64 is under max_position_embeddings = 128" in text
    assert "Lower max_position_embeddings to the window" in text
    text = refused(mistral_json(sliding_window=..., max_position_embeddings=32768), NotImplementedError)
    assert "sliding_window = 4096 (not in the file, which for Mistral means 4096" in text
    # Where it cannot bind, it does nothing.
    ModelConfig.from_hf(mistral_json(sliding_window=128))
    ModelConfig.from_hf(mistral_json(sliding_window=...))

    window = {"sliding_window": 64, "max_window_layers": 1}
    ModelConfig.from_hf(qwen3_json(**window, use_sliding_window=False))
    ModelConfig.from_hf(qwen3_json(sliding_window=64, max_window_layers=2, use_sliding_window=True))
    ModelConfig.from_hf(qwen3_json(**window, use_sliding_window=True, layer_types=["full_attention"] * 2))
    assert "sliding_window = 64" in refused(qwen3_json(**window, use_sliding_window=True), NotImplementedError)
    sliding = ["full_attention", "sliding_attention"]
    assert "sliding_window = 64" in refused(qwen3_json(**window, layer_types=sliding), NotImplementedError)
    # Mistral's own code reads no layer_types.
    assert "sliding_window" in refused(
        mistral_json(sliding_window=64, layer_types=["full_attention"] * 2), NotImplementedError
    )


def test_all_violations_at_once():
    text = refused(
        llama_json(
            vocab_size=0,
            hidden_size=-64,
            num_attention_heads=9,
            num_key_value_heads=2,
            head_dim=15,
            rms_norm_eps="tiny",
            intermediate_size=...,
            hidden_act="gelu",
            rope_scaling={**LLAMA3, "factor": 0.5, "low_freq_factor": 4.0},
            eos_token_id=["</s>"],
            torch_dtype="int8",
            tie_word_embeddings="yes",
        )
    )
    assert text.startswith("config.json: 12 problems\n")
    for line in [
        "vocab_size = 0 is not a positive integer",
        "hidden_size = -64 is not a positive integer",
        "intermediate_size is missing",
        "num_attention_heads = 9 is not a multiple of num_key_value_heads = 2; each KV head serves a whole group",
        "head_dim = 15 is not even",
        "rms_norm_eps = 'tiny' is not a number over 0",
        "hidden_act = 'gelu' is not supported",
        "rope_scaling.factor = 0.5 is under 1",
        "rope_scaling.low_freq_factor = 4.0 is not under rope_scaling.high_freq_factor = 4.0",
        "bos or eos token id '</s>' is not an integer in 0..",
        "dtype (or torch_dtype) = 'int8' is not one of float32, bfloat16, float16",
        "tie_word_embeddings = 'yes' is not true or false",
    ]:
        assert line in text, line


@pytest.mark.parametrize(
    "key",
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
def test_missing_keys(key):
    assert f"{key} is missing" in refused(llama_json(**{key: ...}))


def test_missing_dtype():
    assert "dtype (or torch_dtype) is missing" in refused(llama_json(torch_dtype=...))


def test_a_token_id_outside_the_vocabulary():
    assert "token id 96 is not an integer in 0..96 - 1" in refused(llama_json(eos_token_id=[2, 96]))
    assert "token id -1 is not an integer in 0..96 - 1" in refused(llama_json(bos_token_id=-1))


def test_two_styles_that_disagree():
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 10.0}}
    text = refused(llama_json(**both))
    assert "rope_scaling and rope_parameters disagree" in text
    assert "rope_theta = 10000.0 and rope_parameters.rope_theta = 10.0 disagree" in text


def test_hidden_size_that_the_heads_do_not_divide():
    text = refused(llama_json(hidden_size=66))
    assert "head_dim is missing, and hidden_size = 66 is not a multiple of num_attention_heads = 4" in text


@pytest.mark.parametrize(
    "missing", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
)
def test_incomplete_llama3_scaling(missing):
    scaling = {key: value for key, value in LLAMA3.items() if key != missing}
    assert f"rope_scaling.{missing} is missing; rope type llama3 needs it" in refused(llama_json(rope_scaling=scaling))


def test_not_an_object():
    assert "it holds a list, not an object" in refused([1, 2])


def test_a_config_checks_itself():
    config = ModelConfig.from_hf(llama_json())
    with pytest.raises(
        ValueError, match=r"(?s)ModelConfig: 2 problems\n.*num_heads = 4 is not a multiple of num_kv_heads = 3"
    ):
        dataclasses.replace(config, num_kv_heads=3, rope_theta=math.nan)
    with pytest.raises(ValueError, match=r"rope_scaling.rope_type = 'warp' is not one of linear, llama3, yarn"):
        RopeScaling("warp", 2.0)


@pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "yarn", "factor": 4.0, "truncate": False}])
def test_json_round_trip(scaling):
    config = ModelConfig.from_hf(llama_json(rope_scaling=scaling, eos_token_id=[2, 3], rms_norm_eps=1e-6))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(ModelConfig.from_dict(config.to_dict())) == hash(config)


def test_from_dict_refuses_what_it_does_not_know():
    data = ModelConfig.from_hf(llama_json()).to_dict()
    del data["num_layers"]
    with pytest.raises(ValueError, match=r"ModelConfig\.from_dict: 4 problems") as caught:
        ModelConfig.from_dict({**data, "sinks": 4, "rope_scaling": {"rope_type": "linear", "warp": 1}})
    for line in [
        "sinks = 4 is not a field of ModelConfig",
        "num_layers is missing",
        "rope_scaling.warp = 1 is unknown",
        "rope_scaling.factor is missing; rope type linear needs it",
    ]:
        assert line in str(caught.value)
