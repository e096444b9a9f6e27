"""Loading: the right block in every slot of every device, and a refusal before a wrong one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from tbik_jax import Contract
from tbik_jax.engine import make_mesh
from tbik_jax.models.huggingface import HuggingFaceSource
from tbik_jax.models.layout import IDLE
from tbik_jax.models.loading import load
from tbik_jax.models.random import RandomSource
from tbik_jax.models.source import expected_tensors
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal
from tests.generators import SMALL
from tests.models.checkpoints import llama_json, write_folder

INVARIANT = Numerics.invariant()
#: Everything that a model may have; 263 entries leave the last leaf of the vocabulary short.
RICH = dataclasses.replace(
    SMALL, attention_bias=True, mlp_bias=True, qk_norm=True, tie_word_embeddings=False, vocab_size=263
)
#: What a folder says of SMALL.
SMALL_JSON = llama_json(
    vocab_size=SMALL.vocab_size,
    hidden_size=SMALL.hidden_size,
    intermediate_size=SMALL.intermediate_size,
    num_hidden_layers=SMALL.num_layers,
    num_attention_heads=SMALL.num_heads,
    num_key_value_heads=SMALL.num_kv_heads,
    head_dim=SMALL.head_dim,
    max_position_embeddings=SMALL.max_position_embeddings,
    tie_word_embeddings=True,
)


class Tensors:
    """A source over arrays in memory; ``changes`` replaces tensors, None removes one."""

    def __init__(self, config=RICH, **changes: Any) -> None:
        source = RandomSource(config)
        self.tensors = {name: source.read(name) for name in source.names()} | {
            name.replace("__", "."): value for name, value in changes.items()
        }
        self.tensors = {name: value for name, value in self.tensors.items() if value is not None}
        self.reads: list[str] = []

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        self.reads.append(name)
        return self.tensors[name][start:stop].copy()


def parameters(model: Transformer) -> dict[str, nnx.Variable[Any]]:
    """Parameters by the name of their first tensor."""
    state = nnx.split(model)[1]
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return {leaf.get_metadata()["origin"].tensors[0]: leaf for leaf in leaves}


# Values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp, dp", [(1, 1), (3, 2), (8, 1)])
def test_every_slot_of_every_device(tp, dp):
    mesh, source = make_mesh(tp, dp), Tensors()
    seen = set()
    for parameter in parameters(load(RICH, source, INVARIANT, mesh)).values():
        origin, value = parameter.get_metadata()["origin"], parameter[...]
        whole = np.stack([source.tensors[name] for name in origin.tensors])
        seen.update(origin.tensors)
        for shard in value.addressable_shards:
            data = np.asarray(shard.data) if origin.stacked else np.asarray(shard.data)[None]
            if origin.cut == "whole":
                assert_bitwise_equal(data, whole, origin.tensors[0])
                continue
            (rank,) = np.argwhere(mesh.devices == shard.device)[:, 1]
            slots = len(origin.slots) // tp
            assert data.shape[:2] == (len(whole), slots), "a device holds its own slots and no other"
            for slot, block in enumerate(origin.slots[rank * slots : (rank + 1) * slots]):
                if block == IDLE:
                    want = np.zeros_like(data[:, slot])
                else:
                    at = slice(block * origin.width, (block + 1) * origin.width)
                    want = whole[:, :, at] if origin.cut == "columns" else whole[:, at]
                short = data.shape[2] - want.shape[1] if origin.cut == "rows" else 0
                want = np.pad(want, [(0, 0), (0, short), *[(0, 0)] * (want.ndim - 2)])
                assert_bitwise_equal(data[:, slot], want, f"{origin.tensors[0]}, rank {rank}, slot {slot}")
    assert seen == set(expected_tensors(RICH))


def test_what_a_device_holds_shrinks_with_the_mesh():
    def split_bytes(tp: int) -> set[int]:
        model = parameters(load(SMALL, RandomSource(SMALL), INVARIANT, make_mesh(tp))).values()
        held: dict[Any, int] = dict.fromkeys(jax.devices()[:tp], 0)
        for parameter in model:
            if parameter.get_metadata()["origin"].cut != "whole":
                for shard in parameter[...].addressable_shards:
                    held[shard.device] += shard.data.nbytes
        return set(held.values())

    (one,), (five,) = split_bytes(1), split_bytes(5)
    # Two of ten query heads, one of two KV heads in two slots, two of eight leaves of the others.
    assert one / 5 < five < one / 3


def test_rounding_to_bfloat16():
    model = parameters(load(SMALL, RandomSource(SMALL), INVARIANT, make_mesh(), dtype="bfloat16"))
    name = "model.layers.0.mlp.down_proj.weight"
    want = np.stack([RandomSource(SMALL).read(n) for n in model[name].get_metadata()["origin"].tensors])
    want = want.astype(ml_dtypes.bfloat16)
    found = np.asarray(model[name][...])
    assert_bitwise_equal(np.moveaxis(found, 1, 2).reshape(want.shape), want, name)


def test_a_folder_and_memory_give_the_same_parameters(tmp_path):
    write_folder(tmp_path, SMALL_JSON, Tensors(SMALL).tensors, shards=3)
    folder = HuggingFaceSource(tmp_path)
    found, want = (
        parameters(load(config, source, INVARIANT, make_mesh(3)))
        for config, source in ((folder.config, folder), (SMALL, RandomSource(SMALL)))
    )
    assert found.keys() == want.keys()
    assert_bitwise_equal({n: p[...] for n, p in found.items()}, {n: p[...] for n, p in want.items()}, "parameters")


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_narrow_storage_is_widened_exactly(tmp_path, stored):
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = {name: tensor.astype(stored) for name, tensor in Tensors(SMALL).tensors.items()}
    write_folder(tmp_path, SMALL_JSON, tensors)
    model = parameters(load(SMALL, HuggingFaceSource(tmp_path), INVARIANT, make_mesh()))
    found = np.asarray(model["model.layers.0.self_attn.q_proj.weight"][...])[1]
    assert_bitwise_equal(found.reshape(tensors[name].shape), tensors[name].astype(np.float32), name)


# Progress ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, RICH], ids=["tied", "untied"])
def test_progress_counts_every_tensor_once(config):
    calls = []
    load(config, RandomSource(config), INVARIANT, make_mesh(3), progress=lambda *call: calls.append(call))
    total = len(expected_tensors(config))
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_columns_are_read_once_for_all_ranks():
    source = Tensors(SMALL)
    load(SMALL, source, INVARIANT, make_mesh(8))
    assert source.reads.count("model.layers.0.mlp.down_proj.weight") == 1


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(source: Any, mesh: Mesh | None = None, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"problems?\n") as error:
        load(RICH, source, INVARIANT, mesh or make_mesh(3), **options)
    return str(error.value)


def test_missing_tensors_before_anything_is_read():
    source = Tensors(model__norm__weight=None, model__layers__1__mlp__up_proj__bias=None)
    assert refused(source) == (
        "weights: 2 problems\n"
        "  - model.layers.1.mlp.up_proj.bias [80] is missing\n"
        "  - model.norm.weight [48] is missing"
    )
    assert source.reads == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_name_their_tensors_once(value):
    tensors = Tensors().tensors
    names = [
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    source = Tensors()
    for name in names:
        bad = tensors[name].copy()
        bad[..., ::3] = value  # in many slots, on every rank
        source.tensors[name] = bad
    head, *lines = refused(source).splitlines()
    assert head == "loading: 4 problems"
    ending = "has values that are not finite; the file is damaged, or training diverged"
    assert sorted(lines) == sorted(f"  - {name} {ending}" for name in names)


def test_not_finite_in_bfloat16():
    bad = Tensors().tensors["lm_head.weight"].astype(ml_dtypes.bfloat16)
    bad[-1, -1] = np.nan
    assert "  - lm_head.weight has values that are not finite" in refused(Tensors(lm_head__weight=bad))


def test_a_mesh_and_a_dtype_that_do_not_fit_are_listed_before_anything_is_read():
    source = Tensors()
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "model"))
    assert refused(source, mesh, dtype="float16") == (
        "loading: 2 problems\n"
        "  - the mesh has axes ('data', 'model'); one must be 'tp'\n"
        "  - dtype float16; use float32 or bfloat16"
    )
    assert source.reads == []


def test_a_mesh_larger_than_the_leaves():
    source = Tensors()
    with pytest.raises(ValueError, match="4 tensor-parallel ranks, but the 263 vocabulary entries have 2 leaves"):
        load(RICH, source, Numerics.invariant(Contract(leaves=2)), make_mesh(4))
    assert source.reads == []
