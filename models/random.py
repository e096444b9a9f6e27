"""Models with random weights: for tests, for training from scratch, and for shapes whose weights are elsewhere."""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import tokenizers
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from tbik_jax.kernels.exact import cast, product
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.loading import abstract, check_mesh
from tbik_jax.models.source import expected_tensors
from tbik_jax.models.tokenizer import Tokenizer
from tbik_jax.models.transformer import Transformer
from tbik_jax.numerics import Numerics

Array = jax.Array

#: Bytes, and three special tokens behind them.
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

#: Ten query heads on two KV heads divide few meshes evenly; small enough for seconds, deep enough for bits to part.
TINY = ModelConfig(
    architecture="llama",
    vocab_size=256 + len(_SPECIAL),
    hidden_size=200,
    intermediate_size=544,
    num_layers=3,
    num_heads=10,
    num_kv_heads=2,
    head_dim=20,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=False,
    bos_token_id=None,
    eos_token_ids=(),
    dtype="float32",
)


#: Qwen3-8B's public configuration.
QWEN3_8B = ModelConfig(
    architecture="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
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
    seeds = [_hashed(f"{seed}/{name}") for name in origin.tensors]

    def one(key: Array) -> Array:
        raw = jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), of_one, jnp.uint32)
        x = product((raw >> 9).astype(jnp.float32) - np.float32(2**22 - 0.5), np.float32(spread * 2.0**-23))
        x = cast(x + middle, parameter.dtype)
        if origin.cut == "whole":
            return x
        axis, slots = (0, np.array(origin.slots)) if origin.cut == "rows" else (1, np.array(origin.slots))
        blocks = -(-x.shape[axis] // origin.width)
        x = jnp.pad(x, [(0, blocks * origin.width - n if i == axis else 0) for i, n in enumerate(x.shape)])
        x = jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, origin.width, *x.shape[axis + 1 :]), axis, 0)
        held = (slots >= 0).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(held, x[np.maximum(slots, 0)], jnp.zeros((), x.dtype))

    @partial(jax.jit, out_shardings=NamedSharding(mesh, meta["spec"]))
    def all_layers(keys: Array) -> Array:
        return jax.lax.map(one, keys) if origin.stacked else one(keys[0])

    return parameter.replace(all_layers(np.array(seeds, np.uint32)))


def _hashed(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class RandomSource:
    """The tensors of a model, drawn by name: normal with standard deviation ``1 / sqrt(inputs)``, norms near one.

    Guarantee: a tensor depends on (seed, name, shape) alone, whichever rows are read, on every machine.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return expected_tensors(self.config)

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of them."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Always float32."""
        return np.dtype(np.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop - 1``, each drawn from a stream of its own."""
        rows, *rest = self._shapes[name]
        if not 0 <= start <= (stop := rows if stop is None else stop) <= rows:
            raise ValueError(f"RandomSource: rows {start}..{stop} are not inside the {rows} rows of {name}")
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little")
        width = int(np.prod(rest, dtype=np.int64))
        stream = np.random.Philox(key=key)
        # Two uniform draws a number, one block of rows after the other: a row's place in the stream is fixed.
        per_row = -(-2 * width // 4) * 4
        stream.advance(start * per_row // 4)
        raw = stream.random_raw((stop - start) * per_row).reshape(stop - start, per_row)[:, : 2 * width]
        uniform = ((raw >> 11).astype(np.float64) + 0.5) * 2.0**-53
        # The sum of two uniforms has a variance of 1/6: a triangle is normal enough, and needs no libm.
        values = (uniform[:, :width] + uniform[:, width:] - 1.0) * 6.0**0.5
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        else:
            values /= np.sqrt(rest[0] if rest else rows)
        return values.astype(np.float32).reshape(stop - start, *rest)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Tokenizer(backend, eos_token_ids=(), chat_template=template)
