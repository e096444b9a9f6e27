"""Which head, leaf or vocabulary entry lies on which rank. Pure Python; the numbers are the same on every backend.

Query heads, feed-forward columns and vocabulary entries are cut in leaves, and a rank holds a contiguous range of leaves
in its slots. Where the ranges differ in length, the last slots of the shorter ones are idle: zero weights, and no tree
reads them. KV heads follow the query heads: a rank holds whichever its query heads read, copies included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tbik_jax._problems import Problems
from tbik_jax.contract import Contract
from tbik_jax.models.config import ModelConfig
from tbik_jax.tree import Schedule, schedule

#: Stands for a slot that holds nothing.
IDLE = -1


@dataclass(frozen=True)
class Layout:
    """The slots of every rank of a tensor-parallel axis of ``ranks`` ranks.

    Raises:
        ValueError: more ranks than some dimension has leaves; every such dimension is listed.
    """

    config: ModelConfig
    contract: Contract
    ranks: int

    def __post_init__(self) -> None:
        with Problems("Layout") as problems:
            for name, leaves, units in (
                ("query heads", self.head_leaves, self.config.num_heads),
                ("feed-forward columns", self.mlp_leaves, self.config.intermediate_size),
                ("vocabulary entries", self.vocab_leaves, self.config.vocab_size),
            ):
                problems.check(
                    1 <= self.ranks <= leaves,
                    f"{self.ranks} tensor-parallel ranks, but the {units} {name} have {leaves} leaves: use at most "
                    f"{leaves} ranks, or a contract with more leaves (leaves = {self.contract.leaves} now; other bits)",
                )

    @property
    def head_leaves(self) -> int:
        return self.contract.leaves_for(self.config.num_heads)

    @property
    def heads_per_leaf(self) -> int:
        return self.config.num_heads // self.head_leaves

    @property
    def mlp_leaves(self) -> int:
        return self.contract.leaves_for(self.config.intermediate_size)

    @property
    def vocab_leaves(self) -> int:
        return min(self.contract.leaves, self.config.vocab_size)

    @cached_property
    def heads(self) -> Schedule:
        return schedule(self.contract.tree_over(self.head_leaves), self.ranks)

    @cached_property
    def mlp(self) -> Schedule:
        return schedule(self.contract.tree_over(self.mlp_leaves), self.ranks)

    @cached_property
    def vocab(self) -> Schedule:
        return schedule(self.contract.tree_over(self.vocab_leaves), self.ranks)

    @property
    def local_heads(self) -> int:
        """Query heads per rank, idle ones included."""
        return self.heads.slots * self.heads_per_leaf

    @cached_property
    def _kv_of_rank(self) -> tuple[tuple[int, ...], ...]:
        group = self.config.num_heads // self.config.num_kv_heads
        held = [[leaf * self.heads_per_leaf for leaf in (r.start, r.stop)] for r in self.heads.ranges]
        return tuple(tuple(range(first // group, (stop - 1) // group + 1)) for first, stop in held)

    @property
    def local_kv_heads(self) -> int:
        """KV heads per rank, copies and idle ones included."""
        return max(map(len, self._kv_of_rank))

    @cached_property
    def kv_slots(self) -> tuple[int, ...]:
        """The KV head in every KV slot of every rank, rank by rank, or IDLE."""
        width = self.local_kv_heads
        return tuple(head for held in self._kv_of_rank for head in (*held, *[IDLE] * (width - len(held))))

    @cached_property
    def kv_of_head(self) -> tuple[tuple[int, ...], ...] | None:
        """Per rank, the local KV slot of every local query head; ``None`` if all ranks have equal, consecutive groups."""
        group = self.config.num_heads // self.config.num_kv_heads
        table = []
        for held, kv in zip(self.heads.ranges, self._kv_of_rank, strict=True):
            heads = range(held.start * self.heads_per_leaf, held.stop * self.heads_per_leaf)
            local = [head // group - kv[0] for head in heads]
            table.append(tuple(local + [0] * (self.local_heads - len(local))))
        if self.local_heads % self.local_kv_heads == 0:
            even = tuple(h // (self.local_heads // self.local_kv_heads) for h in range(self.local_heads))
            if all(row == even for row in table):
                return None
        return tuple(table)

    def leaves_of(self, slots: tuple[int, ...]) -> int | None:
        """:func:`leaves_in_order` of this layout."""
        return leaves_in_order(slots, self.contract, self.ranks)

    @staticmethod
    def slots_of(plan: Schedule) -> tuple[int, ...]:
        """The leaf in every slot of every rank, rank by rank, or IDLE."""
        return tuple(leaf for held in plan.ranges for leaf in (*held, *[IDLE] * (plan.slots - len(held))))

    @staticmethod
    def max_ranks(config: ModelConfig, contract: Contract) -> int:
        """The largest tensor-parallel axis that this model can have under this contract."""
        return min(
            contract.leaves_for(config.num_heads),
            contract.leaves_for(config.intermediate_size),
            min(contract.leaves, config.vocab_size),
        )


def leaves_in_order(slots: tuple[int, ...], contract: Contract, ranks: int) -> int | None:
    """How many leaves the blocks in ``slots`` are; None if they do not lie as a tree over them does: copies, for example.

    Then no sum over the blocks of all ranks has an order: neither the input gradient of their projection nor their norm.
    """
    blocks = max(slots) + 1
    if ranks > blocks:
        return None
    plan = schedule(contract.tree_over(blocks), ranks)
    return blocks if Layout.slots_of(plan) == slots else None
