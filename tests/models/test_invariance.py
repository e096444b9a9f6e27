"""One model, and every way to run it: one set of bits. The twins show that plain numerics would not have it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tbik_jax.engine import Sampling
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal, digest
from tests.generators import SMALL, generator, prompts

pytestmark = pytest.mark.invariance

#: The middle one has keys in two attention blocks; padding is to the longest.
PROMPTS = prompts(5, 140, 23)
PLAIN = Numerics.plain()
#: As wide as SmolLM2: on narrow products some processors' plain dots happen to agree.
WIDE = dataclasses.replace(SMALL, hidden_size=576, intermediate_size=1536, num_layers=1)
SAMPLING, NEW = Sampling(temperature=0.8), 4
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def want() -> list[np.ndarray]:
    """The logits of one rank, all prompts in one batch, in one forward, from packed weights."""
    return generator().score(PROMPTS)


# Meshes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tp, dp", [*((tp, 1) for tp in (1, 3, 5, 8)), (2, 3), *(pytest.param(tp, 1, marks=SLOW) for tp in (2, 4, 6, 7))]
)
def test_every_mesh(want, tp, dp):
    # Unpacked here and packed in the reference: the layout of the weights is one more thing that must not show.
    assert_bitwise_equal(generator(tp=tp, dp=dp, pack=False).score(PROMPTS), want, f"logits on dp {dp} x tp {tp}")


@pytest.mark.slow
@pytest.mark.parametrize("tp, unroll", [(3, True), pytest.param(8, False, marks=pytest.mark.slow)])
def test_layers_apart(want, tp, unroll):
    """Arrays for each layer, as GPUs like them, or a stack: no bit depends on it. Nor on devices that are not there."""
    run = generator(tp=tp, unroll=unroll, emulate=True)
    assert_bitwise_equal(run.score(PROMPTS), want, f"logits of {tp} emulated ranks")
    short = [prompt[:9] for prompt in PROMPTS]
    assert_bitwise_equal(run.score_in_chunks(short, 1), [w[:9] for w in want], f"decoded by {tp} emulated ranks")


@pytest.mark.slow
def test_layers_apart_on_a_mesh(want):
    run = generator(tp=2, dp=3, unroll=True)
    assert_bitwise_equal(run.score_in_chunks(PROMPTS, 64), want, "logits by chunks on dp 3 x tp 2")
    found = [g.logits for g in run.generate(PROMPTS, NEW, SAMPLING, with_logits=True)]
    assert_bitwise_equal(found, [g.logits for g in generator().generate(PROMPTS, NEW, SAMPLING, with_logits=True)])


def test_twin_plain_numerics_differ_between_meshes():
    found = {digest(*generator(tp=tp, numerics=PLAIN, pack=False).score(PROMPTS)) for tp in (1, 3, 8)}
    assert len(found) > 1


# Prefill, chunks, decode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk, tp, dp", [pytest.param(1, 1, 1, marks=SLOW), (64, 3, 1), pytest.param(1, 8, 1, marks=SLOW), (7, 5, 2)]
)
def test_chunks(want, chunk, tp, dp):
    found = generator(tp=tp, dp=dp, pack=dp == 1).score_in_chunks(PROMPTS, chunk)
    assert_bitwise_equal(found, want, f"logits by chunks of {chunk} on dp {dp} x tp {tp}")


def test_twin_plain_numerics_differ_between_prefill_and_decode():
    run = generator(WIDE, numerics=PLAIN, pack=False)
    assert digest(*run.score(PROMPTS)) != digest(*run.score_in_chunks(PROMPTS, 1))


@pytest.fixture(scope="module")
def generated():
    return generator().generate(PROMPTS, NEW, SAMPLING, with_logits=True)


def test_generation_has_the_logits_of_a_forward(generated):
    whole = [[*g.prompt, *g.tokens] for g in generated]
    for g, logits in zip(generated, generator().score(whole), strict=True):
        assert_bitwise_equal(g.logits, logits[len(g.prompt) - 1 : -1], "logits of the steps")


@pytest.mark.slow
@pytest.mark.parametrize("tp, dp", [(3, 1), (2, 3)])
def test_generation_on_other_meshes(generated, tp, dp):
    found = generator(tp=tp, dp=dp).generate(PROMPTS, NEW, SAMPLING, with_logits=True)
    assert [g.tokens for g in found] == [g.tokens for g in generated]
    assert_bitwise_equal([g.logits for g in found], [g.logits for g in generated], f"dp {dp} x tp {tp}")


# Batches -------------------------------------------------------------------------------------------------------------


ORDER = [2, 0, 1, 1, 0, 2, 0, 1]


@pytest.mark.parametrize("i", [0, 2])
def test_alone_without_padding_to_a_neighbour(want, i):
    assert_bitwise_equal(generator(tp=3).score([PROMPTS[i]]), [want[i]], f"prompt {i} alone")


def test_larger_batch_in_another_order(want):
    found = generator(tp=3).score([PROMPTS[i] for i in ORDER])
    assert_bitwise_equal(found, [want[i] for i in ORDER], f"prompts {ORDER}")


def test_decoding_alone(want):
    assert_bitwise_equal(generator(tp=3).score_in_chunks([PROMPTS[2]], 1), [want[2]], "prompt 2 alone")


@pytest.mark.slow
def test_generation_beside_other_requests(generated):
    found = generator(tp=3).generate([PROMPTS[i] for i in ORDER], NEW, SAMPLING, seeds=ORDER, with_logits=True)
    assert [g.tokens for g in found] == [generated[i].tokens for i in ORDER]
    assert_bitwise_equal([g.logits for g in found], [generated[i].logits for i in ORDER], f"prompts {ORDER}")


def test_twin_plain_numerics_differ_between_batches():
    score = generator(WIDE, numerics=PLAIN, pack=False).score
    assert digest(*score(PROMPTS)) != digest(*(score([prompt])[0] for prompt in PROMPTS))
