"""The canonical tree: which partial sums exist, and in which order they are added.

A reduction is cut in `leaves` contiguous leaves. The tree says how the leaf values become one value. It is the same tree
on every mesh; a rank that holds a contiguous range of leaves holds a short list of whole tree nodes, and those nodes are
all that has to travel.

Pure Python: no arrays, no mesh, no device. Values are whatever ``add`` adds.

References: Tree-Based Invariant Kernels, arXiv 2511.17826, section 4 (balanced tree, power-of-two ranks). Ragged leaf
counts, other shapes and arbitrary rank counts are this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TypeVar

from tbik_jax._problems import Problems

T = TypeVar("T")

#: More leaves than anyone shards over; bounds the pure-Python schedules, and the recursion along a chain.
MAX_LEAVES = 256


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a tree: the sum of leaves ``start`` to ``stop - 1`` in the tree's own order. A leaf has no children."""

    start: int
    stop: int
    left: Node | None = None
    right: Node | None = None

    @property
    def is_leaf(self) -> bool:
        return self.left is None

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.stop

    def shape(self) -> object:
        """The node's association without its position: equal for nodes that add alike."""
        if self.left is None or self.right is None:
            return 1
        return (self.left.shape(), self.right.shape())

    def evaluate(self, leaf: Callable[[int], T], add: Callable[[T, T], T]) -> T:
        """``add(left, right)`` all the way down, for leaf values ``leaf(index)``."""
        if self.left is None or self.right is None:
            return leaf(self.start)
        return add(self.left.evaluate(leaf, add), self.right.evaluate(leaf, add))

    def __str__(self) -> str:
        if self.left is None or self.right is None:
            return str(self.start)
        return f"({self.left} + {self.right})"


def _chain(children: Sequence[Node]) -> Node:
    node = children[0]
    for child in children[1:]:
        node = Node(node.start, child.stop, node, child)
    return node


@dataclass(frozen=True)
class Tree:
    """A binary tree over ``leaves`` ordered leaves; its shape is given as arities from the leaves up.

    Level i takes the nodes below in consecutive groups of ``arities[i]`` and adds each group left-deep; the last group
    may be short. The last arity repeats until one node is left. So any arities complete to a tree over any number of
    leaves:

    ========================  ==========================================
    ``Tree(8)``               balanced, ``((0+1)+(2+3))+((4+5)+(6+7))``
    ``Tree(8, (8,))``         one chain, ``((((((0+1)+2)+3)+4)+5)+6)+7``
    ``Tree(8, (4, 2))``       two chains of four and their sum
    ``Tree(7)``               ``((0+1)+(2+3))+((4+5)+6)``
    ``Tree(24, (8,))``        three chains of eight, then a chain of three
    ========================  ==========================================

    Numerics-bearing: ``leaves`` and ``arities`` are part of the contract.

    Guarantee: for every partition of the leaves in contiguous ranges, evaluating the nodes of each range
    (:meth:`nodes`) and finishing from them (:meth:`finish`) performs the very additions of :meth:`reduce`.

    Raises:
        ValueError: ``leaves`` outside 1..256, an arity under 2, or no arity.
    """

    leaves: int
    arities: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arities", tuple(self.arities))
        with Problems("Tree") as problems:
            problems.check(
                isinstance(self.leaves, int) and 1 <= self.leaves <= MAX_LEAVES,
                f"leaves = {self.leaves!r} is not an integer in 1..{MAX_LEAVES}; leaves are shards, not tiles: 8 is usual",
            )
            problems.check(len(self.arities) > 0, "arities is empty; (2,) is the balanced tree")
            for arity in self.arities:
                problems.check(
                    isinstance(arity, int) and arity >= 2,
                    f"arity {arity!r} is not an integer >= 2; a level of arity 1 would add nothing",
                )

    @classmethod
    def balanced(cls, leaves: int) -> Tree:
        """Pairs of pairs: one value per rank on every power-of-two mesh that divides the leaves."""
        return cls(leaves, (2,))

    @classmethod
    def chain(cls, leaves: int) -> Tree:
        """One left-deep chain: a single running sum, the cheapest in a kernel, more values between ranks."""
        return cls(leaves, (max(2, leaves),))

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """The arities as completed for this number of leaves, the last level cut to what is left.

        Two trees with equal ``leaves`` and ``levels`` are the same tree.
        """
        count = self.leaves
        found: list[int] = []
        while count > 1:
            arity = self.arities[min(len(found), len(self.arities) - 1)]
            found.append(min(arity, count))
            count = -(-count // arity)
        return tuple(found)

    @cached_property
    def root(self) -> Node:
        nodes = [Node(i, i + 1) for i in range(self.leaves)]
        for arity in self.levels:
            nodes = [_chain(nodes[i : i + arity]) for i in range(0, len(nodes), arity)]
        return nodes[0]

    def reduce(self, values: Sequence[T], add: Callable[[T, T], T]) -> T:
        """The canonical sum of one value per leaf."""
        if len(values) != self.leaves:
            raise ValueError(f"Tree.reduce: {len(values)} values for {self.leaves} leaves")
        return self.root.evaluate(lambda i: values[i], add)

    def nodes(self, start: int, stop: int) -> tuple[Node, ...]:
        """The fewest whole nodes that cover leaves ``start`` to ``stop - 1``, in order."""
        if not 0 <= start <= stop <= self.leaves:
            raise ValueError(f"Tree.nodes: leaves {start}..{stop} are not a range inside 0..{self.leaves}")

        def walk(node: Node) -> Iterator[Node]:
            if node.stop <= start or stop <= node.start:
                return
            if start <= node.start and node.stop <= stop:
                yield node
            elif node.left is not None and node.right is not None:
                yield from walk(node.left)
                yield from walk(node.right)

        return tuple(walk(self.root))

    def finish(self, nodes: Mapping[tuple[int, int], T], add: Callable[[T, T], T]) -> T:
        """The canonical sum from the values of disjoint nodes, keyed by their spans, that cover all leaves."""

        def walk(node: Node) -> T:
            if node.span in nodes:
                return nodes[node.span]
            if node.left is None or node.right is None:
                raise ValueError(f"Tree.finish: no node covers leaf {node.start}; got {sorted(nodes)}")
            return add(walk(node.left), walk(node.right))

        return walk(self.root)

    def __str__(self) -> str:
        return str(self.root)


def leaf_ranges(leaves: int, ranks: int) -> tuple[range, ...]:
    """The leaves of every rank: contiguous, as even as can be, the first ranks one more.

    >>> leaf_ranges(8, 3)
    (range(0, 3), range(3, 6), range(6, 8))

    Raises:
        ValueError: fewer than one rank, or more ranks than leaves.
    """
    if not 1 <= ranks <= leaves:
        raise ValueError(
            f"leaf_ranges: {ranks} ranks over {leaves} leaves; a mesh axis has at least one rank and at most one per leaf. "
            f"Use a smaller mesh, or a contract with more leaves (another contract has other bits)"
        )
    size, extra = divmod(leaves, ranks)
    starts = [rank * size + min(rank, extra) for rank in range(ranks + 1)]
    return tuple(range(a, b) for a, b in pairwise(starts))


@dataclass(frozen=True)
class Schedule:
    """A tree as ``ranks`` ranks perform it: each reduces its own nodes, all finish the same tree.

    ``rank_nodes[r]`` are the nodes of rank r's leaf range. ``width`` is the largest number of them: how many values a
    rank sends. ``slots`` is the largest number of leaves on a rank: SPMD programs give every rank that many, and the
    slots behind a shorter range are never read.
    """

    tree: Tree
    ranks: int

    @cached_property
    def ranges(self) -> tuple[range, ...]:
        return leaf_ranges(self.tree.leaves, self.ranks)

    @cached_property
    def rank_nodes(self) -> tuple[tuple[Node, ...], ...]:
        return tuple(self.tree.nodes(r.start, r.stop) for r in self.ranges)

    @cached_property
    def slots(self) -> int:
        return max(len(r) for r in self.ranges)

    @cached_property
    def width(self) -> int:
        return max(len(nodes) for nodes in self.rank_nodes)

    @cached_property
    def is_uniform(self) -> bool:
        """Every rank has the same leaves and additions relative to its first leaf: one program serves all ranks."""
        return len({self.local_shape(rank) for rank in range(self.ranks)}) == 1

    @cached_property
    def is_butterfly(self) -> bool:
        """One node per rank, a power of two of ranks, and pairs of pairs above: rank r and r ^ 2**i may exchange."""
        if self.ranks & (self.ranks - 1) or self.width != 1 or not self.is_uniform:
            return False

        def balanced(node: Node, ranks: int) -> bool:
            if ranks == 1:
                return True
            if node.left is None or node.right is None:
                return False
            size = (node.stop - node.start) // 2
            equal = node.left.stop - node.left.start == size == node.right.stop - node.right.start
            return equal and balanced(node.left, ranks // 2) and balanced(node.right, ranks // 2)

        return balanced(self.tree.root, self.ranks)

    def local_shape(self, rank: int) -> tuple[object, ...]:
        return tuple(node.shape() for node in self.rank_nodes[rank])

    def reduce_local(self, rank: int, slots: Sequence[T], add: Callable[[T, T], T]) -> list[T]:
        """The node values of ``rank`` from its leaf values, slot 0 being its first leaf."""
        first = self.ranges[rank].start
        return [node.evaluate(lambda i: slots[i - first], add) for node in self.rank_nodes[rank]]

    def finish(self, values: Sequence[Sequence[T]], add: Callable[[T, T], T]) -> T:
        """The canonical sum from ``values[rank][i]``, the value of the i-th node of that rank."""
        known = {
            node.span: values[rank][i] for rank, nodes in enumerate(self.rank_nodes) for i, node in enumerate(nodes)
        }
        return self.tree.finish(known, add)

    @cached_property
    def sends_leaves(self) -> bool:
        """Some rank's nodes are its leaves, so that sending leaves from all of them moves no value more."""
        return not self.is_uniform and self.width == self.slots

    def finish_leaves(self, values: Sequence[Sequence[T]], add: Callable[[T, T], T]) -> T:
        """The canonical sum from ``values[rank][i]``, the value of that rank's i-th leaf."""
        known = {(leaf, leaf + 1): values[rank][leaf - r.start] for rank, r in enumerate(self.ranges) for leaf in r}
        return self.tree.finish(known, add)


@lru_cache(maxsize=512)
def schedule(tree: Tree, ranks: int) -> Schedule:
    """The cached :class:`Schedule`; fails for more ranks than leaves."""
    leaf_ranges(tree.leaves, ranks)
    return Schedule(tree, ranks)
