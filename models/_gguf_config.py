"""The model configuration in a GGUF file's metadata, and refusing what would change the function unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tbik_jax._problems import Problems
from tbik_jax.models.config import RopeScaling, check_fields
from tbik_jax.models.rope import Float64, llama3_frequencies, unscaled_frequencies

#: Divisors of the rotary frequencies, [head_dim/2]: how llama.cpp stores the llama3 scaling.
ROPE_FACTORS = "rope_freqs.weight"

_ARCHITECTURES = ("llama", "qwen3")

_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"

#: Keys that carry nothing, or nothing at the listed values; None stands for any value.
_INERT: dict[str, tuple[object, ...] | None] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": None,
    "tensor_data_layout": ("Meta AI original pth",),
}

_READ = {
    *_SIZES.values(),
    _EPSILON,
    _THETA,
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}

#: Every released Llama of 3.1 to 3.3 has these, and factor 8 or 32; the file keeps their result only.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FACTORS_TOLERANCE = 1e-5  # llama.cpp computed them in float32


def fields_from_gguf(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Float64 | None,
    problems: Problems,
) -> dict[str, Any]:
    """The fields of a ``ModelConfig``, but for its dtype; what is wrong goes to ``problems``.

    ``shapes`` are the file's tensors by Hugging Face name: biases and a tied head show in what is there.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        problems.unsupported(
            f"general.architecture = {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
        return {}
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    fields: dict[str, Any] = {"architecture": architecture, "qk_norm": architecture == "qwen3"}
    for field, key in _SIZES.items():
        if problems.check(key in own, f"{architecture}.{key} is missing"):
            fields[field] = own[key]
    if problems.check(_EPSILON in own, f"{architecture}.{_EPSILON} is missing"):
        fields["rms_norm_eps"] = _shortest(own[_EPSILON])
    fields["rope_theta"] = _shortest(own.get(_THETA, 10000.0))
    heads, hidden = fields.get("num_heads"), fields.get("hidden_size")
    if heads is not None:
        fields["num_kv_heads"] = own.get("attention.head_count_kv", heads)
    if "attention.key_length" in own:
        fields["head_dim"] = own["attention.key_length"]
    elif isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        fields["head_dim"] = hidden // heads

    embedding = shapes.get("model.embed_tokens.weight")
    if problems.check(embedding is not None, "token_embd.weight is missing") and embedding is not None:
        fields["vocab_size"] = embedding[0]
    fields["tie_word_embeddings"] = "lm_head.weight" not in shapes
    fields["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    fields["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    fields["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    fields["eos_token_ids"] = eos_token_ids(metadata)
    fields["rope_scaling"] = _rope_scaling(own, fields, rope_factors, problems)

    names = {field: f"{architecture}.{key}" for field, key in _SIZES.items()}
    names |= {"num_kv_heads": f"{architecture}.attention.head_count_kv", "head_dim": "head size"}
    check_fields(fields, problems, names)
    _refuse_other_functions(architecture, own, fields, problems)
    return fields


def eos_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, a turn or a message, in this order, each once."""
    ids = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _refuse_other_functions(
    architecture: str, own: Mapping[str, Any], fields: Mapping[str, Any], problems: Problems
) -> None:
    for key, value in own.items():
        if key in _READ:
            continue
        inert = _INERT.get(key, ())
        if inert is not None and value not in inert:
            problems.unsupported(f"{architecture}.{key} = {value!r} is not supported, and may change the function")
    for key, field in {
        "vocab_size": "vocab_size",
        "rope.dimension_count": "head_dim",
        "attention.value_length": "head_dim",
    }.items():
        if key in own and field in fields:
            problems.check(
                own[key] == fields[field],
                f"{architecture}.{key} = {own[key]!r}, but {field} is {fields[field]!r}; they must be equal",
            )
    window, longest = own.get("attention.sliding_window"), fields.get("max_position_embeddings")
    if window and isinstance(longest, int) and (not isinstance(window, int) or window < longest):
        problems.unsupported(
            f"{architecture}.attention.sliding_window = {window!r} is under the context length {longest}; "
            "attention is full"
        )


def _rope_scaling(
    own: Mapping[str, Any], fields: Mapping[str, Any], factors: Float64 | None, problems: Problems
) -> dict[str, Any] | None:
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    if kind not in ("none", "linear", "yarn"):
        problems.unsupported(f"rope.scaling.type = {kind!r} is not supported; supported are none, linear and yarn")
        return None
    if factors is not None:
        if kind != "none":
            problems.unsupported(f"{ROPE_FACTORS} together with rope.scaling.type = {kind!r} is not supported")
            return None
        return _llama3_scaling(fields, factors, problems)
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        # llama.cpp extends what the file was trained for, which is the context length unless it says more.
        scaling["original_max_position_embeddings"] = own.get(
            "rope.scaling.original_context_length", own.get("context_length")
        )
        for ours, key in {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}.items():
            if f"rope.scaling.{key}" in own:
                scaling[ours] = _shortest(own[f"rope.scaling.{key}"])
    return scaling


def _llama3_scaling(fields: Mapping[str, Any], factors: Float64, problems: Problems) -> dict[str, Any] | None:
    """Recognise Llama 3's constants by the divisors that they lead to; anything else is refused."""
    head_dim, theta = fields.get("head_dim"), fields["rope_theta"]
    if not isinstance(head_dim, int) or factors.shape != (head_dim // 2,):
        problems.add(f"{ROPE_FACTORS} has shape {list(factors.shape)}, not head size / 2 = {head_dim} / 2")
        return None
    if np.all(factors == 1.0):
        return None
    factor = _shortest(np.max(factors))
    if np.all(np.isfinite(factors)) and factor >= 1:
        scaling = RopeScaling("llama3", factor, **_LLAMA3)  # type: ignore[arg-type]
        plain = unscaled_frequencies(theta, head_dim)
        if np.allclose(plain / llama3_frequencies(plain, scaling), factors, rtol=_FACTORS_TOLERANCE, atol=0):
            return dataclasses.asdict(scaling)
    problems.unsupported(
        f"{ROPE_FACTORS} is not what Llama 3's scaling gives (low_freq_factor 1, high_freq_factor 4, "
        f"original context 8192, here with factor {factor}); other frequency factors are not supported"
    )
    return None


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was 1e-05 before it was a GGUF."""
    return float(str(np.float32(value))) if isinstance(value, float | np.floating) else value
