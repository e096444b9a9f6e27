"""``jax.vmap`` that leaves a kernel's shapes alone.

Batched by JAX's own rules, a product gets one more dimension, and with it perhaps another algorithm and other bits; a
kernel written by hand cannot be batched at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap


def one_by_one(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of arrays, which every surrounding ``jax.vmap`` runs for one example after another.

    Outside of ``vmap`` it is ``f`` itself. Nested ``vmap`` nests the loops (``jax.custom_batching.sequential_vmap`` would
    batch ``f`` there). Not differentiable: put it inside of a ``jax.custom_vjp``.

    Guarantee: the bits of an example are those of ``f`` on that example alone.
    """

    @custom_vmap
    def one(*arguments: Any) -> Any:
        return f(*arguments)

    @one.def_vmap
    def each(size: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(arguments)
        varies = jax.tree.leaves(batched)

        def run(examples: list[jax.Array]) -> Any:
            rest = iter(examples)
            whole = [next(rest) if varying else x for x, varying in zip(leaves, varies, strict=True)]
            return one(*jax.tree.unflatten(structure, whole))

        out = lax.map(run, [x for x, varying in zip(leaves, varies, strict=True) if varying])
        return out, jax.tree.map(lambda _: True, out)

    return one
