"""What a model is: the numbers that fix its function, read from a Hugging Face ``config.json`` or written
by hand.

Every field is numerics-bearing. A configuration is stored with a checkpoint and compared when it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tbik_jax._problems import Problems

Architecture = Literal["llama", "mistral", "qwen3"]
RopeType = Literal["linear", "llama3", "yarn"]
StoredDType = Literal["float32", "bfloat16", "float16"]

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "qk_norm")

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining's; see
    :mod:`tbik_jax.models.rope`.

    ``attention_factor``, ``mscale`` and ``mscale_all_dim`` are YaRN's optional temperature: None is the
    paper's own.

    Raises:
        ValueError: a field that the type needs is missing, or a value is out of range.
    """

    rope_type: RopeType
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        with Problems("RopeScaling") as problems:
            _check_rope_scaling(vars(self), problems)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, rotary attention with grouped KV heads, SwiGLU.

    ``attention_bias`` puts a bias on q, k, v and o; ``mlp_bias`` on gate, up and down; ``qk_norm`` an
    RMSNorm over ``head_dim`` on each query and key head before the rotation. ``dtype`` is the one that the
    weights are stored in.

    Raises:
        ValueError: sizes that are not positive integers, query heads that are no multiple of the KV heads,
            an odd ``head_dim``, token ids outside the vocabulary, a dtype that is none of the three; all of
            it at once.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: StoredDType = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_ids, Iterable):
            object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        with Problems("ModelConfig") as problems:
            check_fields(vars(self), problems)
        # An int and a float of one value compare equal but print, and so store, differently.
        for field in ("rms_norm_eps", "rope_theta"):
            object.__setattr__(self, field, float(getattr(self, field)))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The configuration in a Hugging Face ``config.json``, given as the parsed dictionary.

        Reads ``LlamaForCausalLM``, ``MistralForCausalLM`` and ``Qwen3ForCausalLM``, with ``rope_theta`` and
        ``rope_scaling`` (transformers 4) or ``rope_parameters`` (transformers 5). A field that would change
        the function in a way that this package does not compute is refused, never skipped.

        Raises:
            ValueError: missing or wrong fields.
            NotImplementedError: another architecture or activation, a sliding window that binds, experts,
                ``dynamic`` or ``longrope`` frequencies, quantized weights and the like.
        """
        from tbik_jax.models._hf_config import fields_from_hf

        with Problems("config.json") as problems:
            fields = fields_from_hf(data, problems)
        return cls.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON types; :meth:`from_dict` gives back an equal configuration."""
        return {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ValueError: fields that are unknown, missing or wrong.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        with Problems("ModelConfig.from_dict") as problems:
            for name in data.keys() - known.keys():
                problems.add(f"{name} = {data[name]!r} is not a field of ModelConfig; known are {', '.join(known)}")
            for name in required:
                problems.check(name in data, f"{name} is missing")
            check_fields(data, problems)
        scaling = data.get("rope_scaling")
        return cls(**{**data, "rope_scaling": RopeScaling(**scaling) if isinstance(scaling, Mapping) else scaling})


def check_fields(fields: Mapping[str, Any], problems: Problems, names: Mapping[str, str] | None = None) -> None:
    """Record what is wrong with the given fields of a :class:`ModelConfig`; absent fields are not looked at.

    ``names`` gives the fields the names that their file uses, for messages that a user can act on.
    """
    names = names or {}

    def check(field: str, sound: bool, wanted: str) -> bool:
        return problems.check(sound, f"{names.get(field, field)} = {fields[field]!r} is not {wanted}")

    def choice(field: str, choices: tuple[str, ...]) -> None:
        if field in fields:
            check(field, fields[field] in choices, f"one of {', '.join(choices)}")

    choice("architecture", get_args(Architecture))
    choice("dtype", get_args(StoredDType))
    sound: dict[str, int] = {}
    for field in _SIZES:
        if field in fields and check(field, _is_int(fields[field]) and fields[field] > 0, "a positive integer"):
            sound[field] = fields[field]
    for field, least in (("rms_norm_eps", 0), ("rope_theta", 1)):
        if field in fields:
            check(field, _is_number(fields[field]) and fields[field] > least, f"a number over {least}")
    for field in _FLAGS:
        if field in fields:
            check(field, isinstance(fields[field], bool), "true or false")

    if "num_heads" in sound and "num_kv_heads" in sound:
        heads, kv_heads = sound["num_heads"], sound["num_kv_heads"]
        problems.check(
            heads % kv_heads == 0,
            f"{names.get('num_heads', 'num_heads')} = {heads} is not a multiple of "
            f"{names.get('num_kv_heads', 'num_kv_heads')} = {kv_heads}; each KV head serves a whole group of "
            "query heads",
        )
    if "head_dim" in sound:
        check("head_dim", sound["head_dim"] % 2 == 0, "even; rotary embeddings turn pairs of dimensions")

    ids = fields.get("eos_token_ids", ())
    if not isinstance(ids, list | tuple):
        check("eos_token_ids", False, "a list of integers")
        ids = ()
    if fields.get("bos_token_id") is not None:
        ids = (*ids, fields["bos_token_id"])
    vocabulary = sound.get("vocab_size", 2**31)
    for token in ids:
        problems.check(
            _is_int(token) and 0 <= token < vocabulary,
            f"bos or eos token id {token!r} is not an integer in 0..{vocabulary} - 1",
        )

    scaling = fields.get("rope_scaling")
    if isinstance(scaling, Mapping):
        _check_rope_scaling(scaling, problems)
    elif scaling is not None:
        check(
            "rope_scaling",
            isinstance(scaling, RopeScaling),
            "a RopeScaling, a dictionary of its fields, or null",
        )


def _check_rope_scaling(fields: Mapping[str, Any], problems: Problems) -> None:
    known = {field.name: field.default for field in dataclasses.fields(RopeScaling)}
    for name in fields.keys() - known.keys():
        problems.add(f"rope_scaling.{name} = {fields[name]!r} is unknown, and may change the frequencies")
    values = {**known, **fields}
    rope_type = values["rope_type"]
    if not problems.check(
        isinstance(rope_type, str) and rope_type in _ROPE_NEEDS,
        f"rope_scaling.rope_type = {rope_type!r} is not one of {', '.join(_ROPE_NEEDS)}",
    ):
        return
    sound = {}
    for name, value in values.items():
        if name in ("rope_type", "truncate"):
            continue
        if value is None or value is dataclasses.MISSING:
            problems.check(
                name not in _ROPE_NEEDS[rope_type],
                f"rope_scaling.{name} is missing; rope type {rope_type} needs it",
            )
        elif name == "original_max_position_embeddings":
            problems.check(_is_int(value) and value > 0, f"rope_scaling.{name} = {value!r} is not a positive integer")
        elif problems.check(
            _is_number(value) and value > 0, f"rope_scaling.{name} = {value!r} is not a positive number"
        ):
            sound[name] = value
    if "factor" in sound:
        problems.check(
            sound["factor"] >= 1,
            f"rope_scaling.factor = {sound['factor']!r} is under 1; it stretches the context, and cannot shrink it",
        )
    problems.check(
        isinstance(values["truncate"], bool),
        f"rope_scaling.truncate = {values['truncate']!r} is not true or false",
    )
    lower, upper = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_slow", "beta_fast"),
    }.get(rope_type, ("", ""))
    if lower in sound and upper in sound:
        problems.check(
            sound[lower] < sound[upper],
            f"rope_scaling.{lower} = {sound[lower]!r} is not under rope_scaling.{upper} = {sound[upper]!r}",
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
