"""The models compute the function that transformers computes; accuracy is stated against float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tbik_jax.engine import Generator, make_mesh
from tbik_jax.models.loading import load
from tbik_jax.models.open import open_model
from tbik_jax.models.random import RandomSource
from tbik_jax.numerics import Numerics
from tests.generators import BIASED, generator, prompts, smollm2
from tests.models.checkpoints import FIXTURES, forward

NAMES = ("tiny-llama", "tiny-mistral", "tiny-qwen3")

#: Largest error of a logit in float32; the limit that transformers itself had to keep when the goldens were made.
#: An epsilon of 1e-5 in place of 1e-6 would be 14 times as much, a forgotten RoPE scaling 10^5 times.
TOLERANCE = 5e-5
#: Relative RMS error in bfloat16, whose unit roundoff is 2^-8 = 0.004: ten roundings at random.
TOLERANCE_BF16 = 0.05

every_fixture = pytest.mark.parametrize("name", NAMES)
INVARIANT, PLAIN = Numerics.invariant(), Numerics.plain()


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "golden.npz") as file:
        return dict(file)


@cache
def fixture_generator(name: str, numerics: Numerics, ranks: int, dtype: str = "float32") -> Generator:
    model, mesh = open_model(FIXTURES / name), make_mesh(ranks)
    packed = ranks == 1  # so that both layouts of the weights are seen
    return Generator(load(model.config, model.source, numerics, mesh, dtype=dtype), mesh, pack=packed)


def logits_of(generator: Generator, name: str) -> np.ndarray:
    return np.stack(generator.score(golden(name)["input_ids"].tolist()))


def kind(value: object) -> str | None:
    return value.kind if isinstance(value, Numerics) else None


@every_fixture
@pytest.mark.parametrize("numerics, ranks", [(INVARIANT, 1), (INVARIANT, 3), (PLAIN, 3)], ids=kind)
def test_logits(name, numerics, ranks):
    logits = logits_of(fixture_generator(name, numerics, ranks), name)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, golden(name)["logits64"], rtol=0, atol=TOLERANCE)


@every_fixture
def test_greedy_tokens(name):
    wanted = golden(name)["greedy"].tolist()
    prompt = golden(name)["input_ids"][0, :8].tolist()
    (found,) = fixture_generator(name, INVARIANT, 1).generate([prompt], len(wanted))
    assert list(found.tokens) == wanted


def test_logits_in_bfloat16():
    logits = logits_of(fixture_generator("tiny-mistral", INVARIANT, 1, "bfloat16"), "tiny-mistral")
    wanted = golden("tiny-mistral")["logits64"]
    error = np.sqrt(np.mean((logits - wanted) ** 2)) / wanted.std()
    assert TOLERANCE < error < TOLERANCE_BF16


def test_logits_with_biases():
    """No golden has biases; the oracle is float64, and 1e-5 some hundred units in the last place of a logit near 1."""
    some = prompts(5, 140, 23)
    for logits, prompt in zip(generator(BIASED).score(some), some, strict=True):
        exact = forward(RandomSource(BIASED), BIASED, np.array([prompt]))[0]
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5)


def test_the_config_as_transformers_4_wrote_it(tmp_path):
    for file in (FIXTURES / "tiny-llama").iterdir():
        if file.name not in ("config.json", "config_v4.json"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").symlink_to(FIXTURES / "tiny-llama" / "config_v4.json")
    model, mesh = open_model(tmp_path), make_mesh()
    logits = logits_of(Generator(load(model.config, model.source, INVARIANT, mesh), mesh), "tiny-llama")
    np.testing.assert_allclose(logits, golden("tiny-llama")["logits64"], rtol=0, atol=TOLERANCE)


# SmolLM2 -------------------------------------------------------------------------------------------------------------
# Goldens of transformers' LlamaForCausalLM in float32 on the dequantised weights, printed to three decimals.


@pytest.fixture(scope="module")
def smol():
    model, mesh = smollm2(), make_mesh()
    return model.tokenizer, Generator(load(model.config, model.source, INVARIANT, mesh), mesh)


def test_smollm2_next_token_and_greedy_text(smol):
    tokenizer, generator = smol
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    (found,) = generator.generate([ids], 5, with_logits=True)
    # Later choices are won by less than float32 rounding may move.
    assert found.tokens == (7042, 30, 198, 198, 504)
    first = found.logits[0]
    best = np.argsort(-first)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(first[best], [17.371, 14.889, 13.245, 13.010, 12.952], rtol=0, atol=2e-3)


def test_smollm2_answers_a_question(smol):
    tokenizer, generator = smol
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    (found,) = generator.generate([prompt], 12, stop=tokenizer.eos_token_ids)
    assert tokenizer.decode(found.tokens, skip_special_tokens=False) == "The capital of France is Paris.<|im_end|>"
