"""Parameters that know where they come from and how they lie on the mesh, and the projections made of them.

:class:`Origin` and the ``spec`` of every parameter are all that loading, saving and resharding need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tbik_jax._axes import axis_size
from tbik_jax._problems import Problems
from tbik_jax.contract import Contract
from tbik_jax.models.layout import leaves_in_order
from tbik_jax.numerics import Numerics
from tbik_jax.optimizer import Cut

Array = jax.Array

#: Mesh axes: tensor parallelism splits weights, data parallelism the batch.
TENSOR, DATA = "tp", "dp"


@dataclass(frozen=True)
class Origin:
    """Which stored tensors a parameter is made of.

    ``tensors`` are Hugging Face names, one per layer, stacked in the first dimension (``stacked``). ``cut`` says how each is
    cut in blocks of ``width``: its rows ``[slots, width, ...]``, its columns ``[slots, rows, width]``, or not at all.
    ``slots`` names the block in every slot of the mesh, rank by rank; negative is idle and holds zeros.
    """

    tensors: tuple[str, ...]
    cut: Literal["whole", "rows", "columns"] = "whole"
    slots: tuple[int, ...] = ()
    width: int = 0
    stacked: bool = False


def parameter(origin: Origin, shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param[Array]:
    """Zeros, to be filled by a loader. ``shape`` is that of one tensor without the dimension that is cut."""
    if origin.cut == "rows":
        shape = (len(origin.slots), origin.width, *shape)
    elif origin.cut == "columns":
        shape = (len(origin.slots), *shape, origin.width)
    lead = (len(origin.tensors),) if origin.stacked else ()
    split = () if origin.cut == "whole" else (TENSOR,)
    spec = P(*[None] * len(lead), *split)
    return nnx.Param(jnp.zeros((*lead, *shape), dtype), origin=origin, spec=spec)


def cuts(state: Any, contract: Contract) -> list[tuple[Cut, ...]]:
    """How a mesh may split each parameter of a state, or what lies like it: for :func:`tbik_jax.optimizer.global_norm`.

    Call it inside ``shard_map``, with the state that the norm is of.

    Raises:
        ValueError: layers that were taken apart for inference, whose sums would go in another order; blocks that lie on the ranks
            as no tree over them does, copies of KV heads, for example.
    """
    found: list[tuple[Cut, ...]] = []
    ranks = axis_size(TENSOR)
    with Problems("cuts") as problems:
        for variable in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            origin, spec = (variable.get_metadata()[name] for name in ("origin", "spec"))
            split = () if origin.cut == "whole" else (TENSOR,)
            stacked = P(*[None] * origin.stacked, *split)
            problems.check(spec == stacked, f"{origin.tensors[0]}: its layers are apart; use a stack of them")
            if not split:
                found.append(())
                continue
            blocks = max(origin.slots) + 1
            problems.check(
                leaves_in_order(origin.slots, contract, ranks) is not None,
                f"{origin.tensors[0]}: its {blocks} blocks lie on {ranks} ranks as no tree over them does, some perhaps on "
                f"several; use a mesh that divides the KV heads",
            )
            found.append((Cut(TENSOR, int(origin.stacked), blocks),))
    return found


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _without_gradient(name: str, y: Array) -> Array:
    """``y`` of a projection whose outputs lie on the ranks like no tree, some of them on several."""
    return y


def _refuse(name: str, _: None, dy: Array) -> Any:
    raise ValueError(
        f"{name}: {lax.axis_size(TENSOR)} tensor-parallel ranks do not divide the KV heads, so that some are on several ranks, "
        f"and there is no order yet in which to add their gradients. Use a mesh that divides the KV heads"
    )


_without_gradient.defvjp(lambda name, y: (y, None), _refuse)


class Packed(nnx.Variable[Array]):
    """A weight in the layout of the numerics that packed it; derived, never stored."""


class Linear(nnx.Module):
    """Projections of one input, by leaf; several (q, k, v; gate, up) are one product once packed.

    Args:
        kind: ``"column"`` splits the outputs over the mesh, ``"row"`` the inputs.
        origins: The projections in the order of the results; a row-parallel layer has one.
        other: Size of the dimension that is not split.
        leaves: Leaves of the dimension that is, of each projection; None refuses its input gradient on several ranks.
        bias: Whether every projection has one.
        dtype: Of the parameters.
        shared: A parameter to use instead of one of its own (tied embeddings).
    """

    def __init__(
        self,
        kind: Literal["column", "row"],
        origins: Mapping[str, Origin],
        *,
        other: int,
        leaves: tuple[int | None, ...],
        bias: bool,
        dtype: DTypeLike,
        shared: nnx.Param[Array] | None = None,
    ) -> None:
        self.kind, self.leaves = kind, leaves
        self.names = tuple(origins)  # the order of the results; a Dict of modules forgets it
        self.treedef: Any = None
        self.packed: nnx.List[Packed] = nnx.List([])
        self.weights = nnx.Dict(
            {name: shared or parameter(origin, (other,), dtype) for name, origin in origins.items()}
        )
        self.sizes = tuple(len(origin.slots) * origin.width for origin in origins.values())
        self.biases: nnx.Dict[nnx.Param[Array]] = nnx.Dict({})
        if bias:
            for name, origin in origins.items():
                names = tuple(tensor.replace(".weight", ".bias") for tensor in origin.tensors)
                if kind == "column":
                    self.biases[name] = parameter(replace(origin, tensors=names), (), dtype)
                else:
                    self.biases[name] = parameter(Origin(names, stacked=origin.stacked), (other,), dtype)

    def pack(self, numerics: Numerics, mesh: jax.sharding.Mesh) -> None:
        """Replace the weights by their packed form (one for all projections), shard by shard on the mesh."""
        if self.packed:
            return
        stacked = self.weights[self.names[0]].get_metadata()["origin"].stacked
        spec = P(None, TENSOR) if stacked else P(TENSOR)

        def local(*weights: Array) -> Any:
            flat = [w.reshape(-1, w.shape[-1])[None] for w in weights] if self.kind == "column" else list(weights)
            return numerics.pack(self.kind, jnp.concatenate(flat, axis=1 if self.kind == "column" else 0))

        run = jax.vmap(local) if stacked else local
        packed = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))(
            *(self.weights[name][...] for name in self.names)
        )
        leaves, self.treedef = jax.tree.flatten(packed)
        self.packed = nnx.List([Packed(leaf, spec=spec) for leaf in leaves])
        self.weights = nnx.Dict({})

    def __call__(self, numerics: Numerics, x: Array, dtype: DTypeLike | None = None) -> tuple[Array, ...]:
        biases = self._biases()
        if self.kind == "row":
            w = self._packed() if self.packed else self.weights[self.names[0]][...]
            return (numerics.row(x, w, biases[0] if biases else None, TENSOR, self._leaves_of_row()),)
        if not self.packed:
            flat: list[Any] = [b.reshape(-1) for b in biases] or [None] * len(self.names)
            results = []
            for name, bias, leaves in zip(self.names, flat, self.leaves, strict=True):
                y = numerics.column(x, self.weights[name][...], bias, TENSOR, leaves, dtype)
                results.append(y if leaves is not None or numerics.kind == "plain" else _without_gradient(name, y))
            return tuple(results)
        return numerics.columns(x, self._packed(), [b.reshape(-1) for b in biases], TENSOR, self._local_sizes(), dtype)

    def add_norm(self, numerics: Numerics, x: Array, residual: Array, scale: Array, eps: float) -> tuple[Array, Array]:
        """A row-parallel product, its sum with ``residual``, and the norm of that."""
        biases = self._biases()
        w = self._packed() if self.packed else self.weights[self.names[0]][...]
        bias = biases[0] if biases else None
        return numerics.row_add_norm(x, w, bias, TENSOR, self._leaves_of_row(), residual, scale, eps)

    def gated(self, numerics: Numerics, x: Array) -> Array:
        """``swiglu`` of the two projections."""
        if not self.packed:
            gate, up = self(numerics, x)
            return numerics.swiglu(gate, up)
        return numerics.gated(x, self._packed(), [b.reshape(-1) for b in self._biases()], TENSOR, self._local_sizes())

    def _leaves_of_row(self) -> int:
        (leaves,) = self.leaves
        assert leaves is not None
        return leaves

    def _biases(self) -> list[Array]:
        return [self.biases[name][...] for name in self.names if name in self.biases]

    def _local_sizes(self) -> list[int]:
        return [size // lax.axis_size(TENSOR) for size in self.sizes]

    def _packed(self) -> Any:
        return jax.tree.unflatten(self.treedef, [leaf[...] for leaf in self.packed])
