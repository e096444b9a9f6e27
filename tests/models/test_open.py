import json
import shutil

import pytest

from tbik_jax.models.config import ModelConfig
from tbik_jax.models.gguf import GGUFSource
from tbik_jax.models.huggingface import HuggingFaceSource
from tbik_jax.models.open import open_model
from tests.models.checkpoints import FIXTURES, llama_json, random_tensors, write_folder, write_gguf


@pytest.mark.parametrize(("name", "has_tokenizer"), [("tiny-llama", True), ("tiny-qwen3", False)])
def test_a_folder(name, has_tokenizer):
    model = open_model(str(FIXTURES / name))
    assert isinstance(model.source, HuggingFaceSource)
    assert model.config is model.source.config
    assert model.name == name
    assert (model.tokenizer is not None) == has_tokenizer


def test_a_gguf_file(tmp_path):
    config = ModelConfig.from_hf(llama_json())
    write_gguf(tmp_path / "small.gguf", config, random_tensors(config))
    model = open_model(tmp_path / "small.gguf")
    assert isinstance(model.source, GGUFSource)
    assert model.config == config
    assert (model.name, model.tokenizer) == ("small", None)


def test_weights_are_checked(tmp_path):
    tensors = random_tensors(ModelConfig.from_hf(llama_json()))
    del tensors["model.norm.weight"]
    write_folder(tmp_path, llama_json(), tensors)
    with pytest.raises(ValueError, match=r"model\.norm\.weight \[64\] is missing"):
        open_model(tmp_path)


def test_more_tokens_than_rows(tmp_path):
    config = ModelConfig.from_hf(llama_json())
    write_folder(tmp_path, llama_json(), random_tensors(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "tiny-llama" / name, tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has 259 tokens, and the embedding 96 rows"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere",
            "'nowhere' is not a model. Looked for one of the names smollm2, tiny; for a folder with config.json and ",
        ),
        ("meta-llama/Llama-3.1-8B", "and found nothing there. Nothing is ever downloaded: give the path of a local"),
        ("notes.txt", "which is a file, but not a .gguf file"),
    ],
)
def test_unknown(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"^open_model: ") as caught:
        open_model(name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
