"""The engine's own promises: where a generation ends, what it yields on the way, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tbik_jax.engine import Generator, Sampling, make_mesh
from tbik_jax.models.loading import load
from tbik_jax.models.random import RandomSource
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal, bits, digest
from tests.generators import SMALL, generator, prompts

PROMPTS = prompts(5, 3)
WARM = Sampling(temperature=1.0)
NEW = 6
#: No multiple of the prompt's padding, nor of an attention block.
CONTEXT = 37


@pytest.fixture(scope="module")
def run() -> Generator:
    return generator(dataclasses.replace(SMALL, max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def full(run):
    """Two generations of NEW tokens, neither stopped."""
    return run.generate(PROMPTS, NEW, WARM, with_logits=True)


# Ends ----------------------------------------------------------------------------------------------------------------


def test_results(run, full):
    assert [g.prompt for g in full] == [tuple(prompt) for prompt in PROMPTS]
    assert [len(g.tokens) for g in full] == [NEW, NEW]
    assert [g.logits.shape for g in full] == [(NEW, SMALL.vocab_size)] * 2
    assert all(g.logits.dtype == np.float32 for g in full)
    assert all(type(token) is int for g in full for token in g.tokens)
    assert [g.logits for g in run.generate(PROMPTS, NEW, WARM)] == [None, None]


def test_a_stop_token_ends_its_own_prompt_only(run, full):
    first, second = full
    stop = next(token for token in first.tokens[1:] if token not in (first.tokens[0], *second.tokens))
    end = first.tokens.index(stop) + 1
    assert 1 < end < NEW
    stopped = run.generate(PROMPTS, NEW, WARM, stop=[stop], with_logits=True)
    assert [g.tokens for g in stopped] == [first.tokens[:end], second.tokens]
    assert_bitwise_equal(stopped[0].logits, first.logits[:end], "logits up to the stop token")
    assert_bitwise_equal(stopped[1].logits, second.logits, "logits of the other prompt")


def test_all_stopped_ends_the_stream(run, full):
    first, second = full
    assert first.tokens[:2] != second.tokens[:2]
    stop = [first.tokens[0], second.tokens[1]]
    steps = list(run.stream(PROMPTS, NEW, WARM, stop=stop))
    assert len(steps) == 2
    assert [g.tokens for g in run.generate(PROMPTS, NEW, WARM, stop=stop)] == [first.tokens[:1], second.tokens[:2]]


def test_the_first_tokens_do_not_depend_on_how_many_are_asked_for(run, full):
    assert [g.tokens for g in run.generate(PROMPTS, 1, WARM)] == [g.tokens[:1] for g in full]
    none = run.generate(PROMPTS, 0, WARM, with_logits=True)
    assert [g.tokens for g in none] == [(), ()]
    assert [g.logits.shape for g in none] == [(0, SMALL.vocab_size)] * 2
    assert list(run.stream(PROMPTS, 0, WARM)) == []


def test_up_to_the_end_of_the_context(run):
    prompt = prompts(30)[0]
    (found,) = run.generate([prompt], CONTEXT - 30, with_logits=True)
    assert len(found.tokens) == CONTEXT - 30
    # The last token is chosen from the logits before it, so one forward of the whole context has all of them.
    (logits,) = run.score([[*prompt, *found.tokens]])
    assert len(logits) == CONTEXT
    assert_bitwise_equal(found.logits, logits[29:-1], "logits at the end of the context")
    assert list(found.tokens) == logits[29:-1].argmax(-1).tolist()


@pytest.mark.parametrize("capacity, rows", [(1, 128), (128, 128), (129, 256), (CONTEXT, 128)])
def test_a_cache_holds_whole_attention_blocks(run, capacity, rows):
    cache = run.new_cache(3, capacity)
    for part in cache:
        assert part.shape == (SMALL.num_layers, 3, SMALL.num_kv_heads, rows, SMALL.head_dim)
        assert part.dtype == np.float32
        assert not np.asarray(part).any()


def test_a_cache_has_the_models_dtype_and_every_ranks_heads():
    cache = generator(tp=3, dp=2, dtype="bfloat16", pack=False).new_cache(4, 10)
    # Ten query heads on two KV heads: three ranks need one, two and one of them, in two slots each.
    assert cache.k.shape == (SMALL.num_layers, 4, 6, 128, SMALL.head_dim)
    assert cache.k.dtype.name == "bfloat16"
    assert {shard.data.shape[1:3] for shard in cache.k.addressable_shards} == {(2, 2)}


# Streams and seeds ---------------------------------------------------------------------------------------------------


def test_a_stream_has_the_tokens_of_generate(run, full):
    steps = list(run.stream(PROMPTS, NEW, WARM, with_logits=True))
    assert len(steps) == NEW
    for at, (tokens, logits, _) in enumerate(steps):
        assert tokens.tolist() == [g.tokens[at] for g in full]
        assert_bitwise_equal(logits, np.stack([g.logits[at] for g in full]), f"logits of step {at}")
    assert all(step[1:] == (None, None) for step in run.stream(PROMPTS, 2, WARM))


def test_seeds_are_counted_by_default(run, full):
    assert [g.tokens for g in run.generate(PROMPTS, NEW, WARM, seeds=[0, 1])] == [g.tokens for g in full]
    other = run.generate(PROMPTS, NEW, WARM, seeds=[0, 2**32 - 1])
    assert other[0].tokens == full[0].tokens
    assert other[1].tokens != full[1].tokens


def test_greedy_needs_no_seed(run):
    one, other = (run.generate(PROMPTS, 3, seeds=seeds) for seeds in ([0, 1], [7, 8]))
    assert one == other


def test_rows_that_fill_up_a_data_parallel_mesh_do_not_show():
    run = generator(dp=2, pack=False)
    steps = list(run.stream(prompts(5, 3, 4), 2, with_logits=True))
    assert [(step.tokens.shape, step.logits.shape) for step in steps] == [((3,), (3, SMALL.vocab_size))] * 2


# Log-probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.invariance
def test_a_rollouts_log_probabilities_are_the_trainers():
    """Decoding on three ranks, and one full-sequence forward on a mesh of 2 x 2, whose losses a trainer takes."""
    given = prompts(5, 3, 9, 4)
    rollout = generator(tp=3).generate(given, NEW, WARM, with_log_probs=True)
    sequences = [[*g.prompt, *g.tokens] for g in rollout]
    scored = generator(tp=2, dp=2, pack=False).log_probs(sequences)
    for g, of_all in zip(rollout, scored, strict=True):
        assert_bitwise_equal(of_all[len(g.prompt) - 1 :], g.log_probs)
    (logits,) = generator(tp=3).score(sequences[:1])
    wide = logits[:-1].astype(np.float64)
    chosen = np.take_along_axis(wide, np.array(sequences[0])[1:, None], -1)[:, 0]
    wide -= wide.max(-1, keepdims=True)
    want = chosen - logits[:-1].max(-1) - np.log(np.exp(wide).sum(-1))
    np.testing.assert_allclose(scored[0], want, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_twin_plain_log_probabilities_differ():
    given = prompts(5, 3, 9, 4)
    rollout = generator(tp=2, numerics=Numerics.plain()).generate(given, NEW, WARM, with_log_probs=True)
    scored = generator(numerics=Numerics.plain()).log_probs([[*g.prompt, *g.tokens] for g in rollout])
    assert any((bits(s[len(g.prompt) - 1 :]) != bits(g.log_probs)).any() for g, s in zip(rollout, scored, strict=True))


# Packing -------------------------------------------------------------------------------------------------------------


def test_one_model_serves_two_generators():
    mesh = make_mesh()
    model = load(SMALL, RandomSource(SMALL), Numerics.invariant(), mesh)
    one, other = Generator(model, mesh), Generator(model, mesh)
    assert digest(*other.score(PROMPTS)) == digest(*one.score(PROMPTS))


# Refusals ------------------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_request_is_listed(run):
    with pytest.raises(ValueError, match="generate: 5 problems") as error:
        run.generate([[], [1, 259, -1, 2.0], [0] * 36], 2, seeds=[0, 2**32, -1, 0.5])
    assert str(error.value) == (
        "generate: 5 problems\n"
        "  - prompt 0 is empty; give at least one token (a BOS token, say)\n"
        "  - prompt 1: token ids are integers in 0..258; these are not: [259, -1, 2.0]\n"
        "  - prompt 2 has 36 tokens and 2 more are asked for; the model's context is 37\n"
        "  - 4 seeds for 3 prompts\n"
        "  - seeds are integers in 0..2**32-1; these are not: [4294967296, -1, 0.5]"
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: run.generate([], 1), "generate: 1 problem\n  - no prompts$"),
        (lambda run: run.generate([[1]], -1), "max_new_tokens = -1 is negative"),
        (lambda run: run.stream([[]], 1), "prompt 0 is empty"),
        (lambda run: run.score([[0] * 38]), "score: 1 problem\n  - prompt 0 has 38 tokens and 0 more are asked for"),
        (lambda run: run.score_in_chunks([[259]], 0), "score_in_chunks: 2 problems\n  - prompt 0: token ids"),
        (lambda run: run.score_in_chunks([[1]], 0), "chunk = 0; it is at least 1"),
    ],
)
def test_refused_at_the_call(run, call, message):
    with pytest.raises(ValueError, match=message):
        call(run)


def test_mesh_sizes():
    assert make_mesh(tp=3, dp=2).shape == {"dp": 2, "tp": 3}
    with pytest.raises(ValueError, match="tp = 0, dp = 1; both are at least 1"):
        make_mesh(tp=0)
    count = jax.device_count()
    with pytest.raises(
        ValueError, match=rf"dp 2 x tp {count} wants {2 * count} devices, and there are {count} \(cpu\)"
    ):
        make_mesh(tp=count, dp=2)


def test_a_generator_wants_the_mesh_of_its_model():
    model = load(SMALL, RandomSource(SMALL), Numerics.invariant(), make_mesh(tp=2))
    with pytest.raises(ValueError, match="loaded for 2 tensor-parallel ranks, and the mesh has 4"):
        Generator(model, make_mesh(tp=4))
    with pytest.raises(ValueError, match=r"the mesh has axes \('tp',\); one must be 'dp', of size 1 if need be"):
        Generator(model, Mesh(np.array(jax.devices()[:2]), ("tp",)))
