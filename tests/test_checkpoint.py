"""A checkpoint is the model's, not a mesh's: saved on one mesh, restored on another, the bits stay."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tbik_jax import checkpoint
from tbik_jax.contract import Contract, ContractMismatchError
from tbik_jax.engine.generate import Generator, make_mesh
from tbik_jax.models.linear import Packed
from tbik_jax.models.loading import load
from tbik_jax.models.random import TINY, RandomSource
from tbik_jax.models.source import expected_tensors
from tbik_jax.numerics import Numerics
from tbik_jax.testing import assert_bitwise_equal, bits, digest

# 10 query heads on 2 KV heads (copied where ranks share one), 259 vocabulary entries in leaves of 33 (the last ragged).
TIED = dataclasses.replace(TINY, hidden_size=40, intermediate_size=96, num_layers=2, head_dim=4)
# Every parameter that there can be.
FULL = dataclasses.replace(
    TIED, tie_word_embeddings=False, attention_bias=True, mlp_bias=True, qk_norm=True, hidden_size=42, num_layers=1
)
PROMPTS = [[1, 200, 258, 7], [5]]


@functools.cache
def loaded(config, ranks, dtype="float32", contract=None):
    """Loaded on that mesh, without a checkpoint. Do not change it."""
    return load(config, RandomSource(config), Numerics.invariant(contract), make_mesh(ranks), dtype=dtype)


def parameters(model):
    """Every parameter as the mesh holds it, slot by slot."""
    return nnx.to_pure_dict(nnx.split(model)[1])


def logits(model, mesh):
    return digest(*Generator(model, mesh, pack=False).score(PROMPTS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of TIED, written on three ranks. Do not change it."""
    path = tmp_path_factory.mktemp("checkpoints") / "saved"
    checkpoint.save(path, loaded(TIED, 3), make_mesh(3))
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path, change):
    """Change the JSON item of a checkpoint."""
    file = path / "model" / "metadata"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def flip_a_bit(path):
    largest = max((path / "parameters").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.invariance
@pytest.mark.parametrize(
    "config, dtype, here, there",
    [
        (TIED, "float32", 1, 3),
        pytest.param(FULL, "bfloat16", 8, 3, marks=pytest.mark.slow),
    ],
)
def test_saved_on_one_mesh_and_restored_on_another(tmp_path, config, dtype, here, there):
    model = loaded(config, here, dtype)
    info = checkpoint.save(tmp_path / "c", model, make_mesh(here))
    restored = checkpoint.restore(tmp_path / "c", make_mesh(there))
    assert restored.config == config and restored.dtype == dtype and restored.layout.ranks == there
    # Idle slots and copies included, it is what the loader puts there, which knows nothing of checkpoints.
    assert_bitwise_equal(parameters(restored), parameters(loaded(config, there, dtype)))
    assert info == checkpoint.read_metadata(tmp_path / "c")
    assert info.digest == checkpoint.parameter_digest(model) == checkpoint.parameter_digest(restored)
    assert logits(restored, make_mesh(there)) == logits(model, make_mesh(here))


@pytest.mark.invariance
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_every_bit_pattern_survives(tmp_path, rng, dtype):
    """NaNs with their payloads, infinities, signed zeros, subnormal numbers."""
    model = load(FULL, RandomSource(FULL), Numerics.invariant(), make_mesh(1), dtype=dtype)
    for variable in jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        kind = bits(np.zeros(0, dtype)).dtype
        random = rng.integers(0, np.iinfo(kind).max, variable.shape, kind, endpoint=True)
        if FULL.vocab_size in expected_tensors(FULL)[variable.get_metadata()["origin"].tensors[0]]:
            random.reshape(-1, FULL.hidden_size)[FULL.vocab_size :] = 0  # the ragged last leaf
        values = random.view(dtype)
        values.flat[:4] = np.array([-0.0, np.nan, -np.inf, np.finfo(np.float32).tiny / 2], dtype)
        variable[...] = jax.device_put(values, variable[...].sharding)
    checkpoint.save(tmp_path / "a", model, make_mesh(1))
    middle = checkpoint.restore(tmp_path / "a", make_mesh(4))
    checkpoint.save(tmp_path / "b", middle, make_mesh(4))
    assert_bitwise_equal(parameters(checkpoint.restore(tmp_path / "b", make_mesh(1))), parameters(model))


@pytest.mark.invariance
def test_what_is_stored_does_not_know_the_mesh(tmp_path, saved):
    """Plain Orbax finds Hugging Face's tensors, the layers of a part stacked."""
    path = tmp_path / "two"
    checkpoint.save(path, loaded(TIED, 2), make_mesh(2))
    source, names = RandomSource(TIED), sorted(RandomSource(TIED).names())
    expected = {}
    for name in names:
        if not name.startswith("model.layers."):
            expected[name] = source.read(name)
        elif name.startswith("model.layers.0."):
            part = name.removeprefix("model.layers.0.")
            layers = [source.read(f"model.layers.{i}.{part}") for i in range(TIED.num_layers)]
            expected[f"model.layers.{part}"] = np.stack(layers)
    for folder in (saved, path):
        with ocp.StandardCheckpointer() as plain:
            stored = plain.restore(folder / "parameters", {name: np.zeros_like(x) for name, x in expected.items()})
        assert_bitwise_equal(stored, expected)


@pytest.mark.invariance
def test_data_parallel_axes_hold_copies(tmp_path):
    contract = Contract(leaves=4, tree=(4,), kv_block=64)
    mesh = make_mesh(2, dp=2)
    model = load(TIED, RandomSource(TIED), Numerics.invariant(contract), mesh)
    checkpoint.save(tmp_path / "c", model, mesh)
    restored = checkpoint.restore(tmp_path / "c", make_mesh(4, dp=3))
    assert restored.numerics == Numerics.invariant(contract)
    assert checkpoint.parameter_digest(restored) == checkpoint.parameter_digest(loaded(TIED, 3))
    assert_bitwise_equal(parameters(restored), parameters(loaded(TIED, 4, contract=contract)))


def test_the_digest_sees_one_bit():
    model = load(TIED, RandomSource(TIED), Numerics.invariant(), make_mesh(1))
    before = checkpoint.parameter_digest(model)
    norms = model.blocks.mlp_norm
    flipped = bits(norms[...]).copy()
    flipped[1, 7] ^= 1
    norms[...] = jnp.asarray(flipped.view(np.float32))
    assert checkpoint.parameter_digest(model) != before


@pytest.mark.invariance
def test_another_dtype_rounds_as_the_loader_does(saved):
    restored = checkpoint.restore(saved, make_mesh(2), dtype="bfloat16")
    assert restored.dtype == "bfloat16"
    assert_bitwise_equal(parameters(restored), parameters(loaded(TIED, 2, "bfloat16")))


def test_plain_numerics(saved):
    """The same parameters in ordinary arithmetic: near, and not the same bits."""
    mesh = make_mesh(3)
    plain = checkpoint.restore(saved, mesh, numerics=Numerics.plain())
    assert plain.numerics == Numerics.plain()
    assert_bitwise_equal(parameters(plain), parameters(loaded(TIED, 3)))
    got, *_ = Generator(plain, mesh).score(PROMPTS)
    want, *_ = Generator(loaded(TIED, 3), mesh, pack=False).score(PROMPTS)
    assert (bits(got) != bits(want)).any()
    # float32, two layers: some hundred roundings of 6e-8, relative to logits of about 1.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_restored_model_is_saved_and_packed_as_any(saved, tmp_path):
    mesh = make_mesh(2)
    restored = checkpoint.restore(saved, mesh)
    assert checkpoint.save(tmp_path / "again", restored, mesh) == checkpoint.read_metadata(saved)
    Generator(restored, mesh)
    assert any(
        isinstance(x, Packed) for x in jax.tree.leaves(nnx.state(restored), is_leaf=lambda x: isinstance(x, Packed))
    )


# Metadata ------------------------------------------------------------------------------------------------------------


def test_metadata(saved):
    info = checkpoint.read_metadata(str(saved))
    assert info.config == TIED and info.contract == Contract() and info.dtype == "float32"
    assert info.format_version == checkpoint.FORMAT_VERSION == 1
    assert info.package_version.count(".") == 2
    assert info.digests.keys() == {
        n.replace(".layers.0.", ".layers.") for n in expected_tensors(TIED) if ".1." not in n
    }
    assert info.digest == checkpoint.parameter_digest(loaded(TIED, 1))


# Nothing half-written -----------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_nothing_to_restore(tmp_path, monkeypatch):
    path, model, mesh = tmp_path / "c", loaded(TIED, 1), make_mesh(1)
    finalize = ocp.CompositeCheckpointHandler.finalize

    def interrupted(*args):
        finalize(*args)  # all files are written, and only the last rename is to come
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CompositeCheckpointHandler, "finalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, model, mesh)
    (rest,) = tmp_path.iterdir()
    assert rest.name == "c.orbax-checkpoint-tmp" and (rest / "parameters").is_dir()
    with pytest.raises(ValueError, match="nothing is there"):
        checkpoint.restore(path, mesh)
    with pytest.raises(ValueError, match=re.escape("its item 'model' cannot be read")):
        checkpoint.restore(rest, mesh)
    checkpoint.save(path, model, mesh)
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.parameter_digest(checkpoint.restore(path, mesh)) == checkpoint.parameter_digest(model)


def test_overwriting(tmp_path, copy, monkeypatch):
    other = dataclasses.replace(TIED, num_layers=1)
    model, mesh = loaded(other, 1), make_mesh(1)
    mine = [tmp_path / "copy.old", tmp_path / "copy.new"]
    for folder in mine:
        folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(copy, model, mesh, overwrite=True)
    assert checkpoint.read_metadata(copy).config == TIED
    checkpoint.save(copy, model, mesh, overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted([copy, *mine])
    assert checkpoint.parameter_digest(checkpoint.restore(copy, mesh)) == checkpoint.parameter_digest(model)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_save_refuses(tmp_path, saved, monkeypatch):
    model, mesh = loaded(TIED, 3), make_mesh(3)
    with pytest.raises(ValueError, match=re.escape(f"{saved} exists; choose another path, or give overwrite=True")):
        checkpoint.save(saved, model, mesh)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(ValueError, match="mine is no checkpoint; overwrite=True replaces nothing else"):
        checkpoint.save(tmp_path / "mine", model, mesh, overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    packed = checkpoint.restore(saved, mesh)
    packed.pack(mesh)
    with pytest.raises(ValueError, match=r"checkpoint\.save: 2 problems") as error:
        checkpoint.save(tmp_path / "c", packed, make_mesh(2))
    assert "the model is packed for inference, and packed weights have no stored form" in str(error.value)
    assert "the mesh is {'dp': 1, 'tp': 2}, and the model is laid out for 3 ranks of 'tp'" in str(error.value)
    with pytest.raises(ValueError, match=r"parameter_digest: 1 problem\n.*Do this before model\.pack"):
        checkpoint.parameter_digest(packed)
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(NotImplementedError, match="2 processes; checkpoints are for the devices of one process"):
        checkpoint.save(tmp_path / "c", model, mesh)
    with pytest.raises(NotImplementedError, match="2 processes"):
        checkpoint.restore(saved, mesh)


def test_restore_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/no: 1 problem\n  - nothing is there; give the folder that"):
        checkpoint.restore(tmp_path / "no", make_mesh(1))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a checkpoint of tbik_jax, which has the items 'model' and 'parameters'"):
        checkpoint.restore(tmp_path, make_mesh(1))


def test_restore_refuses_another_contract(saved):
    asked = Contract(leaves=16, kv_block=64)
    for numerics in (Numerics.invariant(asked), Numerics.plain(asked)):
        with pytest.raises(ContractMismatchError) as error:
            checkpoint.restore(saved, make_mesh(1), numerics=numerics)
        assert "  - leaves: stored 8, asked 16\n  - kv_block: stored 128, asked 64\n" in str(error.value)
        assert "tree" not in str(error.value)


def test_restore_refuses_meshes_and_dtypes(saved):
    with pytest.raises(ValueError, match="9 tensor-parallel ranks, but the 96 feed-forward columns have 8 leaves"):
        checkpoint.restore(saved, make_mesh(9))
    with pytest.raises(ValueError, match=r"the mesh has axes \('x',\); one must be 'tp'\n.*dtype float16; use float32"):
        checkpoint.restore(saved, jax.make_mesh((2,), ("x",)), dtype="float16")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda d: d.update(format_version=2),
            r"format version 2; this tbik-jax, .*, reads version 1. Install the one",
        ),
        (lambda d: d.pop("format_version"), "no format_version; tbik_jax did not write it"),
        (lambda d: d.update(step=1), "has the fields .*'step'.*, not "),
        (lambda d: d.pop("digests"), "has the fields .*, not .*'digests'"),
        (lambda d: d["contract"].update(version=2), "version = 2, but this package implements version 1 only"),
        (lambda d: d["contract"].update(rounds=1), "field 'rounds' = 1 is unknown here; install the tbik-jax release"),
        (
            lambda d: d.update(dtype="int4", config=[]),
            "2 problems\n  - config: .*\n  - dtype 'int4' is neither float32 nor",
        ),
        (lambda d: d["config"].update(experts=8), "experts = 8 is not a field of ModelConfig"),
        (lambda d: d["config"].update(num_heads=9), "num_heads = 9 is not a multiple of num_kv_heads = 2"),
        (
            lambda d: d.update(dtype="bfloat16"),
            r"norm.weight is float32 \[40\]; the configuration asks for bfloat16 \[40\]",
        ),
        (
            lambda d: d["config"].update(head_dim=8),
            r"q_proj.weight is float32 \[2, 40, 40\]; .* for float32 \[2, 80, 40\]",
        ),
        (lambda d: d["config"].update(qk_norm=True), "model.layers.self_attn.k_norm.weight is missing"),
        (lambda d: d["digests"].pop("model.norm.weight"), "model.norm.weight is missing"),
    ],
)
def test_restore_refuses_metadata(copy, change, message):
    edit(copy, change)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.restore(copy, make_mesh(1))
    assert str(copy) in str(error.value)


def test_restore_refuses_arrays_that_nobody_reads(tmp_path):
    checkpoint.save(tmp_path / "c", loaded(FULL, 1), make_mesh(1))
    edit(tmp_path / "c", lambda d: d["config"].update(qk_norm=False, tie_word_embeddings=True))
    with pytest.raises(ValueError, match="3 problems") as error:
        checkpoint.restore(tmp_path / "c", make_mesh(1))
    for name in ("lm_head", "model.layers.self_attn.k_norm", "model.layers.self_attn.q_norm"):
        assert f"{name}.weight is not part of this architecture; it would be ignored" in str(error.value)


def test_one_flipped_bit_is_found(tmp_path):
    """By the digest and nothing else: Orbax reads it without complaint."""
    path = tmp_path / "c"
    model = load(TIED, RandomSource(TIED), Numerics.invariant(), make_mesh(1))
    checkpoint.save(path, model, make_mesh(1))
    # Random mantissas do not compress, so that most of the file is the numbers themselves.
    flip_a_bit(path)
    with pytest.raises(
        ValueError, match=r"1 problem\n  - model.* has not the bits that were saved: its file is damaged"
    ):
        checkpoint.restore(path, make_mesh(3))
    unverified = checkpoint.restore(path, make_mesh(3), verify=False)
    assert checkpoint.parameter_digest(unverified) != checkpoint.parameter_digest(model)


@pytest.mark.parametrize("damage", ["model/metadata", "parameters/_METADATA", "parameters/manifest.ocdbt"])
def test_damaged_files(copy, damage):
    file = copy / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    item = damage.split("/")[0]
    with pytest.raises(ValueError, match=f"its item '{item}' cannot be read: the files are damaged or incomplete"):
        checkpoint.restore(copy, make_mesh(1))
