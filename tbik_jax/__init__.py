"""Bitwise-identical Flax transformers on any device mesh.

One canonical binary tree orders every reduction: inside a kernel, and across the ranks of a mesh in place of ``psum``.
"""

from tbik_jax import dense
from tbik_jax.collectives import tree_all_gather, tree_psum, tree_psum_scatter
from tbik_jax.contract import CONTRACT_VERSION, Contract, ContractMismatchError
from tbik_jax.emulate import emulate
from tbik_jax.gradients import batch_slots, tree_value_and_grad
from tbik_jax.tree import Tree, leaf_ranges

__version__ = "0.1.0"

__all__ = [
    "CONTRACT_VERSION",
    "Contract",
    "ContractMismatchError",
    "Tree",
    "batch_slots",
    "dense",
    "emulate",
    "leaf_ranges",
    "tree_all_gather",
    "tree_psum",
    "tree_psum_scatter",
    "tree_value_and_grad",
]
