"""What is split over the vocabulary: embedding, logits, log-softmax, cross-entropy.

The vocabulary is cut in leaves of ``n = ceil(V / leaves)`` entries; a rank holds a contiguous range of leaves, slot by slot.
Entries behind the vocabulary's end and slots behind a rank's range hold no token: their logits are -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from tbik_jax._axes import axis_size, vary, vary_like
from tbik_jax._problems import Problems
from tbik_jax.collectives import sum_of_leaves, tree_all_gather
from tbik_jax.contract import Contract
from tbik_jax.dense.linear import column_parallel
from tbik_jax.kernels import backend
from tbik_jax.kernels.batching import one_by_one
from tbik_jax.kernels.elementary import exp, log
from tbik_jax.kernels.exact import cast, product, tree_sum
from tbik_jax.kernels.matmul import PackedWeight
from tbik_jax.kernels.segment_sum import tree_segment_sum
from tbik_jax.tree import Schedule, Tree, schedule

Array = jax.Array


@dataclass(frozen=True)
class Vocabulary:
    """How ``size`` entries lie on the ranks of an axis; numerics-bearing through the contract's leaves alone.

    Arrays that are split over the vocabulary have a local dimension of ``slots * width`` entries.
    """

    size: int
    contract: Contract
    axis_name: str | None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Vocabulary: size = {self.size} is not positive")

    @property
    def leaves(self) -> int:
        return min(self.contract.leaves, self.size)

    @property
    def width(self) -> int:
        """Entries per leaf; the last leaf may hold fewer."""
        return -(-self.size // self.leaves)

    @property
    def tree(self) -> Tree:
        return self.contract.tree_over(self.leaves)

    @property
    def plan(self) -> Schedule:
        return schedule(self.tree, 1 if self.axis_name is None else axis_size(self.axis_name))

    @property
    def local_size(self) -> int:
        return self.plan.slots * self.width

    @property
    def all_held(self) -> bool:
        """Whether all local entries of all ranks are in the vocabulary."""
        return self.local_size * self.plan.ranks == self.size

    def local_entries(self) -> tuple[Array, Array]:
        """``(first, held)``: this rank's first entry, and how many of its local entries are in the vocabulary."""
        starts = jnp.array([r.start * self.width for r in self.plan.ranges])
        stops = jnp.array([min(r.stop * self.width, self.size) for r in self.plan.ranges])
        rank = 0 if self.axis_name is None else lax.axis_index(self.axis_name)
        return starts[rank], jnp.maximum(stops - starts, 0)[rank]

    def check(self, where: str, name: str, local: int) -> None:
        with Problems(where) as problems:
            problems.check(
                local == self.local_size,
                f"{name} has {local} local entries; a vocabulary of {self.size} in {self.leaves} leaves over "
                f"{self.plan.ranks} ranks has {self.plan.slots} slots of {self.width} = {self.local_size}",
            )


def _select_owner(x: Array, axis_name: str | None) -> Array:
    """The one rank's value that is not all zero bits. Added as integers, so that -0.0 stays -0.0."""
    if axis_name is None:
        return x
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    total = lax.psum(vary(bits.astype(jnp.uint32), axis_name), axis_name)
    return lax.bitcast_convert_type(total.astype(bits.dtype), x.dtype)


def embedding(tokens: Array, table: Array, vocabulary: Vocabulary) -> Array:
    """Rows of a table that is split over the vocabulary: ``y = table[tokens]``, exact to the sign of zero.

    Args:
        tokens: ``[...]`` integers, the same on every rank. Tokens outside the vocabulary give zeros.
        table: ``[slots * width, D]``, this rank's rows.

    Guarantee: a copy. The gradient of a row adds its tokens' cotangents in f32, on the CPU one after another in token order,
    on Hopper as :func:`tbik_jax.kernels.segment_sum.tree_segment_sum`; the bits are a function of these tokens alone.
    """
    vocabulary.check("dense.embedding", "table", table.shape[0])
    return _embedding(vocabulary, tokens, table)


def _local_index(vocabulary: Vocabulary, tokens: Array) -> tuple[Array, Array]:
    first, held = vocabulary.local_entries()
    index = tokens - first
    mine = (index >= 0) & (index < held)
    return jnp.where(mine, index, 0), mine


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embedding(vocabulary: Vocabulary, tokens: Array, table: Array) -> Array:
    index, mine = _local_index(vocabulary, tokens)
    return _select_owner(jnp.where(mine[..., None], table[index], 0), vocabulary.axis_name)


def _embedding_fwd(vocabulary: Vocabulary, tokens: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return _embedding(vocabulary, tokens, table), (tokens, table)


def _embedding_bwd(vocabulary: Vocabulary, saved: tuple[Array, Array], dy: Array) -> tuple[None, Array]:
    tokens, table = saved
    index, mine = _local_index(vocabulary, tokens.reshape(-1))
    dy = jnp.where(mine[:, None], dy.reshape(index.shape[0], -1).astype(jnp.float32), 0.0)
    index = jnp.where(mine, index, table.shape[0])
    if backend.family() == "sm90":
        # A scatter may be atomic there, in the order of the moment.
        total = one_by_one(partial(tree_segment_sum, num_segments=table.shape[0]))(dy, index)
        return None, cast(vary_like(total, dy), table.dtype)
    # XLA:CPU applies updates one after another, in token order; a foreign token adds +0 to a row of its own.
    total = vary_like(jnp.zeros((table.shape[0] + 1, table.shape[1]), jnp.float32), dy)
    total = one_by_one(lambda total, index, dy: total.at[index].add(dy))(total, index, dy)
    return None, cast(total[:-1], table.dtype)


_embedding.defvjp(_embedding_fwd, _embedding_bwd)


def logits(x: Array, table: Array | PackedWeight, vocabulary: Vocabulary) -> Array:
    """This rank's logits, f32 ``[..., slots * width]``, of hidden states ``x [..., D]`` that all ranks hold.

    ``table [slots * width, D]`` is the head, or the embedding where they are tied, or its packed form. Entries that are
    no token are -inf. The product is :func:`tbik_jax.dense.column_parallel`'s, without a rounding to the dtype of ``x``.
    """
    if not isinstance(table, PackedWeight):
        vocabulary.check("dense.logits", "table", table.shape[0])
        table = table.reshape(vocabulary.plan.slots, vocabulary.width, -1)
    y = column_parallel(
        x,
        table,
        axis_name=vocabulary.axis_name,
        contract=vocabulary.contract,
        leaves=vocabulary.leaves,
        dtype=jnp.float32,
    )
    return mask_logits(y, vocabulary)


def mask_logits(logits: Array, vocabulary: Vocabulary) -> Array:
    """-inf where a local entry is no token: behind the vocabulary's end, or in a slot that this rank does not hold."""
    vocabulary.check("dense.mask_logits", "logits", logits.shape[-1])
    if vocabulary.all_held:
        return logits
    _, held = vocabulary.local_entries()
    return jnp.where(jnp.arange(logits.shape[-1]) < held, logits, -jnp.inf)


def gather_logits(logits: Array, vocabulary: Vocabulary) -> Array:
    """``[..., slots * width]`` of every rank -> ``[..., V]`` in vocabulary order, on every rank.

    Moves bits only, as does its gradient: a rank takes its own entries' cotangents.
    """
    vocabulary.check("dense.gather_logits", "logits", logits.shape[-1])
    plan, width = vocabulary.plan, vocabulary.width
    if vocabulary.axis_name is not None:
        logits = tree_all_gather(logits, vocabulary.axis_name, gather_dimension=-1)
    if plan.slots * plan.ranks == vocabulary.leaves:
        return logits[..., : vocabulary.size]
    parts = [
        lax.slice_in_dim(logits, start := rank * plan.slots * width, start + len(held) * width, axis=-1)
        for rank, held in enumerate(plan.ranges)
    ]
    return jnp.concatenate(parts, axis=-1)[..., : vocabulary.size]


def log_sum_exp(logits: Array, vocabulary: Vocabulary) -> Array:
    """``log(sum(exp(logits)))`` over the whole vocabulary, f32 ``[...]``, the same on every rank.

    The maximum is exact in any order; exponentials are summed by a fixed tree inside a leaf and the canonical tree over
    leaves. On Hopper logits are read once: the sum of a leaf is relative to its own maximum, and brought to that of all
    leaves after.

    Guarantee: as :func:`log_softmax`. The gradient is ``softmax * dy``, elementwise, rounded once.
    """
    vocabulary.check("dense.log_sum_exp", "logits", logits.shape[-1])
    return _log_sum_exp(vocabulary, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sum_exp(vocabulary: Vocabulary, logits: Array) -> Array:
    logits = mask_logits(logits.astype(jnp.float32), vocabulary)
    by_leaf = _by_leaf(logits, vocabulary)
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, sums

        tops, sums_of_leaves = (jnp.moveaxis(y, -1, 0) for y in call("log_sum_exp", sums.leaf_exp_sums, by_leaf))
        top = _largest(reduce(jnp.maximum, list(tops)), vocabulary)  # one by one, so that XLA needs no kernel for it
        leaves = product(sums_of_leaves, exp(tops - top))
    else:
        top = _largest(jnp.max(logits, axis=-1), vocabulary)
        leaves = jnp.moveaxis(tree_sum(exp(by_leaf - top[..., None, None])), -1, 0)
    return top + log(sum_of_leaves(leaves, vocabulary.axis_name, vocabulary.tree))


def _log_sum_exp_fwd(vocabulary: Vocabulary, logits: Array) -> tuple[Array, tuple[Array, Array]]:
    total = _log_sum_exp(vocabulary, logits)
    return total, (logits, total)


def _log_sum_exp_bwd(vocabulary: Vocabulary, saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    logits, total = saved
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, softmax

        held = _held(total, vocabulary)
        return (call("log_sum_exp", softmax.log_sum_exp_gradient, logits, total, dy, integers=held),)
    p = exp(mask_logits(logits.astype(jnp.float32), vocabulary) - total[..., None])
    return (cast(product(p, dy[..., None]), logits.dtype),)


_log_sum_exp.defvjp(_log_sum_exp_fwd, _log_sum_exp_bwd)


def _held(like: Array, vocabulary: Vocabulary) -> tuple[Array, ...]:
    """How many local entries are tokens, for every row, where some are none."""
    return () if vocabulary.all_held else (jnp.broadcast_to(vocabulary.local_entries()[1], like.shape),)


def _by_leaf(x: Array, vocabulary: Vocabulary) -> Array:
    return x.reshape(*x.shape[:-1], vocabulary.plan.slots, vocabulary.width)


def _largest(x: Array, vocabulary: Vocabulary) -> Array:
    """Of all ranks."""
    return x if vocabulary.axis_name is None else lax.pmax(vary(x, vocabulary.axis_name), vocabulary.axis_name)


def _leaf_sums(x: Array, vocabulary: Vocabulary) -> Array:
    """``[slots, ...]``: the sum of ``x`` over every local leaf, in the family's order."""
    by_leaf = _by_leaf(x, vocabulary)
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, sums

        total = call("leaf_sums", sums.leaf_sums, by_leaf)
    else:
        total = tree_sum(by_leaf)
    return jnp.moveaxis(total, -1, 0)


def log_softmax(logits: Array, vocabulary: Vocabulary) -> Array:
    """Log-probabilities of this rank's entries, f32 ``[..., slots * width]``; -inf where an entry is no token.

        log p[v] = logits[v] - log_sum_exp(logits)

    Guarantee: bitwise equal on every mesh of up to ``contract.leaves`` ranks and for every batch. Differentiable: the
    gradient is ``dy - softmax * sum(dy)``, the sum a canonical tree over the vocabulary.
    """
    return _log_softmax(vocabulary, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_softmax(vocabulary: Vocabulary, logits: Array) -> Array:
    return mask_logits(logits.astype(jnp.float32), vocabulary) - log_sum_exp(logits, vocabulary)[..., None]


def _log_softmax_fwd(vocabulary: Vocabulary, logits: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _log_softmax(vocabulary, logits)
    return y, (y, jnp.zeros((), logits.dtype))


def _log_softmax_bwd(vocabulary: Vocabulary, saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    y, like = saved
    dy = jnp.where(jnp.isfinite(y), dy.astype(jnp.float32), 0.0)
    total = sum_of_leaves(_leaf_sums(dy, vocabulary), vocabulary.axis_name, vocabulary.tree)
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, softmax

        return (call("log_softmax", partial(softmax.log_softmax_gradient, dtype=like.dtype), y, dy, total),)
    return (cast(dy - product(exp(y), total[..., None]), like.dtype),)


_log_softmax.defvjp(_log_softmax_fwd, _log_softmax_bwd)


def cross_entropy(logits: Array, labels: Array, vocabulary: Vocabulary) -> Array:
    """``-log p[label]`` per token, f32 ``[...]``, the same on every rank.

    Args:
        logits: ``[..., slots * width]``, this rank's.
        labels: ``[...]`` integers, the same on every rank. A label outside the vocabulary (-100, say) gives loss 0.

    Guarantee: as :func:`log_softmax`. The gradient is ``(softmax - onehot) * dloss``, elementwise.
    """
    return _cross_entropy(vocabulary, logits, labels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(vocabulary: Vocabulary, logits: Array, labels: Array) -> Array:
    return _cross_entropy_fwd(vocabulary, logits, labels)[0]


def _cross_entropy_fwd(
    vocabulary: Vocabulary, logits: Array, labels: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    total = log_sum_exp(logits, vocabulary)
    index, mine = _local_index(vocabulary, labels)
    picked = jnp.take_along_axis(logits.astype(jnp.float32), index[..., None], axis=-1)[..., 0]
    own = _select_owner(jnp.where(mine, picked, 0), vocabulary.axis_name)
    known = (labels >= 0) & (labels < vocabulary.size)
    return jnp.where(known, total - own, 0.0), (logits, labels, total)


def _cross_entropy_bwd(vocabulary: Vocabulary, saved: tuple[Array, Array, Array], dloss: Array) -> tuple[Array, None]:
    logits, labels, total = saved
    index, mine = _local_index(vocabulary, labels)
    known = (labels >= 0) & (labels < vocabulary.size)
    dloss = jnp.where(known, dloss, 0.0)
    if backend.family() == "sm90":
        from tbik_jax.kernels.hopper import call, softmax

        integers = jnp.where(mine, index, -1), *_held(total, vocabulary)
        return call("cross_entropy", softmax.cross_entropy_gradient, logits, total, dloss, integers=integers), None
    p = exp(mask_logits(logits.astype(jnp.float32), vocabulary) - total[..., None])
    hit = mine[..., None] & (jnp.arange(logits.shape[-1]) == index[..., None])
    return cast(product(jnp.where(hit, p - 1.0, p), dloss[..., None]), logits.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
