import dataclasses
import math

import gguf
import ml_dtypes
import numpy as np
import pytest

from tbik_jax.models._gguf_file import GGUFFile
from tbik_jax.models.config import ModelConfig, RopeScaling
from tbik_jax.models.gguf import GGUFSource
from tbik_jax.models.huggingface import HuggingFaceSource
from tbik_jax.models.source import validate
from tests.models.checkpoints import (
    FIXTURES,
    forward,
    gguf_name,
    llama_cpp_rows,
    llama_json,
    qwen3_json,
    random_tensors,
    write_gguf,
)

LLAMA = ModelConfig.from_hf(llama_json())
QWEN3 = ModelConfig.from_hf(qwen3_json())


def refused(path, kind=ValueError):
    with pytest.raises(kind) as caught:
        GGUFSource(path)
    assert caught.type is kind
    return str(caught.value)


def written(tmp_path, config=LLAMA, **arguments):
    tensors = random_tensors(config, seed=3)
    write_gguf(tmp_path / "model.gguf", config, tensors, **arguments)
    return tmp_path / "model.gguf", tensors


@pytest.mark.parametrize("config", [LLAMA, QWEN3, dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True)])
@pytest.mark.parametrize("tied", [False, True])
def test_names_configuration_and_every_row_range(tmp_path, config, tied):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    path, tensors = written(tmp_path, config)
    source = GGUFSource(path)
    assert source.config == config
    validate(source, config)
    assert source.names() == tensors.keys()
    for name, tensor in tensors.items():
        rows = len(tensor)
        assert source.shape(name) == tensor.shape
        assert source.dtype(name) == np.float32
        for start, stop in ((0, None), (0, rows), (rows // 3, rows // 2), (rows - 1, rows), (5, 5)):
            assert source.read(name, start, stop).tobytes() == tensor[start:stop].tobytes()
    with pytest.raises(ValueError, match=r"no tensor 'output\.weight'"):
        source.read("output.weight")


def test_the_permutation_is_that_of_llama_alone(tmp_path):
    for config, moved in ((LLAMA, True), (QWEN3, False)):
        path, tensors = written(tmp_path, config)
        for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            stored = gguf.GGUFReader(path)
            raw = next(tensor.data for tensor in stored.tensors if tensor.name == gguf_name(name))
            assert (raw.tobytes() != tensors[name].tobytes()) == moved
            assert GGUFSource(path).read(name).tobytes() == tensors[name].tobytes()


def test_the_permutation_by_hand():
    # Two heads of size 4: llama.cpp puts rows (0, 2) and (1, 3) of each head side by side.
    rows = np.arange(8)[:, None]
    assert llama_cpp_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("config", [LLAMA, QWEN3])
def test_quantized_rows(tmp_path, kind, config):
    kind = gguf.GGMLQuantizationType[kind]
    path, tensors = written(tmp_path, config, quantized=kind)
    source = GGUFSource(path)
    validate(source, source.config)
    assert source.config == config
    for name, tensor in tensors.items():
        # Blocks lie along rows, so quantizing and permuting rows commute.
        expected = tensor
        if tensor.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)
            assert 0 < np.abs(expected - tensor).max() < 0.5
        assert source.dtype(name) == np.float32
        for start, stop in ((0, None), (7, 29), (9, 9)):
            part = source.read(name, start, stop)
            assert part.dtype == np.float32
            assert part.shape == expected[start:stop].shape
            assert part.tobytes() == expected[start:stop].tobytes()


def test_q8_0_by_hand(tmp_path):
    # 32 int8 values and one float16 scale.
    path, _ = written(tmp_path, quantized=gguf.GGMLQuantizationType.Q8_0)
    file = GGUFFile(path)
    stored = file.rows("token_embd.weight", slice(5, 6))
    assert stored.shape == (1, 2 * 34)
    blocks = stored.reshape(2, 34)
    expected = blocks[:, 2:].view(np.int8).astype(np.float32) * blocks[:, :2].view(np.float16).astype(np.float32)
    assert GGUFSource(path).read("model.embed_tokens.weight", 5, 6).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")])
def test_half_precision_stays(tmp_path, dtype, name):
    tensors = {
        key: tensor.astype(dtype) if tensor.ndim == 2 else tensor for key, tensor in random_tensors(LLAMA).items()
    }
    write_gguf(tmp_path / "m.gguf", LLAMA, tensors)
    source = GGUFSource(tmp_path / "m.gguf")
    validate(source, source.config)
    assert source.config.dtype == name
    for key, tensor in tensors.items():
        assert source.dtype(key) == tensor.dtype
        assert source.read(key, 3, 30).tobytes() == tensor[3:30].tobytes()


@pytest.mark.parametrize("name", ["tiny-mistral", "tiny-qwen3"])
def test_a_converted_folder_gives_the_logits_of_transformers(tmp_path, name):
    folder = HuggingFaceSource(FIXTURES / name)
    tensors = {tensor: folder.read(tensor) for tensor in folder.names()}
    write_gguf(tmp_path / "m.gguf", folder.config, tensors)
    source = GGUFSource(tmp_path / "m.gguf")
    validate(source, source.config)
    golden = np.load(FIXTURES / name / "golden.npz")
    logits = forward(source, source.config, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits64"], rtol=0, atol=1e-5)


def test_the_parser_agrees_with_the_gguf_package(tmp_path):
    metadata = {
        "tokenizer.ggml.tokens": ["a", "ü", ""],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "some.flag": True,
        "llama.rope.scaling.finetuned": False,
    }
    path, _ = written(tmp_path, metadata=metadata, quantized=gguf.GGMLQuantizationType.Q4_1)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(tensor.shape[::-1])
        assert ours.tensors[tensor.name].kind == tensor.tensor_type
        assert ours.rows(tensor.name, slice(None)).tobytes() == tensor.data.tobytes()


def test_float32_metadata_becomes_the_decimal_it_was(tmp_path):
    config = dataclasses.replace(LLAMA, rms_norm_eps=1e-6, rope_theta=500000.0)
    assert GGUFSource(written(tmp_path, config)[0]).config == config


def test_several_ends_of_text(tmp_path):
    path, _ = written(tmp_path, metadata={"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2})
    assert GGUFSource(path).config.eos_token_ids == (2, 9)


def llama3_factors(theta, head_dim, factor, low=1.0, high=4.0, original=8192):
    """What llama.cpp's converter writes, in float32 as there."""
    factors = []
    for i in range(head_dim // 2):
        frequency = np.float32(1.0) / np.float32(theta) ** np.float32(2 * i / head_dim)
        wavelength = np.float32(2 * math.pi) / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


LONG = dataclasses.replace(LLAMA, head_dim=64, rope_theta=500000.0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_of_llama3_are_recognised(tmp_path, factor):
    factors = llama3_factors(500000.0, 64, factor)
    assert 1.0 < np.unique(factors)[1] < factor
    path, _ = written(tmp_path, LONG, extra={"rope_freqs.weight": factors})
    source = GGUFSource(path)
    assert source.config.rope_scaling == RopeScaling(
        "llama3", factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert "rope_freqs.weight" not in source.names()
    validate(source, source.config)


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    path, _ = written(tmp_path, LONG, extra={"rope_freqs.weight": np.ones(32, np.float32)})
    assert GGUFSource(path).config.rope_scaling is None


def test_other_rope_factors_are_refused(tmp_path):
    other = llama3_factors(500000.0, 64, 8.0, original=4096)
    path, _ = written(tmp_path, LONG, extra={"rope_freqs.weight": other})
    assert "rope_freqs.weight is not what Llama 3's scaling gives" in refused(path, NotImplementedError)
    path, _ = written(tmp_path, LONG, extra={"rope_freqs.weight": np.ones(5, np.float32)})
    assert "rope_freqs.weight has shape [5], not head size / 2 = 64 / 2" in refused(path)


def test_linear_and_yarn_scaling(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert GGUFSource(written(tmp_path, metadata=linear)[0]).config.rope_scaling == RopeScaling("linear", 4.0)
    yarn = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "qwen3.rope.scaling.yarn_beta_fast": 16.0,
    }
    assert GGUFSource(written(tmp_path, QWEN3, metadata=yarn)[0]).config.rope_scaling == RopeScaling(
        "yarn", 4.0, original_max_position_embeddings=64, beta_fast=16.0
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type = 'longrope' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported, and may change the function"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5 is not supported"),
        ({"llama.attention.sliding_window": 64}, "sliding_window = 64 is under the context length 128"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale = 2.0 is not supported"),
        ({"split.count": 3}, "it is one of 3 parts; merge them with llama-gguf-split --merge"),
    ],
)
def test_metadata_that_would_change_the_function(tmp_path, metadata, message):
    assert message in refused(written(tmp_path, metadata=metadata)[0], NotImplementedError)


def test_inert_metadata(tmp_path):
    inert = {"llama.expert_count": 0, "llama.attention.sliding_window": 128, "llama.rope.dimension_count": 16}
    assert GGUFSource(written(tmp_path, metadata=inert)[0]).config == LLAMA


def test_contradictory_and_missing_metadata_at_once(tmp_path):
    path, _ = written(
        tmp_path,
        metadata={
            "llama.vocab_size": 95,
            "llama.rope.dimension_count": 8,
            "llama.block_count": ...,
            "llama.attention.head_count_kv": 3,
            "llama.attention.layer_norm_rms_epsilon": ...,
            "llama.feed_forward_length": [96, 96],
        },
    )
    text = refused(path)
    assert text.startswith(f"{path}: 6 problems")
    for line in [
        "llama.vocab_size = 95, but vocab_size is 96; they must be equal",
        "llama.rope.dimension_count = 8, but head_dim is 16; they must be equal",
        "llama.block_count is missing",
        "llama.attention.head_count = 4 is not a multiple of llama.attention.head_count_kv = 3",
        "llama.attention.layer_norm_rms_epsilon is missing",
        "llama.feed_forward_length = [96, 96] is not a positive integer",
    ]:
        assert line in text, line


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "general.architecture = 'gemma2' is not supported; supported are llama, qwen3" in refused(
        tmp_path / "m.gguf", NotImplementedError
    )


def test_a_tensor_of_no_known_role_is_kept_for_validate_to_refuse(tmp_path):
    path, _ = written(tmp_path, extra={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    source = GGUFSource(path)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_sinks\.weight \[4\] is not part of this architecture"):
        validate(source, source.config)


def test_files_that_are_not_gguf(tmp_path):
    assert "there is no such file" in refused(tmp_path / "nowhere.gguf")
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    assert "it is too short to be a GGUF file" in refused(tmp_path / "short.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + bytes(60))
    assert "it starts with b'PK\\x03\\x04', not b'GGUF'" in refused(tmp_path / "zip.gguf")
    (tmp_path / "v1.gguf").write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(60))
    assert "it is version 1; little-endian GGUF of version 2 or 3" in refused(tmp_path / "v1.gguf", NotImplementedError)
    (tmp_path / "big.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(60))
    assert "it is big-endian" in refused(tmp_path / "big.gguf", NotImplementedError)


def test_every_truncation_is_a_clear_error(tmp_path):
    path, _ = written(tmp_path, metadata={"tokenizer.ggml.tokens": ["a", "b", "c"]})
    content = path.read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    rng = np.random.default_rng(0)
    for size in [*rng.integers(24, header - 64, 60), header, header + 1000, len(content) - 64]:
        path.write_bytes(content[:size])
        assert "truncated" in refused(path), size


def test_corrupt_headers_never_escape_as_other_errors(tmp_path):
    path, _ = written(tmp_path, metadata={"tokenizer.ggml.tokens": ["a", "b", "c"]})
    content = bytearray(path.read_bytes())
    header = GGUFFile(path).tensors["token_embd.weight"].offset
    rng = np.random.default_rng(1)
    for position in rng.integers(4, header, 200):
        changed = bytearray(content)
        changed[position] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            source = GGUFSource(path)
            validate(source, source.config)
        except (ValueError, NotImplementedError) as error:
            assert "problem" in str(error), position  # noqa: PT017


def test_unknown_block_format(tmp_path):
    path, _ = written(tmp_path)
    content = path.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = content.index(name) + len(name) + 4 + 8
    path.write_bytes(content[:at] + (250).to_bytes(4, "little") + content[at + 4 :])
    assert "blk.0.attn_norm.weight has the block format 250" in refused(path, NotImplementedError)
