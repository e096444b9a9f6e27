"""Which numerics a model is built with: invariant under a contract, or plain. One explicit object, no global switch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from tbik_jax import dense
from tbik_jax.collectives import Algorithm, is_direct, to_finish
from tbik_jax.contract import Contract
from tbik_jax.kernels import matmul
from tbik_jax.tree import schedule

Array = jax.Array
Weight = Any  #: ``[slots, n, K]`` or ``[slots, N, k]`` by leaf, or what the numerics packed it into.

#: From so many on, ``"direct"`` sums rows by a kernel of their own. Performance-only.
_MANY_ROWS = 256


@dataclass(frozen=True)
class Numerics(ABC):
    """The sharded operations of a transformer, in one arithmetic.

    Both kinds cut weights in the leaves of ``contract``, so that the same checkpoint, layout and model serve both and a
    comparison changes nothing but the arithmetic.

    >>> Numerics.invariant()          # the default contract: 8 leaves, balanced tree
    >>> Numerics.plain()              # ordinary dots and psum, the baseline of every table
    """

    contract: Contract = field(default_factory=Contract)
    kind: ClassVar[Literal["invariant", "plain"]]

    @staticmethod
    def invariant(contract: Contract | None = None, *, algorithm: Algorithm = "auto") -> Invariant:
        """Bits that are a function of inputs, parameters, contract and backend family alone."""
        return Invariant(contract or Contract(), algorithm)

    @staticmethod
    def plain(contract: Contract | None = None) -> Plain:
        """What JAX does by itself: fast, and different on every mesh."""
        return Plain(contract or Contract())

    @abstractmethod
    def pack(self, kind: Literal["column", "row"], w: Array) -> Any:
        """Lay a local weight out for inference: ``[slots, n, K]`` (column) or ``[slots, N, k]`` (row)."""

    @abstractmethod
    def column(
        self,
        x: Array,
        w: Weight,
        bias: Array | None,
        axis: str,
        leaves: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """``x [..., K]``, the same on every rank -> ``[..., slots * n]``, whose leaves on all ranks only gradients need."""

    def columns(
        self,
        x: Array,
        w: Weight,
        biases: Sequence[Array] | None,
        axis: str,
        sizes: Sequence[int],
        dtype: DTypeLike | None = None,
    ) -> tuple[Array, ...]:
        """:meth:`column` for several projections, whose columns lie side by side in ``w``."""
        y = self.column(x, w, jnp.concatenate(biases) if biases else None, axis, dtype=dtype)
        return tuple(jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1))

    def gated(self, x: Array, w: Weight, biases: Sequence[Array] | None, axis: str, sizes: Sequence[int]) -> Array:
        """``swiglu(gate, up)`` of :meth:`columns`."""
        gate, up = self.columns(x, w, biases, axis, sizes)
        return self.swiglu(gate, up)

    @abstractmethod
    def row(self, x: Array, w: Weight, bias: Array | None, axis: str, leaves: int) -> Array:
        """``x [..., slots * k]`` -> the sum over all ranks ``[..., N]``."""

    def row_add_norm(
        self,
        x: Array,
        w: Weight,
        bias: Array | None,
        axis: str,
        leaves: int,
        residual: Array,
        scale: Array,
        eps: float,
    ) -> tuple[Array, Array]:
        """:meth:`row`, and :meth:`add_rms_norm` behind it."""
        return self.add_rms_norm(residual, self.row(x, w, bias, axis, leaves), scale, eps)

    def opened(self, axis: str, x: Array, leaves: Sequence[int]) -> Numerics:
        """These numerics for one program of inference: with what its sums of rows like ``x``, over so many leaves, share.

        Performance-only. All ranks call it at the same place of the program.
        """
        return self

    @abstractmethod
    def add(self, x: Array, y: Array) -> Array:
        """The residual sum, in f32, rounded once to the dtype of ``x``."""

    @abstractmethod
    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        """See :func:`tbik_jax.dense.rms_norm`."""

    @abstractmethod
    def add_rms_norm(self, x: Array, y: Array, scale: Array, eps: float) -> tuple[Array, Array]:
        """``(add(x, y), rms_norm of it)``; see :func:`tbik_jax.dense.add_rms_norm`."""

    @abstractmethod
    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """See :func:`tbik_jax.dense.rope`."""

    @abstractmethod
    def norm_rope(
        self,
        q: Array,
        k: Array,
        q_scale: Array,
        k_scale: Array,
        eps: float,
        cos: Array,
        sin: Array,
        axis: str | None,
        leaves: tuple[int | None, int | None],
    ) -> tuple[Array, Array]:
        """``rope(rms_norm(x, scale, eps), cos, sin)`` of both; see :func:`tbik_jax.dense.head_parallel_norm_rope`."""

    @abstractmethod
    def swiglu(self, gate: Array, up: Array) -> Array:
        """See :func:`tbik_jax.dense.swiglu`."""

    @abstractmethod
    def write_kv(self, k_cache: Array, v_cache: Array, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
        """See :func:`tbik_jax.dense.write_kv`; the positions of a sequence are consecutive."""

    @abstractmethod
    def attention(
        self, q: Array, k: Array, v: Array, positions: Array, scale: float, kv_head_of: Array | None
    ) -> Array:
        """See :func:`tbik_jax.dense.attention`."""

    @abstractmethod
    def embedding(self, tokens: Array, table: Array, vocabulary: dense.Vocabulary) -> Array:
        """See :func:`tbik_jax.dense.embedding`."""

    @abstractmethod
    def cross_entropy(self, logits: Array, labels: Array, vocabulary: dense.Vocabulary) -> Array:
        """See :func:`tbik_jax.dense.cross_entropy`."""


@dataclass(frozen=True)
class Invariant(Numerics):
    """The contract's arithmetic; ``algorithm`` (performance-only) carries the row-parallel sums.

    Few rows are not summed by ``"direct"``, whose addresses cost the host more than the sum the GPU: they travel through the
    ``mailbox`` of a program (:meth:`opened`), or as ``"auto"`` says.
    """

    algorithm: Algorithm = "auto"
    mailbox: Any = field(default=None, compare=False, repr=False)
    kind: ClassVar[Literal["invariant", "plain"]] = "invariant"

    def pack(self, kind: Literal["column", "row"], w: Array) -> matmul.PackedWeight | Array:
        return matmul.pack(w.reshape(1, -1, w.shape[-1]) if kind == "column" else w)

    def column(
        self,
        x: Array,
        w: Weight,
        bias: Array | None,
        axis: str,
        leaves: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        return dense.column_parallel(
            x, w, bias, axis_name=axis, contract=self.contract, leaves=leaves, dtype=dtype, algorithm=self._algorithm(x)
        )

    def columns(
        self,
        x: Array,
        w: Weight,
        biases: Sequence[Array] | None,
        axis: str,
        sizes: Sequence[int],
        dtype: DTypeLike | None = None,
    ) -> tuple[Array, ...]:
        return dense.column_parallel_parts(x, w, sizes, biases or None, dtype=dtype)

    def gated(self, x: Array, w: Weight, biases: Sequence[Array] | None, axis: str, sizes: Sequence[int]) -> Array:
        return dense.column_parallel_swiglu(x, w, biases or None)

    def row(self, x: Array, w: Weight, bias: Array | None, axis: str, leaves: int) -> Array:
        return dense.row_parallel(
            x, w, bias, axis_name=axis, contract=self.contract, leaves=leaves, algorithm=self._algorithm(x)
        )

    def _algorithm(self, x: Array) -> Algorithm:
        few = self.algorithm == "direct" and math.prod(x.shape[:-1]) < _MANY_ROWS
        return "auto" if few else self.algorithm

    def row_add_norm(
        self,
        x: Array,
        w: Weight,
        bias: Array | None,
        axis: str,
        leaves: int,
        residual: Array,
        scale: Array,
        eps: float,
    ) -> tuple[Array, Array]:
        if self.mailbox is None or bias is not None:
            return super().row_add_norm(x, w, bias, axis, leaves, residual, scale, eps)
        return dense.row_parallel_add_norm(
            x,
            w,
            residual,
            scale,
            eps=eps,
            axis_name=axis,
            contract=self.contract,
            leaves=leaves,
            mailbox=self.mailbox,
        )

    def opened(self, axis: str, x: Array, leaves: Sequence[int]) -> Invariant:
        ranks, rows, d = lax.axis_size(axis), math.prod(x.shape[:-1]), x.shape[-1]
        if self.algorithm != "direct" or ranks == 1 or not is_direct(axis):
            return self
        from tbik_jax.kernels.hopper import mailbox

        plans = [schedule(self.contract.tree_over(count), ranks) for count in leaves]
        if not all(mailbox.fits(rows, d, to_finish(plan)[0]) for plan in plans):
            return self
        return replace(self, mailbox=mailbox.open_mailbox(axis, ranks, max(plan.width for plan in plans), rows, d))

    def add(self, x: Array, y: Array) -> Array:
        return dense.add(x, y)

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        return dense.rms_norm(x, scale, eps=eps)

    def add_rms_norm(self, x: Array, y: Array, scale: Array, eps: float) -> tuple[Array, Array]:
        return dense.add_rms_norm(x, y, scale, eps=eps)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        return dense.rope(x, cos, sin)

    def norm_rope(
        self,
        q: Array,
        k: Array,
        q_scale: Array,
        k_scale: Array,
        eps: float,
        cos: Array,
        sin: Array,
        axis: str | None,
        leaves: tuple[int | None, int | None],
    ) -> tuple[Array, Array]:
        return dense.head_parallel_norm_rope(
            q, k, q_scale, k_scale, cos, sin, eps=eps, axis_name=axis, contract=self.contract, leaves=leaves
        )

    def swiglu(self, gate: Array, up: Array) -> Array:
        return dense.swiglu(gate, up)

    def write_kv(self, k_cache: Array, v_cache: Array, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
        return dense.write_kv(k_cache, v_cache, k, v, positions=positions)

    def attention(
        self, q: Array, k: Array, v: Array, positions: Array, scale: float, kv_head_of: Array | None
    ) -> Array:
        return dense.attention(
            q, k, v, positions=positions, scale=scale, kv_block=self.contract.kv_block, kv_head_of=kv_head_of
        )

    def embedding(self, tokens: Array, table: Array, vocabulary: dense.Vocabulary) -> Array:
        return dense.embedding(tokens, table, vocabulary)

    def cross_entropy(self, logits: Array, labels: Array, vocabulary: dense.Vocabulary) -> Array:
        return dense.cross_entropy(logits, labels, vocabulary)


@partial(jax.tree_util.register_dataclass, data_fields=("w",), meta_fields=())
@dataclass(frozen=True)
class _PlainWeight:
    """``[K, N]``, the layout that ordinary dots read fastest on the CPU."""

    w: Array


@dataclass(frozen=True)
class Plain(Numerics):
    """Ordinary dots, XLA's own fusions, ``psum``. Results depend on mesh, batch and chunking."""

    kind: ClassVar[Literal["invariant", "plain"]] = "plain"

    def pack(self, kind: Literal["column", "row"], w: Array) -> _PlainWeight:
        return _PlainWeight(self._matrix(kind, w))

    @staticmethod
    def _matrix(kind: Literal["column", "row"], w: Weight) -> Array:
        if isinstance(w, _PlainWeight):
            return w.w
        by_leaf: Array = w
        if kind == "column":
            return by_leaf.reshape(-1, by_leaf.shape[-1]).T
        return by_leaf.swapaxes(1, 2).reshape(-1, by_leaf.shape[1])

    def column(
        self,
        x: Array,
        w: Weight,
        bias: Array | None,
        axis: str,
        leaves: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        y = jnp.dot(x, self._matrix("column", w), preferred_element_type=dtype or x.dtype)
        return y if bias is None else y + bias

    def row(self, x: Array, w: Weight, bias: Array | None, axis: str, leaves: int) -> Array:
        y: Array = lax.psum(jnp.dot(x, self._matrix("row", w)), axis)
        return y if bias is None else y + bias

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def rms_norm(self, x: Array, scale: Array, eps: float) -> Array:
        wide = x.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
        return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)

    def add_rms_norm(self, x: Array, y: Array, scale: Array, eps: float) -> tuple[Array, Array]:
        total = self.add(x, y)
        return total, self.rms_norm(total, scale, eps)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[..., None, :], sin[..., None, :]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)

    def norm_rope(
        self,
        q: Array,
        k: Array,
        q_scale: Array,
        k_scale: Array,
        eps: float,
        cos: Array,
        sin: Array,
        axis: str | None,
        leaves: tuple[int | None, int | None],
    ) -> tuple[Array, Array]:
        q, k = self.rms_norm(q, q_scale, eps), self.rms_norm(k, k_scale, eps)
        return self.rope(q, cos, sin), self.rope(k, cos, sin)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)

    def write_kv(self, k_cache: Array, v_cache: Array, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
        batch, tokens = positions.shape
        if tokens == 1 < batch:
            rows = jnp.arange(batch)
            k_cache, v_cache = (
                cache.at[rows, :, positions[:, 0]].set(new[:, 0], unique_indices=True, indices_are_sorted=True)
                for cache, new in ((k_cache, k), (v_cache, v))
            )
            return k_cache, v_cache
        k, v, zero = k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.zeros((), positions.dtype)
        for b in range(batch):
            at = zero + b, zero, positions[b, 0], zero
            k_cache = lax.dynamic_update_slice(k_cache, k[b : b + 1], at)
            v_cache = lax.dynamic_update_slice(v_cache, v[b : b + 1], at)
        return k_cache, v_cache

    def attention(
        self, q: Array, k: Array, v: Array, positions: Array, scale: float, kv_head_of: Array | None
    ) -> Array:
        if kv_head_of is not None:
            k, v = jnp.take(k, kv_head_of, axis=1), jnp.take(v, kv_head_of, axis=1)
        batch, queries, heads, dim = q.shape
        q = q.reshape(batch, queries, k.shape[1], -1, dim)
        scores = jnp.einsum("btkgd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        visible = jnp.arange(k.shape[2]) <= positions[:, None, None, :, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        y = jnp.einsum("bkgts,bksd->btkgd", weights, v)
        return y.reshape(batch, queries, heads, dim)

    def embedding(self, tokens: Array, table: Array, vocabulary: dense.Vocabulary) -> Array:
        first, held = vocabulary.local_entries()
        index = tokens - first
        mine = (index >= 0) & (index < held)
        rows: Array = lax.psum(jnp.where(mine[..., None], table[jnp.where(mine, index, 0)], 0), vocabulary.axis_name)
        return rows

    def cross_entropy(self, logits: Array, labels: Array, vocabulary: dense.Vocabulary) -> Array:
        first, held = vocabulary.local_entries()
        logits = jnp.where(jnp.arange(logits.shape[-1]) < held, logits, -jnp.inf)
        top = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), vocabulary.axis_name)
        total = lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), vocabulary.axis_name)
        index = labels - first
        mine = (index >= 0) & (index < held)
        own = jnp.take_along_axis(logits, jnp.where(mine, index, 0)[..., None], axis=-1)[..., 0]
        own = lax.psum(jnp.where(mine, own, 0), vocabulary.axis_name)
        known = (labels >= 0) & (labels < vocabulary.size)
        return jnp.where(known, top + jnp.log(total) - own, 0.0)
