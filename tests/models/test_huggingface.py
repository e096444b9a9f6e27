import json

import ml_dtypes
import numpy as np
import pytest

from tbik_jax.models.config import ModelConfig
from tbik_jax.models.huggingface import HuggingFaceSource
from tbik_jax.models.source import validate
from tests.models.checkpoints import FIXTURES, forward, llama_json, qwen3_json, random_tensors, write_folder


def refused(folder, kind=ValueError):
    with pytest.raises(kind) as caught:
        HuggingFaceSource(folder)
    assert caught.type is kind
    return str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_bit_of_every_row_range(tmp_path, dtype, shards):
    data = qwen3_json(tie_word_embeddings=True)
    tensors = random_tensors(ModelConfig.from_hf(data), dtype)
    write_folder(tmp_path, data, tensors, shards)
    source = HuggingFaceSource(tmp_path)
    validate(source, source.config)
    assert source.config == ModelConfig.from_hf(data)
    assert source.names() == tensors.keys()
    for name, tensor in tensors.items():
        rows = len(tensor)
        assert source.shape(name) == tensor.shape
        assert source.dtype(name) == tensor.dtype
        for start, stop in ((0, None), (0, rows), (rows // 3, rows // 2), (rows - 1, rows), (5, 5)):
            part = source.read(name, start, stop)
            assert part.dtype == tensor.dtype
            assert part.shape == tensor[start:stop].shape
            assert part.tobytes() == tensor[start:stop].tobytes()


def test_a_read_is_the_callers_own(tmp_path):
    tensors = random_tensors(ModelConfig.from_hf(llama_json()))
    write_folder(tmp_path, llama_json(), tensors)
    source = HuggingFaceSource(tmp_path)
    source.read("model.norm.weight")[:] = 0
    assert source.read("model.norm.weight").tobytes() == tensors["model.norm.weight"].tobytes()


def test_bad_reads(tmp_path):
    write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())))
    source = HuggingFaceSource(tmp_path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: rows 0\.\.65 are not a range inside its 64 rows"):
        source.read("model.norm.weight", 0, 65)
    with pytest.raises(ValueError, match=r"no tensor 'model\.norm'"):
        source.read("model.norm")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mistral", "tiny-qwen3"])
def test_folders_of_transformers_give_its_logits(name):
    source = HuggingFaceSource(FIXTURES / name)
    validate(source, source.config)
    golden = np.load(FIXTURES / name / "golden.npz")
    logits = forward(source, source.config, golden["input_ids"])
    # Float64 throughout but for the rotary tables, whose entries are off by at most 2**-25; logits have a std of 2.
    np.testing.assert_allclose(logits, golden["logits64"], rtol=0, atol=1e-5)


def test_generation_config_says_where_texts_end(tmp_path):
    write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert HuggingFaceSource(tmp_path).config.eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert HuggingFaceSource(tmp_path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json is not JSON" in refused(tmp_path)


def test_not_a_folder(tmp_path):
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "it is a file; give the folder that holds config.json" in refused(tmp_path / "file")


def test_an_empty_folder_lists_both_things_that_are_missing(tmp_path):
    text = refused(tmp_path)
    assert "there is no config.json" in text
    assert "there is neither model.safetensors nor model.safetensors.index.json" in text


def test_only_pickled_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama_json()))
    (tmp_path / "pytorch_model.bin").touch()
    text = refused(tmp_path)
    assert "only pytorch_model.bin: pickled files can run code" in text
    assert "Convert to safetensors: model.save_pretrained(folder, safe_serialization=True)" in text


def test_safetensors_under_another_name(tmp_path):
    write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())))
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert "only consolidated.safetensors; these need the index" in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": \xff}', "config.json is not UTF-8 text: byte 0xff at 6"),
        (b'{"a": 1,}', "config.json is not JSON: "),
        (b"[1]", "config.json holds a list, not an object"),
    ],
)
def test_unreadable_config(tmp_path, content, message):
    write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())))
    (tmp_path / "config.json").write_bytes(content)
    assert message in refused(tmp_path)


def test_unsupported_model(tmp_path):
    write_folder(tmp_path, llama_json(hidden_act="relu"), random_tensors(ModelConfig.from_hf(llama_json())))
    assert "hidden_act = 'relu'" in refused(tmp_path, NotImplementedError)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no header"])
def test_damaged_files_are_all_named(tmp_path, damage):
    files = write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())), shards=3)
    broken = sorted(files)[:2]
    for file in broken:
        content = (tmp_path / file).read_bytes()
        damaged = {
            "truncated": content[:-100],
            "empty": b"",
            "garbage": b"\xff" * 64,
            "no header": (2).to_bytes(8, "little") + b"[]",
        }[damage]
        (tmp_path / file).write_bytes(damaged)
    text = refused(tmp_path)
    assert text.startswith(f"{tmp_path}: 2 problems")
    for file in broken:
        assert f"{file} is truncated or not a safetensors file" in text


def test_missing_shards_are_all_named(tmp_path):
    files = write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())), shards=3)
    for file in sorted(files)[1:]:
        (tmp_path / file).unlink()
    text = refused(tmp_path)
    for file in sorted(files)[1:]:
        assert f"model.safetensors.index.json names {file}, which is not in the folder" in text


def test_an_index_that_contradicts_its_shards(tmp_path):
    write_folder(tmp_path, llama_json(), random_tensors(ModelConfig.from_hf(llama_json())), shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.ghost.weight"] = shard
    path.write_text(json.dumps(index))
    text = refused(tmp_path)
    assert f"places model.ghost.weight in {shard}, which does not hold it" in text
    assert f"{shard} holds model.norm.weight, which model.safetensors.index.json does not place there" in text


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, "model.safetensors.index.json has no weight_map"),
        (
            {"weight_map": {"a": "../other.safetensors"}},
            "names '../other.safetensors', which is not the name of a file",
        ),
        ({"weight_map": {"a": 3}}, "names 3, which is not the name of a file"),
    ],
)
def test_a_bad_index(tmp_path, index, message):
    (tmp_path / "config.json").write_text(json.dumps(llama_json()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused(tmp_path)


def test_an_unknown_storage_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama_json()))
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "w in model.safetensors has the storage type F8_E8M0" in refused(tmp_path, NotImplementedError)


def test_missing_tensors_and_wrong_shapes_are_found_by_validate(tmp_path):
    tensors = random_tensors(ModelConfig.from_hf(llama_json()))
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    write_folder(tmp_path, llama_json(), tensors)
    source = HuggingFaceSource(tmp_path)
    with pytest.raises(ValueError, match="weights: 2 problems") as caught:
        validate(source, source.config)
    assert "lm_head.weight [96, 64] is missing" in str(caught.value)
    assert "model.norm.weight has shape [3]" in str(caught.value)
