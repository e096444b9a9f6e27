"""Random weights drawn on the devices that hold them: for measuring models whose weights are elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from tbik_jax.kernels.exact import cast, product
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.linear import Origin
from tbik_jax.models.loading import abstract, check_mesh
from tbik_jax.models.source import expected_tensors
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics
from tbik_jax.shapes import MODELS

Array = jax.Array

_SIZES = MODELS["qwen3-8b"]

#: Qwen3-8B's public configuration.
QWEN3_8B = ModelConfig(
    architecture="qwen3",
    vocab_size=_SIZES.vocabulary,
    hidden_size=_SIZES.hidden,
    intermediate_size=_SIZES.intermediate,
    num_layers=36,
    num_heads=_SIZES.heads,
    num_kv_heads=_SIZES.kv_heads,
    head_dim=_SIZES.head_dim,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    rope_scaling=None,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=True,
    bos_token_id=None,
    eos_token_ids=(),
    dtype="bfloat16",
)


def draw(
    config: ModelConfig,
    numerics: Numerics,
    mesh: Mesh,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    ranks: int | None = None,
    seed: int = 0,
) -> Transformer:
    """A model with random weights, drawn where they lie: seconds for billions of them, and no host memory.

    Uniform with standard deviation ``1 / sqrt(inputs)``, norms near one. ``ranks`` as in :func:`tbik_jax.models.loading.load`.

    Guarantee: a tensor depends on (seed, name, shape, dtype) alone, on every mesh: a hash of every element's index, and one
    rounded product.
    """
    check_mesh(config, numerics, mesh, dtype, ranks)
    graph, state = nnx.split(abstract(config, numerics, mesh, dtype, ranks))
    shapes = expected_tensors(config)
    filled = jax.tree.map(lambda p: _drawn(p, shapes, mesh, seed), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return nnx.merge(graph, filled)


def _drawn(
    parameter: nnx.Variable[Any], shapes: dict[str, tuple[int, ...]], mesh: Mesh, seed: int
) -> nnx.Variable[Any]:
    meta = parameter.get_metadata()
    origin, of_one = meta["origin"], shapes[meta["origin"].tensors[0]]
    middle, spread = 0.0, (12.0 / of_one[-1]) ** 0.5
    if origin.tensors[0].endswith("norm.weight"):
        middle, spread = 1.0, 0.25
    nameless = replace(origin, tensors=())
    fill = _filler(nameless, of_one, middle, spread, jnp.dtype(parameter.dtype), NamedSharding(mesh, meta["spec"]))
    return parameter.replace(fill(np.array([_hashed(f"{seed}/{name}") for name in origin.tensors], np.uint32)))


@cache
def _filler(
    origin: Origin, shape: tuple[int, ...], middle: float, spread: float, dtype: np.dtype[Any], sharding: NamedSharding
) -> Callable[[np.ndarray], Array]:
    """``keys [layers, 2] -> weights``, compiled once for all parameters and models of the same layout."""

    def one(key: Array) -> Array:
        raw = jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), shape, jnp.uint32)
        x = product((raw >> 9).astype(jnp.float32) - np.float32(2**22 - 0.5), float(np.float32(spread * 2.0**-23)))
        x = cast(x + middle, dtype)
        if origin.cut == "whole":
            return x
        axis, slots = (0 if origin.cut == "rows" else 1), np.array(origin.slots)
        blocks = -(-x.shape[axis] // origin.width)
        x = jnp.pad(x, [(0, blocks * origin.width - n if i == axis else 0) for i, n in enumerate(x.shape)])
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, origin.width, *x.shape[axis + 1 :]), axis, 0)
        held = (slots >= 0).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(held, x[np.maximum(slots, 0)], jnp.zeros((), x.dtype))

    return jax.jit(lambda keys: jax.lax.map(one, keys) if origin.stacked else one(keys[0]), out_shardings=sharding)


def _hashed(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
