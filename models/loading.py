"""Fill a :class:`Transformer` on a mesh: every device gets its own slots, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from tbik_jax._problems import Problems
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.layout import Layout
from tbik_jax.models.linear import TENSOR, Origin
from tbik_jax.models.source import TensorSource, validate
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics

#: Called with (tensors read, tensors in all) while a model loads.
Progress = Callable[[int, int], None]


def load(
    config: ModelConfig,
    source: TensorSource,
    numerics: Numerics,
    mesh: Mesh,
    *,
    dtype: DTypeLike = jnp.float32,
    ranks: int | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """A model with the weights of ``source``, sharded over the mesh's TENSOR axis and replicated over its others.

    The host holds one stacked parameter at a time, and a device nothing but its own slots. ``ranks`` lays the model out for so
    many tensor-parallel ranks on a mesh of one device, which emulates them (``Generator(..., emulate=True)``).

    Raises:
        ValueError: tensors that are missing, of a wrong shape, not finite, or unknown; a mesh that does not fit.
    """
    check_mesh(config, numerics, mesh, dtype, ranks)
    validate(source, config)
    model = abstract(config, numerics, mesh, dtype, ranks)
    graph, state = nnx.split(model)
    parameters = jax.tree.leaves(state, is_leaf=_is_variable)
    total, done = sum(len(p.get_metadata()["origin"].tensors) for p in parameters), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with Problems("loading") as problems:
        filled = jax.tree.map(lambda p: _fill(p, source, mesh, problems, step), state, is_leaf=_is_variable)
    return nnx.merge(graph, filled)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def check_mesh(config: ModelConfig, numerics: Numerics, mesh: Mesh, dtype: DTypeLike, ranks: int | None = None) -> None:
    """All that can be wrong with a mesh or dtype, before anything is read."""
    with Problems("loading") as problems:
        problems.check(TENSOR in mesh.shape, f"the mesh has axes {tuple(mesh.shape)}; one must be {TENSOR!r}")
        problems.check(
            jnp.dtype(dtype).name in ("float32", "bfloat16"), f"dtype {jnp.dtype(dtype).name}; use float32 or bfloat16"
        )
        problems.check(
            ranks is None or mesh.size == 1,
            f"ranks = {ranks} are emulated on one device, and the mesh has {mesh.size}; leave ranks out to use them",
        )
    Layout(config, numerics.contract, ranks or mesh.shape[TENSOR])


def abstract(
    config: ModelConfig, numerics: Numerics, mesh: Mesh, dtype: DTypeLike, ranks: int | None = None
) -> Transformer:
    """The model with shapes for parameters: no memory."""
    return nnx.eval_shape(lambda: Transformer(config, numerics, ranks=ranks or mesh.shape[TENSOR], dtype=dtype))


def _fill(
    parameter: nnx.Variable[Any], source: TensorSource, mesh: Mesh, problems: Problems, step: Callable[[], None]
) -> nnx.Variable[Any]:
    meta = parameter.get_metadata()
    origin, sharding = meta["origin"], NamedSharding(mesh, meta["spec"])
    shape, dtype = parameter.shape, parameter.dtype
    held = sharding.addressable_devices_indices_map(shape)
    slot_axis = 1 if origin.stacked else 0
    # Devices that hold the same slots (the other mesh axes) share one host buffer.
    ranges = {
        device: (0, 0) if origin.cut == "whole" else index[slot_axis].indices(shape[slot_axis])[:2]
        for device, index in held.items()
        if index is not None
    }
    buffers = {}
    for start, stop in set(ranges.values()):
        local = shape if origin.cut == "whole" else (*shape[:slot_axis], stop - start, *shape[slot_axis + 1 :])
        buffers[start, stop] = np.zeros(local, dtype)
    for layer, name in enumerate(origin.tensors):
        cache: dict[str, Any] = {}
        finite = True
        for (start, stop), buffer in buffers.items():
            target = buffer[layer] if origin.stacked else buffer
            for where, block in _blocks(origin, source, name, start, stop, cache):
                finite &= bool(np.isfinite(block.astype(np.float32) if block.dtype.kind == "V" else block).all())
                target[where] = block
        problems.check(finite, f"{name} has values that are not finite; the file is damaged, or training diverged")
        step()
    arrays = [jax.device_put(buffers[ranges[device]], device) for device in held]
    return parameter.replace(jax.make_array_from_single_device_arrays(shape, sharding, arrays))


def _blocks(
    origin: Origin, source: TensorSource, name: str, start: int, stop: int, cache: dict[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """``(place in the local buffer, block)`` of the slots ``start`` to ``stop - 1`` of one tensor."""
    if origin.cut == "whole":
        yield ..., source.read(name)
        return
    columns = None
    if origin.cut == "columns":
        if name not in cache:  # formats read by rows, so all ranks' columns come from one reading
            cache[name] = source.read(name)
        columns = cache[name]
    rows = source.shape(name)[0]
    for slot, block in enumerate(origin.slots[start:stop]):
        if block < 0:
            continue
        first = block * origin.width
        if columns is not None:
            yield (slot,), columns[:, first : first + origin.width]
        else:
            last = min(first + origin.width, rows)
            if first < last:
                yield (slot, slice(0, last - first)), source.read(name, first, last)
