"""Models drawn where they lie: the same weights on every mesh."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tbik_jax.engine import Generator, make_mesh
from tbik_jax.models.drawn import QWEN3_8B, draw
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal
from tests.generators import prompts

SMALL = dataclasses.replace(
    QWEN3_8B,
    vocab_size=259,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
)


@pytest.mark.invariance
@pytest.mark.slow
def test_every_mesh_draws_the_same_model():
    texts, found = prompts(5, 11), []
    for tp, emulate in ((1, False), (3, False), (4, True)):
        mesh = make_mesh(1 if emulate else tp)
        model = draw(SMALL, Numerics.invariant(), mesh, ranks=tp if emulate else None)
        found.append(Generator(model, mesh, emulate=emulate).score(texts))
    assert_bitwise_equal(found[1], found[0], "3 ranks")
    assert_bitwise_equal(found[2], found[0], "4 emulated ranks")


def test_what_is_drawn():
    model = draw(SMALL, Numerics.invariant(), make_mesh(4), dtype="float32", seed=3)
    gate = np.asarray(model.blocks.gate_up.weights["gate_proj"][...])  # [layers, slots, width, hidden]
    assert gate.std() == pytest.approx(SMALL.hidden_size**-0.5, rel=0.05)
    assert abs(gate.mean()) < 0.01
    assert not np.array_equal(gate[0], gate[1])
    norm = np.asarray(model.blocks.mlp_norm[...])
    assert norm.mean() == pytest.approx(1, abs=0.05)
    other = draw(SMALL, Numerics.invariant(), make_mesh(1), dtype="float32", seed=4)
    assert not np.array_equal(np.asarray(other.blocks.mlp_norm[...]), norm)
    uneven = draw(SMALL, Numerics.invariant(), make_mesh(4), dtype="float32").blocks.out.weights["o_proj"]
    slots = np.array(uneven.get_metadata()["origin"].slots)
    idle = np.asarray(uneven[...])[:, slots < 0]
    assert idle.size > 0
    assert not idle.any()


def test_ranks_are_emulated_on_one_device_only():
    with pytest.raises(ValueError, match="ranks = 3 are emulated on one device, and the mesh has 2"):
        draw(SMALL, Numerics.invariant(), make_mesh(2), ranks=3)
