"""Checkpoints that any mesh restores with the same bits: arrays as the model is defined, not as a mesh holds it.

On a mesh, a parameter lies in slots: padded where ranks hold unequal shares, copied where two ranks read one KV head. A
checkpoint holds the parameter itself, in Hugging Face's shape with the layers of a part stacked in front, and beside it
the configuration, the contract, and a digest of every array. It is an ordinary Orbax checkpoint of two items, the JSON
``model`` and the arrays ``parameters``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

import tbik_jax
from tbik_jax._problems import Problems
from tbik_jax.contract import Contract
from tbik_jax.kernels.exact import cast
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.linear import TENSOR, Origin, Packed
from tbik_jax.models.loading import abstract, check_mesh
from tbik_jax.models.source import expected_tensors
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics
from tbik_jax.testing import digest

Array = jax.Array
Variable = nnx.Variable[Any]

#: Names, shapes and meaning of what is stored. This package reads exactly one version.
FORMAT_VERSION = 1

_MODEL, _PARAMETERS = "model", "parameters"  # the two items


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself; reading it reads no array.

    Attributes:
        config: The model.
        contract: Under which it was stored; results under another have other bits.
        dtype: Of the stored parameters.
        digests: SHA-256 of every stored array, by name.
        package_version: Of the ``tbik-jax`` that wrote it.
        format_version: See :data:`FORMAT_VERSION`.
    """

    config: ModelConfig
    contract: Contract
    dtype: str
    digests: Mapping[str, str]
    package_version: str
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """What :func:`parameter_digest` gives for the stored model."""
        return _digest_of(self.digests)


def save(path: str | Path, model: Transformer, mesh: Mesh, *, overwrite: bool = False) -> CheckpointInfo:
    """Write ``model``, which lies on ``mesh``, to the new folder ``path``; returns what :func:`read_metadata` will say.

    Every device writes its part of every array. Until they have, device memory holds a second copy of the parameters.

    Guarantee: the names, shapes and bits of all stored arrays, and so their digests, depend on the model and not on the
    mesh. Nothing incomplete is ever found under ``path``: it is written beside it and renamed when done. What an
    interrupted save leaves there ends in ``.orbax-checkpoint-tmp`` (``.tbik-jax-new``, ``.tbik-jax-old`` if it was
    overwriting), and the next one clears it away.

    Args:
        overwrite: Replace a checkpoint that is already there, once the new one is complete.

    Raises:
        ValueError: something is at ``path``; the model is packed; ``mesh`` is not the model's.
        NotImplementedError: several processes.
    """
    path = _absolute(path)
    state = nnx.split(model)[1]
    replaces, ranks = path.exists(), model.layout.ranks
    with Problems("checkpoint.save") as problems:
        _check_processes(problems)
        _check_not_packed(problems, state)
        if replaces and not overwrite:
            problems.add(f"{path} exists; choose another path, or give overwrite=True")
        elif replaces:
            problems.check(_is_checkpoint(path), f"{path} is no checkpoint; overwrite=True replaces nothing else")
        problems.check(
            mesh.shape.get(TENSOR) == ranks,
            f"the mesh is {dict(mesh.shape)}, and the model is laid out for {ranks} ranks of {TENSOR!r}",
        )
    parameters, plans = _parameters(state), _plans(model.config, state, ranks)
    info = CheckpointInfo(model.config, model.numerics.contract, model.dtype, _digests(model), tbik_jax.__version__)
    stored = {name: _stored(parameters[name][...], plan, mesh) for name, plan in plans.items()}
    items = {_MODEL: ocp.args.JsonSave(_to_json(info)), _PARAMETERS: ocp.args.StandardSave(stored)}
    target = path.with_name(f"{path.name}.tbik-jax-new") if replaces else path
    with _checkpointer() as checkpointer:
        checkpointer.save(target, args=ocp.args.Composite(**items), force=replaces)
    if replaces:  # wherever this is cut short, the old checkpoint or the new one is whole, here or beside
        old = path.with_name(f"{path.name}.tbik-jax-old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        target.rename(path)
        shutil.rmtree(old)
    return info


def restore(
    path: str | Path,
    mesh: Mesh,
    *,
    numerics: Numerics | None = None,
    dtype: DTypeLike | None = None,
    verify: bool = True,
) -> Transformer:
    """The model stored at ``path``, on ``mesh``, whatever mesh it was saved on.

    Every device reads its part of every array; then one all-to-all per parameter brings the slots in place. A device
    holds its share of the model and, at the most, its share of one parameter twice.

    Guarantee: the parameters have the bits that were saved (``dtype`` None), on every mesh.

    Args:
        numerics: By default invariant under the stored contract.
        dtype: Round the parameters to it, and compute in it; by default the stored one.
        verify: Compare every parameter, as it came to lie on the mesh, with the stored digest. It takes a copy to the
            host, and a second per one or two gigabytes.

    Raises:
        ContractMismatchError: ``numerics`` has another contract than the stored one.
        ValueError: no checkpoint, one of an unknown version, or a damaged one; a mesh or dtype that does not fit.
        NotImplementedError: several processes.
    """
    with Problems("checkpoint.restore") as problems:
        _check_processes(problems)
    path = _absolute(path)
    info = read_metadata(path)
    numerics = numerics or Numerics.invariant(info.contract)
    info.contract.require(numerics.contract)
    dtype = jnp.dtype(info.dtype if dtype is None else dtype)
    check_mesh(info.config, numerics, mesh, dtype)
    graph, state = nnx.split(abstract(info.config, numerics, mesh, dtype))
    plans = _plans(info.config, state, mesh.shape[TENSOR])
    stored = _read(path, info, plans, mesh)
    with Problems(f"checkpoint.restore: {path}") as problems:

        def fill(parameter: Variable) -> Variable:
            name = _name(parameter)
            x = stored.pop(name)  # not held on to, so that it is freed as soon as its slots are there
            x = _to_slots(x, plans[name], mesh) if plans[name].slots else x
            problems.check(
                not verify or digest(plans[name].canonical(np.asarray(x))) == info.digests[name],
                f"{name} has not the bits that were saved: its file is damaged; restore another checkpoint",
            )
            return parameter.replace(x if x.dtype == dtype else _rounded(x, dtype))

        filled = jax.tree.map(fill, state, is_leaf=_is_variable)
    return nnx.merge(graph, filled)


def read_metadata(path: str | Path) -> CheckpointInfo:
    """What the checkpoint at ``path`` says of itself.

    Raises:
        ValueError: nothing is there, or no checkpoint of this package, or one that this version does not read.
    """
    path = _absolute(path)
    with Problems(f"checkpoint: {path}") as problems:
        if problems.check(path.exists(), "nothing is there; give the folder that tbik_jax.checkpoint.save wrote"):
            problems.check(
                _is_checkpoint(path),
                f"not a checkpoint of tbik_jax, which has the items {_MODEL!r} and {_PARAMETERS!r}. Hugging Face "
                "folders and GGUF files are for tbik_jax.models.open.open_model",
            )
    with _reading(path, _MODEL), _checkpointer() as checkpointer:
        data = checkpointer.restore(path, args=ocp.args.Composite(**{_MODEL: ocp.args.JsonRestore()}))[_MODEL]
    return _from_json(f"checkpoint: {path}", data)


def parameter_digest(model: Transformer) -> str:
    """SHA-256 over the names and the SHA-256 of all parameters, as they would be stored.

    Guarantee: two models have the same digest if and only if names, shapes, dtype and every bit of the parameters
    agree; the mesh does not enter.

    Raises:
        ValueError: the model is packed.
    """
    with Problems("checkpoint.parameter_digest") as problems:
        _check_not_packed(problems, nnx.split(model)[1])
    return _digest_of(_digests(model))


def _check_processes(problems: Problems) -> None:
    if jax.process_count() > 1:
        problems.unsupported(f"{jax.process_count()} processes; checkpoints are for the devices of one process")


def _check_not_packed(problems: Problems, state: Any) -> None:
    problems.check(
        not any(isinstance(v, Packed) for v in _variables(state)),
        "the model is packed for inference, and packed weights have no stored form. Do this before model.pack(), and "
        "before Generator(model, mesh), which packs unless pack=False",
    )


# One parameter, two layouts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How one parameter lies in a checkpoint, and how in a model on ``ranks`` ranks.

    ``shape`` is the stored one, and ``axis`` the dimension of it that the model cuts in slots. Between disk and model
    the array is sharded over ``carried``, a dimension that no slot cuts: each device then orders all slots of its share
    by itself, an all-to-all is the whole exchange, and no device ever holds the whole of what the model cuts. XLA
    shards evenly only, so ``carried`` is the dimension that needs the least padding to a multiple of the ranks; mostly
    none.
    """

    shape: tuple[int, ...]
    lead: int  #: 1 behind a dimension of layers, else 0; in the model, the dimension of slots.
    axis: int
    width: int
    slots: tuple[int, ...]  #: Empty if every rank holds the whole parameter.
    ranks: int

    @property
    def carried(self) -> int:
        free = [i for i in range(len(self.shape)) if i != self.axis]
        return min(free, key=lambda i: (-self.shape[i] % self.ranks / self.shape[i], -self.shape[i]))

    @property
    def carried_in_model(self) -> int:
        return self.carried + (self.carried >= self.lead)  # the slots come in front of it

    @property
    def missing(self) -> int:
        """Entries of padding that ``carried`` needs."""
        return -self.shape[self.carried] % self.ranks if self.slots else 0

    @property
    def padded(self) -> tuple[int, ...]:
        if not self.missing:
            return self.shape
        return tuple(n + self.missing * (i == self.carried) for i, n in enumerate(self.shape))

    @property
    def stored_spec(self) -> P:
        return P(*[None] * self.carried, TENSOR) if self.slots else P()

    @property
    def model_spec(self) -> P:
        return P(*[None] * self.lead, TENSOR) if self.slots else P()

    def canonical(self, x: Any) -> Any:
        """All slots, a NumPy or JAX array, in the order of the stored array: the first copy of every block."""
        if not self.slots:
            return x
        size = self.shape[self.axis]
        first = np.array([self.slots.index(block) for block in range(-(-size // self.width))])
        entry = np.arange(size)
        x = x.swapaxes(self.lead, self.axis)
        x = x.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 2 :])
        return x.take(first[entry // self.width] * self.width + entry % self.width, axis=self.axis, mode="clip")

    def to_stored(self, x: Array) -> Array:
        """On a rank: its slots, all of ``carried`` -> all entries, its share of ``carried``."""
        x = jnp.pad(x, [(0, self.missing * (i == self.carried_in_model)) for i in range(x.ndim)])
        entries: Array = self.canonical(lax.all_to_all(x, TENSOR, self.carried_in_model, self.lead, tiled=True))
        return entries

    def to_slots(self, x: Array) -> Array:
        """The inverse of :meth:`to_stored`; idle slots and entries behind the last are zeros."""
        size, blocks = self.shape[self.axis], np.array(self.slots)[:, None]
        entry = blocks * self.width + np.arange(self.width)
        entry = np.where((blocks >= 0) & (entry < size), entry, size).reshape(-1)
        x = jnp.take(x, entry, axis=self.axis, mode="fill", fill_value=0)
        x = x.reshape(*x.shape[: self.axis], len(self.slots), self.width, *x.shape[self.axis + 1 :])
        x = lax.all_to_all(x.swapaxes(self.axis, self.lead), TENSOR, self.lead, self.carried_in_model, tiled=True)
        return lax.slice_in_dim(x, 0, self.shape[self.carried], axis=self.carried_in_model)


def _plans(config: ModelConfig, state: Any, ranks: int) -> dict[str, _Plan]:
    tensors = expected_tensors(config)

    def plan(origin: Origin) -> _Plan:
        lead = int(origin.stacked)
        shape = (len(origin.tensors),) * lead + tensors[origin.tensors[0]]
        return _Plan(shape, lead, lead + (origin.cut == "columns"), origin.width, origin.slots, ranks)

    return {name: plan(v.get_metadata()["origin"]) for name, v in _parameters(state).items()}


@partial(jax.jit, static_argnums=(1, 2))
def _to_stored(x: Array, plan: _Plan, mesh: Mesh) -> Array:
    return _moved(x, jax.shard_map(plan.to_stored, mesh=mesh, in_specs=plan.model_spec, out_specs=plan.stored_spec))


@partial(jax.jit, static_argnums=(1, 2))
def _to_slots(x: Array, plan: _Plan, mesh: Mesh) -> Array:
    return _moved(x, jax.shard_map(plan.to_slots, mesh=mesh, in_specs=plan.stored_spec, out_specs=plan.model_spec))


def _moved(x: Array, move: Callable[[Array], Array]) -> Array:
    """As integers, so that no backend may touch the payload of a NaN, the sign of a zero, or a subnormal number."""
    return lax.bitcast_convert_type(move(lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")), x.dtype)


_rounded = jax.jit(cast, static_argnums=1)


def _stored(x: Array, plan: _Plan, mesh: Mesh) -> Array | np.ndarray:
    if not plan.slots:
        return x
    stored: Array = _to_stored(x, plan, mesh)
    # What is stored has no padding, and XLA cannot shard it without: it goes over the host.
    return np.asarray(stored)[tuple(map(slice, plan.shape))] if plan.missing else stored


# Names and digests ---------------------------------------------------------------------------------------------------


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _variables(state: Any) -> list[Variable]:
    return jax.tree.leaves(state, is_leaf=_is_variable)


def _name(parameter: Variable) -> str:
    """The Hugging Face name without the layer's number: all layers are one array."""
    return str(parameter.get_metadata()["origin"].tensors[0]).replace("model.layers.0.", "model.layers.")


def _parameters(state: Any) -> dict[str, Variable]:
    return {_name(v): v for v in _variables(state)}


def _digests(model: Transformer) -> dict[str, str]:
    """By NumPy from the model's slots, so that restoring also checks how the devices brought them to disk and back."""
    state = nnx.split(model)[1]
    plans = _plans(model.config, state, model.layout.ranks)
    return {name: digest(plans[name].canonical(np.asarray(v[...]))) for name, v in _parameters(state).items()}


def _digest_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


# Files ---------------------------------------------------------------------------------------------------------------


def _absolute(path: str | Path) -> Path:
    """Orbax takes no other. Links are followed, so that overwriting replaces a folder and never a link."""
    return Path(path).expanduser().resolve()


def _is_checkpoint(path: Path) -> bool:
    return (path / _MODEL).is_dir() and (path / _PARAMETERS).is_dir()


def _checkpointer() -> ocp.Checkpointer:
    handlers = {_MODEL: ocp.JsonCheckpointHandler(), _PARAMETERS: ocp.StandardCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _to_json(info: CheckpointInfo) -> dict[str, Any]:
    return {**asdict(info), "config": info.config.to_dict(), "contract": info.contract.to_dict()}


def _from_json(where: str, data: Any) -> CheckpointInfo:
    found = dict(data) if isinstance(data, Mapping) else {}
    known = {field.name for field in dataclasses.fields(CheckpointInfo)}
    with Problems(where) as problems:
        version = found.get("format_version")
        if version is None:
            problems.add(f"its item {_MODEL!r} has no format_version; tbik_jax did not write it")
        elif problems.check(
            version == FORMAT_VERSION,
            f"format version {version}; this tbik-jax, {tbik_jax.__version__}, reads version {FORMAT_VERSION}. Install "
            f"the one that wrote it, {found.get('package_version')}",
        ):
            problems.check(
                found.keys() == known, f"its item {_MODEL!r} has the fields {sorted(found)}, not {sorted(known)}"
            )
    with Problems(where) as problems:
        for field, kind in (("config", ModelConfig), ("contract", Contract)):
            try:
                found[field] = kind.from_dict(found[field])
            except (ValueError, TypeError, AttributeError) as error:
                problems.add(f"{field}: {error}".replace("\n", "\n  "))
        dtype = found["dtype"]
        problems.check(dtype in ("float32", "bfloat16"), f"dtype {dtype!r} is neither float32 nor bfloat16")
    return CheckpointInfo(**found)


@contextlib.contextmanager
def _reading(path: Path, item: str) -> Iterator[None]:
    """One error for all that Orbax and TensorStore may say of damaged files."""
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # no fault of the files
    except Exception as error:
        message = (
            f"its item {item!r} cannot be read: the files are damaged or incomplete ({type(error).__name__} above)"
        )
        raise ValueError(f"checkpoint: {path}: 1 problem\n  - {message}") from error


def _read(path: Path, info: CheckpointInfo, plans: Mapping[str, _Plan], mesh: Mesh) -> dict[str, Array]:
    """All arrays, sharded and padded by their plans."""
    dtype = jnp.dtype(info.dtype)
    with _reading(path, _PARAMETERS), _checkpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata[_PARAMETERS].tree
    # The padding wants strict=False, by which Orbax would also pad or cut an array of a wrong shape.
    with Problems(f"checkpoint: {path}") as problems:
        for name in sorted(plans.keys() | found.keys()):
            if not problems.check(name in plans, f"{name} is not part of this architecture; it would be ignored"):
                continue
            if problems.check(name in found and name in info.digests, f"{name} is missing"):
                shape, stored = list(found[name].shape), jnp.dtype(found[name].dtype)
                problems.check(
                    shape == list(plans[name].shape) and stored == dtype,
                    f"{name} is {stored} {shape}; the configuration asks for {dtype} {list(plans[name].shape)}",
                )
    target = {
        name: jax.ShapeDtypeStruct(plan.padded, dtype, sharding=NamedSharding(mesh, plan.stored_spec))
        for name, plan in plans.items()
    }
    items = {_PARAMETERS: ocp.args.StandardRestore(target, strict=False)}
    with _reading(path, _PARAMETERS), _checkpointer() as checkpointer:
        return dict(checkpointer.restore(path, args=ocp.args.Composite(**items))[_PARAMETERS])
