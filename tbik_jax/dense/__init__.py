"""Layers of a transformer whose bits no mesh can change. Call them inside ``jax.shard_map``, or on one device.

Linear layers take weights ``[N, K]`` (output, input), as Hugging Face stores them, and an explicit
:class:`tbik_jax.Contract`.
"""

from tbik_jax.dense.heads import head_parallel_norm_rope
from tbik_jax.dense.linear import (
    column_parallel,
    column_parallel_parts,
    column_parallel_swiglu,
    make_dot_general,
    row_parallel,
    row_parallel_add_norm,
)
from tbik_jax.dense.vocabulary import (
    Vocabulary,
    cross_entropy,
    embedding,
    gather_logits,
    log_softmax,
    log_sum_exp,
    logits,
    mask_logits,
)
from tbik_jax.kernels.attention import attention, paged_attention
from tbik_jax.kernels.kv_cache import write_kv
from tbik_jax.kernels.matmul import PackedWeight, pack
from tbik_jax.kernels.norm_rope import norm_rope
from tbik_jax.kernels.residual import add
from tbik_jax.kernels.rms_norm import add_rms_norm, rms_norm
from tbik_jax.kernels.rope import rope
from tbik_jax.kernels.swiglu import swiglu
from tbik_jax.kernels.token_sum import token_sum

__all__ = [
    "PackedWeight",
    "Vocabulary",
    "add",
    "add_rms_norm",
    "attention",
    "column_parallel",
    "column_parallel_parts",
    "column_parallel_swiglu",
    "cross_entropy",
    "embedding",
    "gather_logits",
    "head_parallel_norm_rope",
    "log_softmax",
    "log_sum_exp",
    "logits",
    "make_dot_general",
    "mask_logits",
    "norm_rope",
    "pack",
    "paged_attention",
    "rms_norm",
    "rope",
    "row_parallel",
    "row_parallel_add_norm",
    "swiglu",
    "token_sum",
    "write_kv",
]
