"""Reading ``config.json`` of a Hugging Face folder, and refusing what would change the function unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tbik_jax._problems import Problems
from tbik_jax.models.config import check_fields

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
_NAMES = _REQUIRED | {"num_kv_heads": "num_key_value_heads", "dtype": "dtype (or torch_dtype)"}

#: Fields of related architectures that change the function, with the values at which they do nothing.
_INERT: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (None, 1),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attention_sinks": (None, False, 0),
    "use_attention_sinks": (None, False),
    "attention_sink_size": (None, 0),
    "attention_chunk_size": (None,),
    "attention_dropout": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "num_nextn_predict_layers": (None, 0),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None,),
}

#: What MistralForCausalLM means by a config.json that does not mention its window.
_MISTRAL_DEFAULT_WINDOW = 4096

_LENGTH_DEPENDENT = (
    "its frequencies depend on the length of the sequence, so a cached key would be rotated differently "
    "from the same key in a longer prefill, and the two could not agree"
)
_ROPE_REFUSED = {"dynamic": _LENGTH_DEPENDENT, "longrope": _LENGTH_DEPENDENT, "su": _LENGTH_DEPENDENT}
_YARN_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", *_YARN_OPTIONAL),
}
_ROPE_KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}.union(*_ROPE_FIELDS.values())


def fields_from_hf(data: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """The fields of a ``ModelConfig`` in ``data``; what is wrong or missing goes to ``problems``."""
    if not problems.check(
        isinstance(data, Mapping), f"it holds a {type(data).__name__}, not an object with named fields"
    ):
        return {}
    fields: dict[str, Any] = {}
    architecture = _architecture(data, problems)
    if architecture is not None:
        fields["architecture"] = architecture
    for field, key in _REQUIRED.items():
        if problems.check(data.get(key) is not None, f"{key} is missing"):
            fields[field] = data[key]
    _heads(data, architecture, fields, problems)
    _rope(data, fields, problems)

    fields["tie_word_embeddings"] = _flag(data, "tie_word_embeddings")
    fields["attention_bias"] = _flag(data, "attention_bias")
    fields["mlp_bias"] = _flag(data, "mlp_bias")
    fields["qk_norm"] = architecture == "qwen3"
    fields["bos_token_id"] = data.get("bos_token_id")
    fields["eos_token_ids"] = eos_token_ids(data)
    dtype = data.get("dtype") or data.get("torch_dtype")
    if problems.check(
        dtype is not None, "dtype (or torch_dtype) is missing; add the dtype that the weights are stored in"
    ):
        fields["dtype"] = dtype

    check_fields(fields, problems, _NAMES)
    _refuse_other_functions(data, architecture, problems)
    _refuse_sliding_window(data, architecture, fields, problems)
    return fields


def eos_token_ids(data: Mapping[str, Any]) -> tuple[Any, ...]:
    """``eos_token_id`` of ``config.json`` or ``generation_config.json``: null, an integer or a list."""
    ids = data.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _flag(data: Mapping[str, Any], key: str) -> Any:
    value = data.get(key)
    return False if value is None else value


def _architecture(data: Mapping[str, Any], problems: Problems) -> str | None:
    named = data.get("architectures")
    supported = ", ".join(_ARCHITECTURES)
    if not named:
        problems.add(f"architectures is missing; name one of {supported}")
        return None
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) and named[0] in _ARCHITECTURES:
        return _ARCHITECTURES[named[0]]
    problems.unsupported(f"architectures = {named!r} is not supported; supported are {supported}")
    return None


def _heads(data: Mapping[str, Any], architecture: str | None, fields: dict[str, Any], problems: Problems) -> None:
    """KV heads and head size, which older files leave out and which default differently by architecture."""
    heads, hidden = fields.get("num_heads"), fields.get("hidden_size")
    if data.get("num_key_value_heads") is not None:
        fields["num_kv_heads"] = data["num_key_value_heads"]
    elif architecture == "llama" or "num_key_value_heads" in data:
        fields["num_kv_heads"] = heads
    else:
        problems.add("num_key_value_heads is missing")
    if data.get("head_dim") is not None:
        fields["head_dim"] = data["head_dim"]
    elif architecture == "qwen3":
        problems.add("head_dim is missing; in Qwen3 it is not hidden_size / num_attention_heads")
    elif isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        fields["head_dim"] = hidden // heads
        problems.check(
            hidden % heads == 0,
            f"head_dim is missing, and hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}",
        )
    if fields.get("num_kv_heads") is None:
        fields.pop("num_kv_heads", None)


def _rope(data: Mapping[str, Any], fields: dict[str, Any], problems: Problems) -> None:
    """``rope_theta`` and ``rope_scaling`` of transformers 4, or ``rope_parameters`` of 5; both must agree."""
    thetas, scalings = {}, {}
    if data.get("rope_theta") is not None:
        thetas["rope_theta"] = data["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        parameters = data.get(key)
        if parameters is None:
            continue
        if not problems.check(isinstance(parameters, Mapping), f"{key} = {parameters!r} is not an object or null"):
            continue
        if any(isinstance(value, Mapping) for value in parameters.values()):
            problems.unsupported(
                f"{key} differs between layers ({', '.join(parameters)}); one set for all is supported"
            )
            continue
        if parameters.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = parameters["rope_theta"]
        if parameters.get("partial_rotary_factor") not in _INERT["partial_rotary_factor"]:
            problems.unsupported(
                f"{key}.partial_rotary_factor = {parameters['partial_rotary_factor']!r}: heads are rotated whole"
            )
        scalings[key] = _rope_scaling(key, parameters, fields.get("max_position_embeddings"), problems)
    first, *others = thetas or {"default": 10000.0}
    for other in others:
        problems.check(
            thetas[first] == thetas[other],
            f"{first} = {thetas[first]!r} and {other} = {thetas[other]!r} disagree; keep one",
        )
    if len(scalings) == 2:
        old, new = scalings.values()
        problems.check(old == new, "rope_scaling and rope_parameters disagree; keep one")
    fields["rope_theta"] = thetas.get(first, 10000.0)
    fields["rope_scaling"] = next((scaling for scaling in scalings.values() if scaling is not None), None)


def _rope_scaling(
    key: str, parameters: Mapping[str, Any], max_positions: object, problems: Problems
) -> dict[str, Any] | None:
    rope_type = parameters.get("rope_type", parameters.get("type"))
    if rope_type is None and key == "rope_parameters":
        rope_type = "default"
    if rope_type in ("default", None):
        problems.check(rope_type is not None, f"{key} has no rope_type")
        return None
    if not isinstance(rope_type, str) or rope_type not in _ROPE_FIELDS:
        reason = _ROPE_REFUSED.get(rope_type, "unknown") if isinstance(rope_type, str) else "unknown"
        problems.unsupported(
            f"{key}: rope type {rope_type!r} is not supported ({reason}); supported are default, "
            f"{', '.join(_ROPE_FIELDS)}"
        )
        return None
    for name in parameters.keys() - _ROPE_KNOWN:
        problems.unsupported(f"{key}.{name} = {parameters[name]!r} is unknown, and may change the frequencies")
    found = {name: parameters[name] for name in _ROPE_FIELDS[rope_type] if parameters.get(name) is not None}
    if rope_type == "yarn" and max_positions is not None:
        found.setdefault("original_max_position_embeddings", max_positions)
    return {"rope_type": rope_type, **found}


def _refuse_other_functions(data: Mapping[str, Any], architecture: str | None, problems: Problems) -> None:
    act = data.get("hidden_act", "silu")
    if act != "silu":
        problems.unsupported(f"hidden_act = {act!r} is not supported; the MLP is SwiGLU, whose activation is silu")
    for key, inert in _INERT.items():
        value = data.get(key)
        if value not in inert:
            problems.unsupported(
                f"{key} = {value!r} changes the function and is not supported; it would have to be "
                f"{' or '.join(repr(v) for v in inert if v is not None) or 'null'}"
            )
    custom = data.get("auto_map")
    if isinstance(custom, Mapping) and "AutoModelForCausalLM" in custom:
        problems.unsupported(
            f"auto_map names its own model code, {custom['AutoModelForCausalLM']!r}; it is never run, so its "
            "function is not known"
        )
    for key, having in {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}.items():
        if data.get(key) and architecture is not None and architecture not in having:
            problems.unsupported(f"{key} = {data[key]!r}: {architecture} has no such bias")


def _refuse_sliding_window(
    data: Mapping[str, Any], architecture: str | None, fields: Mapping[str, Any], problems: Problems
) -> None:
    """A window no shorter than the longest sequence does nothing; any other is refused."""
    window = data.get("sliding_window")
    if architecture == "mistral":
        window = data.get("sliding_window", _MISTRAL_DEFAULT_WINDOW)
    slides = window is not None
    if architecture == "qwen3":
        # Layers from max_window_layers on slide.
        first = data.get("max_window_layers")
        layers = fields.get("num_layers")
        none_slides = isinstance(first, int) and isinstance(layers, int) and first >= layers
        slides = slides and bool(data.get("use_sliding_window")) and not none_slides
    kinds = data.get("layer_types")
    if isinstance(kinds, list) and kinds:
        others = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
        if others:
            problems.unsupported(f"layer_types names {', '.join(others)}; full_attention is supported")
        # Mistral's own code slides every layer whatever the list says.
        slides = "sliding_attention" in kinds or (slides and architecture == "mistral")
    longest = fields.get("max_position_embeddings")
    if not slides or not isinstance(longest, int):
        return
    if not isinstance(window, int) or window < longest:
        absent = " (not in the file, which for Mistral means 4096; null would mean none)"
        problems.unsupported(
            f"sliding_window = {window!r}{absent if 'sliding_window' not in data else ''} is under "
            f"max_position_embeddings = {longest}; attention is full. Lower max_position_embeddings to the "
            "window, where it has no effect"
        )
