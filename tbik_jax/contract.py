"""The reduction contract: everything that, besides inputs and parameters, decides the bits of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tbik_jax._problems import Problems
from tbik_jax.tree import MAX_LEAVES, Tree

#: The contract's text (docs/contract.md) that this package implements. Any change of bits is a new version.
CONTRACT_VERSION = 1


class ContractMismatchError(ValueError):
    """A model was stored under one contract and is asked to run under another."""


@dataclass(frozen=True)
class Contract:
    """Numerics-bearing settings. Every field is one; whatever is not here may change without changing a bit.

    A model is built with a contract, stores it in its checkpoints, and refuses another.

    Attributes:
        leaves: The largest number of ranks that a dimension may ever be split over. Dimensions whose units (heads,
            columns) this does not divide take the next larger divisor, see :meth:`leaves_for`.
        tree: Arities of the canonical tree from the leaves up, see :class:`tbik_jax.Tree`. ``(2,)`` is balanced.
        kv_block: Keys per block of attention's sums, counted from position 0.
        version: Version of the contract's text. A package implements exactly one.

    Guarantee: the bits of every output are a function of the inputs, the parameters, the contract and the backend
    family (``cpu``, ``sm90``). Mesh, batch, padding, chunking, prefill or decode, and the run do not enter.
    """

    leaves: int = 8
    tree: tuple[int, ...] = (2,)
    kv_block: int = 128
    version: int = CONTRACT_VERSION

    def __post_init__(self) -> None:
        tree: Any = self.tree  # as callers give it
        if isinstance(tree, list):
            object.__setattr__(self, "tree", tree := tuple(tree))
        with Problems("Contract") as problems:
            problems.check(
                isinstance(self.leaves, int) and 1 <= self.leaves <= MAX_LEAVES,
                f"leaves = {self.leaves!r} is not an integer in 1..{MAX_LEAVES}",
            )
            problems.check(
                isinstance(tree, tuple) and len(tree) > 0 and all(isinstance(a, int) and a >= 2 for a in tree),
                f"tree = {tree!r} is not a tuple of arities >= 2; (2,) is the balanced tree, (8,) a chain of eight",
            )
            problems.check(
                isinstance(self.kv_block, int) and self.kv_block > 0 and self.kv_block % 64 == 0,
                f"kv_block = {self.kv_block!r} is not a positive multiple of 64",
            )
            problems.check(
                self.version == CONTRACT_VERSION,
                f"version = {self.version!r}, but this package implements version {CONTRACT_VERSION} only; "
                f"install the tbik-jax release that wrote it",
            )

    def leaves_for(self, units: int) -> int:
        """Leaves of a dimension of ``units`` indivisible units: the smallest divisor of ``units`` that is >= ``leaves``.

        A dimension with fewer units than that has one leaf per unit.

        >>> Contract(leaves=8).leaves_for(1536), Contract(leaves=8).leaves_for(9), Contract(leaves=8).leaves_for(4)
        (8, 9, 4)
        """
        return next((n for n in range(self.leaves, units + 1) if units % n == 0), units)

    def tree_over(self, leaves: int) -> Tree:
        """The canonical tree over that many leaves."""
        return Tree(leaves, self.tree)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tree": list(self.tree)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Contract:
        """The inverse of :meth:`to_dict`. Unknown or missing fields are an error: they would be other bits."""
        names = {field.name for field in fields(cls)}
        with Problems("Contract.from_dict") as problems:
            for name in sorted(names - set(data)):
                problems.add(f"field {name!r} is missing; it was not written by this version of the package")
            for name in sorted(set(data) - names):
                problems.add(
                    f"field {name!r} = {data[name]!r} is unknown here; install the tbik-jax release that wrote it"
                )
        values: dict[str, Any] = {name: data[name] for name in names}
        return cls(**{**values, "tree": tuple(values["tree"])})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        return cls.from_dict(json.loads(text))

    def require(self, asked: Contract) -> None:
        """Fail unless ``asked`` is this contract.

        Raises:
            ContractMismatchError: listing every field that differs.
        """
        mine, other = self.to_dict(), asked.to_dict()
        differing = [
            f"  - {name}: stored {mine[name]!r}, asked {other[name]!r}" for name in mine if mine[name] != other[name]
        ]
        if differing:
            raise ContractMismatchError(
                "the model was stored under another contract; its results would have other bits:\n"
                + "\n".join(differing)
                + "\nUse the stored contract, or convert the weights anew under the contract that you want."
            )
