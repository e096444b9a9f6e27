"""A tree as one worker performs it: one leaf after the other, with the sums that wait kept on a stack.

After leaf l its value meets the sums that wait for it, and then waits itself, or is a node that leaves. Sums wait in storages:
in a kernel storage 0 is registers, every further one is slower. A sum under which no other has to wait goes to storage 0; the
values of a chain never leave it, so a chain costs one addition per leaf and nothing else.

Pure Python; the bits of a sum do not depend on anything here but the order of the additions, which is the tree's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tbik_jax.tree import Node

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What follows leaf l: add the sums that wait in ``pops`` (ascending), then wait in ``push``, or leave as a node."""

    pops: tuple[int, ...]
    push: int | None  # None: the value is the node that ends here


@dataclass(frozen=True)
class Program:
    """The steps of a rank's nodes, over its leaves in order.

    ``storages`` is how many places are needed for sums that wait. ``ends[i]`` is the leaf after which node i is whole.
    """

    steps: tuple[Step, ...]
    ends: tuple[int, ...]

    @property
    def leaves(self) -> int:
        return len(self.steps)

    @property
    def storages(self) -> int:
        return 1 + max((s.push for s in self.steps if s.push is not None), default=-1)

    @property
    def is_chain(self) -> bool:
        """One node, whose running sum meets leaf after leaf."""
        return len(self.ends) == 1 and all(len(step.pops) == (i > 0) for i, step in enumerate(self.steps))

    def mask(self, holds: Callable[[Step], bool]) -> int:
        """The leaves whose step has a property, as bits."""
        return sum(1 << leaf for leaf, step in enumerate(self.steps) if holds(step))

    def run(self, leaf: Callable[[int], T], add: Callable[[T, T], T]) -> list[T]:
        """What a kernel does, for values that Python can add."""
        waiting: dict[int, T] = {}
        nodes = []
        for index, step in enumerate(self.steps):
            value = leaf(index)
            for storage in step.pops:
                value = add(waiting.pop(storage), value)
            if step.push is None:
                nodes.append(value)
            elif step.push in waiting:
                raise AssertionError(f"storage {step.push} is taken at leaf {index}")
            else:
                waiting[step.push] = value
        return nodes


def program(nodes: Sequence[Node]) -> Program:
    """The program of nodes that cover consecutive leaves in order; leaf 0 of the program is the first of them."""
    steps: list[Step] = []

    def visit(node: Node, destination: int | None) -> None:
        if node.left is None or node.right is None:
            steps.append(Step((), destination))
            return
        # The left sum waits while the right one is computed, above everything that waits in there; and a sum that was
        # taken out of a storage returns to none below it, so that registers hold only sums that never left them.
        place = max(_height(node.right), _highest(node.left))
        visit(node.left, place)
        visit(node.right, destination)
        last = steps[-1]
        steps[-1] = Step((*last.pops, place), last.push)

    ends, first = [], nodes[0].start
    for node in nodes:
        if node.start != first + len(steps):
            raise ValueError(f"program: node {node.span} does not follow leaf {first + len(steps) - 1}")
        visit(node, None)
        ends.append(len(steps) - 1)
    return Program(tuple(steps), tuple(ends))


def _height(node: Node) -> int:
    """How many storages a node needs while it is computed."""
    if node.left is None or node.right is None:
        return 0
    place = max(_height(node.right), _highest(node.left))
    return max(place + 1, _height(node.left))


def _highest(node: Node) -> int:
    """The storage that the last addition of a node takes its left sum from; 0 for a leaf, which comes from none."""
    if node.left is None or node.right is None:
        return 0
    return max(_height(node.right), _highest(node.left))
