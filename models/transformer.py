"""The Llama family in Flax NNX: Llama 3, SmolLM2, Mistral, Qwen3.

The modules run inside ``jax.shard_map``: parameters are this rank's, activations are whole. Layers are stacked in one
module and scanned, so that compile time does not grow with depth.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from tbik_jax import dense
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.layout import Layout
from tbik_jax.models.linear import DATA, TENSOR, Linear, Origin, parameter
from tbik_jax.models.rope import rope_tables
from tbik_jax.numerics import Numerics

Array = jax.Array


class KVCache(NamedTuple):
    """Keys and values of all layers: ``[layers, B, kv_slots, S, D]``, position s in row s, slots split over TENSOR."""

    k: Array
    v: Array

    #: How the cache lies on a mesh of (DATA, TENSOR).
    @staticmethod
    def spec() -> KVCache:
        spec = P(None, DATA, TENSOR)
        return KVCache(spec, spec)  # type: ignore[arg-type]


class Block(nnx.Module):
    """All layers of the model, stacked; a call sees one of them."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: DTypeLike) -> None:
        layers, hidden, dim = range(config.num_layers), config.hidden_size, config.head_dim

        def names(part: str) -> tuple[str, ...]:
            return tuple(f"model.layers.{i}.{part}.weight" for i in layers)

        def norm(part: str, size: int) -> nnx.Param[Array]:
            return parameter(Origin(names(part), stacked=True), (size,), dtype)

        def linear(
            kind: Literal["column", "row"], slots: tuple[int, ...], leaves: int, bias: bool, **widths: int
        ) -> Linear:
            """Projections by Hugging Face name; ``k_proj`` and ``v_proj`` lie by KV head, all others by leaf."""
            group = "mlp" if slots is mlp_slots else "self_attn"
            origins = {
                name: Origin(
                    names(f"{group}.{name}"),
                    "rows" if kind == "column" else "columns",
                    layout.kv_slots if name in ("k_proj", "v_proj") else slots,
                    width,
                    stacked=True,
                )
                for name, width in widths.items()
            }
            return Linear(kind, origins, other=hidden, leaves=leaves, bias=bias, dtype=dtype)

        head_slots, mlp_slots = layout.slots_of(layout.heads), layout.slots_of(layout.mlp)
        head_width, mlp_width = layout.heads_per_leaf * dim, config.intermediate_size // layout.mlp_leaves
        self.config, self.layout = config, layout
        self.attention_norm = norm("input_layernorm", hidden)
        bias = config.attention_bias
        self.qkv = linear("column", head_slots, layout.head_leaves, bias, q_proj=head_width, k_proj=dim, v_proj=dim)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("self_attn.q_norm", dim), norm("self_attn.k_norm", dim)
        self.out = linear("row", head_slots, layout.head_leaves, bias, o_proj=head_width)
        self.mlp_norm = norm("post_attention_layernorm", hidden)
        bias = config.mlp_bias
        self.gate_up = linear("column", mlp_slots, layout.mlp_leaves, bias, gate_proj=mlp_width, up_proj=mlp_width)
        self.down = linear("row", mlp_slots, layout.mlp_leaves, bias, down_proj=mlp_width)

    def __call__(
        self,
        numerics: Numerics,
        x: Array,
        rotary: tuple[Array, Array],
        positions: Array,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Array, KVCache | None]:
        with jax.named_scope("attention"):
            y, cache = self._attend(numerics, x, rotary, positions, cache, layer)
        with jax.named_scope("mlp"):
            x, normal = numerics.add_rms_norm(x, y, self.mlp_norm[...], self.config.rms_norm_eps)
            gate, up = self.gate_up(numerics, normal)
            (y,) = self.down(numerics, numerics.swiglu(gate, up))
            return numerics.add(x, y), cache

    def _attend(
        self,
        numerics: Numerics,
        x: Array,
        rotary: tuple[Array, Array],
        positions: Array,
        cache: KVCache | None,
        layer: Array,
    ) -> tuple[Array, KVCache | None]:
        config, layout = self.config, self.layout
        q, k, v = self.qkv(numerics, numerics.rms_norm(x, self.attention_norm[...], config.rms_norm_eps))
        q, k, v = (a.reshape(*a.shape[:-1], -1, config.head_dim) for a in (q, k, v))
        if config.qk_norm:
            q = numerics.norm_rope(q, self.q_norm[...], config.rms_norm_eps, *rotary)
            k = numerics.norm_rope(k, self.k_norm[...], config.rms_norm_eps, *rotary)
        else:
            q, k = numerics.rope(q, *rotary), numerics.rope(k, *rotary)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None:
            cache = KVCache(_write(cache.k, k, layer, positions), _write(cache.v, v, layer, positions))
            k, v = (lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in cache)
        kv_head_of = None
        if layout.kv_of_head is not None:
            kv_head_of = jnp.array(layout.kv_of_head)[lax.axis_index(TENSOR)]
        y = numerics.attention(q, k, v, positions, config.head_dim**-0.5, kv_head_of)
        return self.out(numerics, y.reshape(*y.shape[:2], -1))[0], cache


def _write(cache: Array, new: Array, layer: Array, positions: Array) -> Array:
    """Put ``new [B, kv, T, D]`` at ``cache[layer, b, :, positions[b, 0]:]``, in place inside the scan."""
    zero = jnp.zeros((), positions.dtype)
    for b in range(new.shape[0]):
        at = (layer.astype(positions.dtype), zero + b, zero, positions[b, 0], zero)
        cache = lax.dynamic_update_slice(cache, new[None, b : b + 1].astype(cache.dtype), at)
    return cache


class Transformer(nnx.Module):
    """A decoder-only transformer of the Llama family; call it inside ``jax.shard_map``.

    Args:
        config: The model.
        numerics: :meth:`Numerics.invariant` with a contract, or :meth:`Numerics.plain`.
        ranks: Size of the mesh's TENSOR axis.
        dtype: Dtype of parameters and activations, f32 or bf16. Sums are f32 in any case.

    Parameters are zeros; :mod:`tbik_jax.models.loading` fills them.

    Guarantee (invariant numerics): the logits of a token depend on the tokens up to it, the parameters, the contract and
    ``dtype``; not on the mesh, the batch, padding, chunking, or whether a cache was used.

    Raises:
        ValueError: more ranks than a dimension has leaves.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, *, ranks: int, dtype: DTypeLike = jnp.float32) -> None:
        layout = Layout(config, numerics.contract, ranks)
        self.config, self.numerics, self.layout, self.dtype = config, numerics, layout, jnp.dtype(dtype).name
        width = -(-config.vocab_size // layout.vocab_leaves)
        slots = layout.slots_of(layout.vocab)
        rows = Origin(("model.embed_tokens.weight",), "rows", slots, width)
        self.embedding = parameter(rows, (config.hidden_size,), dtype)
        self.blocks = Block(config, layout, dtype)
        self.final_norm = parameter(Origin(("model.norm.weight",)), (config.hidden_size,), dtype)
        tied = config.tie_word_embeddings
        origin = rows if tied else Origin(("lm_head.weight",), "rows", slots, width)
        self.head = Linear(
            "column",
            {"lm_head": origin},
            other=config.hidden_size,
            leaves=layout.vocab_leaves,
            bias=False,
            dtype=dtype,
            shared=self.embedding if tied else None,
        )

    @property
    def vocabulary(self) -> dense.Vocabulary:
        return dense.Vocabulary(self.config.vocab_size, self.numerics.contract, TENSOR)

    def pack(self, mesh: jax.sharding.Mesh) -> None:
        """Lay all weights out for inference, in place. Bits do not change; gradients are no longer to be had."""
        for linear in (self.blocks.qkv, self.blocks.out, self.blocks.gate_up, self.blocks.down, self.head):
            linear.pack(self.numerics, mesh)

    def __call__(
        self, tokens: Array, positions: Array, cache: KVCache | None = None, *, only: Array | None = None
    ) -> tuple[Array, KVCache | None]:
        """Logits of ``tokens [B, T]`` at ``positions [B, T]`` (consecutive in a row), and the cache with them in it.

        Without a cache the row is the whole context and starts at position 0. ``only [B]`` picks one column of T per row,
        whose logits alone are computed.

        Returns:
            ``([B, T or 1, V] f32, the same on every rank of TENSOR; the cache or None)``.
        """
        numerics, config = self.numerics, self.config
        length = tokens.shape[1] if cache is None else cache.k.shape[3]
        cos, sin = (jnp.asarray(table)[positions] for table in rope_tables(config, length))
        table = self.embedding[...].reshape(-1, config.hidden_size)
        x = numerics.embedding(tokens, table, self.vocabulary)
        graph, stacked = nnx.split(self.blocks)

        def one(carry: tuple[Array, Any], layer_and_state: tuple[Array, Any]) -> tuple[tuple[Array, Any], None]:
            layer, state = layer_and_state
            x, cache = nnx.merge(graph, state)(numerics, carry[0], (cos, sin), positions, carry[1], layer)
            return (x, cache), None

        (x, cache), _ = lax.scan(one, (x, cache), (jnp.arange(config.num_layers), stacked))
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        x = numerics.rms_norm(x, self.final_norm[...], config.rms_norm_eps)
        with jax.named_scope("logits"):
            (logits,) = self.head(numerics, x, jnp.float32)
        return dense.gather_logits(logits, self.vocabulary), cache
