"""Small model folders and files for the tests to write, and the function that they should compute, in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tbik_jax.models.config import ModelConfig
from tbik_jax.models.rope import rope_tables
from tbik_jax.models.source import TensorSource, expected_tensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


def llama_json(**changes: Any) -> dict[str, Any]:
    """A config.json of a small llama; ``...`` as a value removes the key."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **changes,
    }
    return {key: value for key, value in data.items() if value is not ...}


def mistral_json(**changes: Any) -> dict[str, Any]:
    return llama_json(**{"architectures": ["MistralForCausalLM"], "sliding_window": None, **changes})


def qwen3_json(**changes: Any) -> dict[str, Any]:
    return llama_json(**{"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, **changes})


def random_tensors(config: ModelConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in expected_tensors(config).items()}


def write_folder(
    folder: Path, data: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> dict[str, list[str]]:
    """Write config.json and the weights; returns the tensor names by file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return {"model.safetensors": names}
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp's converter writes the rows of a query or key projection, row by row."""
    size = len(weight) // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    quantized: gguf.GGMLQuantizationType | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """What llama.cpp's converter would write for ``tensors``; ``metadata`` adds keys, or removes them by ``...``."""
    arch = "qwen3" if config.architecture == "qwen3" else "llama"
    keys: dict[str, Any] = {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_ids[0],
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if value is not ...:
            add_key(writer, key, value)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if arch == "llama" else {}
    for name, tensor in tensors.items():
        stored = gguf_name(name)
        part = stored.split(".")[-2]
        if part in heads:
            tensor = llama_cpp_rows(tensor, heads[part])
        if quantized is not None and tensor.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(tensor, quantized), raw_dtype=quantized)
        elif tensor.dtype == ml_dtypes.bfloat16:
            writer.add_tensor(stored, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(stored, tensor)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)


def forward(source: TensorSource, config: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] in float64, from what a source reads and the tables of this package."""
    batch, length = ids.shape
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    cos, sin = (table.astype(np.float64) for table in rope_tables(config, length))
    present = source.names()

    def get(name: str) -> np.ndarray:
        return source.read(name).astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * get(f"{name}.weight")

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        bias = get(f"{name}.bias") if f"{name}.bias" in present else 0.0
        return x @ get(f"{name}.weight").T + bias

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = get("model.embed_tokens.weight")[ids]
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        h = norm(x, f"{block}.input_layernorm")
        q, k, v = (
            linear(h, f"{block}.self_attn.{part}_proj").reshape(batch, length, n, width).swapaxes(1, 2)
            for part, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if config.qk_norm:
            q, k = norm(q, f"{block}.self_attn.q_norm"), norm(k, f"{block}.self_attn.k_norm")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(width)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(batch, length, -1), f"{block}.self_attn.o_proj")
        h = norm(x, f"{block}.post_attention_layernorm")
        gate = linear(h, f"{block}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(norm(x, "model.norm"), head)
