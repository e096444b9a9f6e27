"""Other models, contracts, dtypes and exchanges, each with one set of bits on all of its meshes."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tbik_jax import Contract
from tbik_jax.collectives import Algorithm
from tbik_jax.engine import Generator, make_mesh
from tbik_jax.models.layout import IDLE
from tbik_jax.models.loading import load
from tbik_jax.models.random import RandomSource
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal, digest
from tests.generators import BIASED, SMALL, generator, prompts, smollm2

pytestmark = pytest.mark.invariance

PROMPTS = prompts(5, 140, 23)
INVARIANT = Numerics.invariant()
#: Eight leaves in each dimension: every power-of-two mesh has one tree node per rank.
EIGHT_HEADS = dataclasses.replace(SMALL, num_heads=8, num_kv_heads=4)


# Exchanges and dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in get_args(Algorithm) if name not in ("auto", "direct")])
def test_every_collective(algorithm):
    want = generator(EIGHT_HEADS, 1, numerics=INVARIANT, pack=False).score(PROMPTS)
    run = generator(EIGHT_HEADS, 4, numerics=Numerics.invariant(algorithm=algorithm), pack=False)
    assert_bitwise_equal(run.score(PROMPTS), want, algorithm)


@pytest.mark.slow
def test_few_rows_need_no_reach_to_peers():
    """``direct`` leaves them to ``auto`` where ranks are emulated, or on CPUs; many rows are refused there."""
    numerics = Numerics.invariant(algorithm="direct")
    want = generator(EIGHT_HEADS, 1, numerics=INVARIANT, pack=False).generate(PROMPTS[:1], 3, with_logits=True)
    for run in (
        generator(EIGHT_HEADS, 4, numerics=numerics, pack=False),
        generator(EIGHT_HEADS, 4, numerics=numerics, pack=False, emulate=True),
    ):
        got = run.generate(PROMPTS[:1], 3, with_logits=True)
        assert_bitwise_equal(got[0].logits, want[0].logits, "few rows")
        with pytest.raises(NotImplementedError, match="algorithm 'direct': GPUs read each other's memory"):
            run.score([[1] * 250, [2] * 250])


def test_a_collective_that_the_mesh_cannot_run_is_refused():
    run = generator(tp=3, numerics=Numerics.invariant(algorithm="butterfly"), pack=False)
    with pytest.raises(ValueError, match="algorithm 'butterfly' wants a power of two of ranks"):
        run.score(PROMPTS)


@pytest.mark.slow
def test_bfloat16():
    want = generator(dtype="bfloat16").score(PROMPTS)
    for tp in (3, 8):
        run = generator(tp=tp, dtype="bfloat16", pack=False)
        assert_bitwise_equal(run.score(PROMPTS), want, f"logits on {tp} ranks")
    assert_bitwise_equal(run.score_in_chunks(PROMPTS, 7), want, "logits by chunks of 7 on 8 ranks")


# Contracts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_tree_has_bits_of_its_own():
    found = {}
    for tree in ((2,), (8,), (4, 2)):
        numerics = Numerics.invariant(Contract(tree=tree))
        want = generator(EIGHT_HEADS, 1, numerics=numerics, pack=False).score(PROMPTS)
        for tp in (3, 8):
            run = generator(EIGHT_HEADS, tp, numerics=numerics, pack=False)
            assert_bitwise_equal(run.score(PROMPTS), want, f"tree {tree} on {tp} ranks")
        found[tree] = digest(*want)
    assert len(set(found.values())) == 3, f"the shape of the tree does not matter: {found}"


# Architectures -------------------------------------------------------------------------------------------------------

QWEN3 = dataclasses.replace(
    SMALL,
    architecture="qwen3",
    num_heads=16,
    num_kv_heads=8,
    intermediate_size=96,
    qk_norm=True,
    tie_word_embeddings=False,
    vocab_size=263,
)


@pytest.mark.slow
def test_qwen3_on_up_to_sixteen_ranks_with_an_untied_head_and_a_ragged_vocabulary():
    numerics = Numerics.invariant(Contract(leaves=16))
    want = generator(QWEN3, numerics=numerics).score(PROMPTS)
    for tp in (5, 16):
        run = generator(QWEN3, tp, numerics=numerics, pack=False)
        assert_bitwise_equal(run.score(PROMPTS), want, f"logits on {tp} ranks")
    assert_bitwise_equal(run.score_in_chunks(PROMPTS, 7), want, "logits by chunks of 7 on 16 ranks")


def test_biases():
    want = generator(BIASED).score(PROMPTS)
    assert_bitwise_equal(generator(BIASED, 8).score(PROMPTS), want, "logits on 8 ranks")


@pytest.mark.slow
def test_smollm2():
    model = smollm2()
    ids = model.tokenizer.encode("Tree-based kernels give the same bits on every mesh")[:8]
    assert len(ids) == 8
    found = {}
    for tp in (1, 3):
        mesh = make_mesh(tp)
        run = Generator(load(model.config, model.source, INVARIANT, mesh), mesh, pack=False)
        found[tp] = run.score([ids])
    assert_bitwise_equal(found[3], found[1], "logits on 3 ranks")


# Idle slots ----------------------------------------------------------------------------------------------------------


def poison_idle_slots(model: Transformer) -> tuple[Transformer, set[str]]:
    """NaN in every slot that holds nothing and every row behind the vocabulary; also the names of what was hit."""
    hit = set()

    def poisoned(parameter: nnx.Variable[Any]) -> nnx.Variable[Any]:
        origin, value = parameter.get_metadata()["origin"], parameter[...]
        if origin.cut == "whole":
            return parameter
        idle = np.zeros(value.shape, bool)
        by_slot = np.moveaxis(idle, 1, 0) if origin.stacked else idle
        for slot, block in enumerate(origin.slots):
            by_slot[slot] = block == IDLE
            if origin.tensors == ("model.embed_tokens.weight",) and block != IDLE:
                by_slot[slot, max(0, model.config.vocab_size - block * origin.width) :] = True
        if idle.any():
            hit.add(origin.tensors[0].removeprefix("model.layers.0."))
        return parameter.replace(jax.device_put(jnp.where(idle, jnp.nan, value), value.sharding))

    graph, state = nnx.split(model)
    state = jax.tree.map(poisoned, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, state), hit


HEADS = {"self_attn.q_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.bias"}
KV_HEADS = {f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")}
MLP = {f"mlp.{part}" for part in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "tp, pack, hit", [(3, False, HEADS | KV_HEADS), (3, True, HEADS | KV_HEADS), (5, False, KV_HEADS)]
)
def test_nothing_reads_an_idle_slot(tp, pack, hit):
    mesh = make_mesh(tp)
    model, poisoned = poison_idle_slots(load(BIASED, RandomSource(BIASED), INVARIANT, mesh))
    assert poisoned == hit | MLP | {"mlp.down_proj.weight", "model.embed_tokens.weight"}
    run = Generator(model, mesh, pack=pack)
    want = generator(BIASED).score(PROMPTS)
    assert np.isfinite(np.concatenate(want)).all()
    # Through the cache, too: it then holds NaN in its own idle slots.
    found = run.score_in_chunks(PROMPTS, 7) if tp == 3 else run.score(PROMPTS)
    assert_bitwise_equal(found, want, "logits with NaN in idle slots")
