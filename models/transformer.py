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
    """Keys and values, position s in row s, slots split over TENSOR.

    ``[layers, B, kv_slots, S, D]`` of all layers, or ``[B, kv_slots, S, D]`` of each where the model's layers are apart.
    """

    k: Any
    v: Any

    @staticmethod
    def spec(*, stacked: bool = True) -> KVCache:
        """How the cache lies on a mesh of (DATA, TENSOR)."""
        spec = P(None, DATA, TENSOR) if stacked else P(DATA, TENSOR)
        return KVCache(spec, spec)


class Block(nnx.Module):
    """All layers of the model, stacked, or one of them; a call sees one."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: DTypeLike) -> None:
        layers, hidden, dim = range(config.num_layers), config.hidden_size, config.head_dim

        def names(part: str) -> tuple[str, ...]:
            return tuple(f"model.layers.{i}.{part}.weight" for i in layers)

        def norm(part: str, size: int) -> nnx.Param[Array]:
            return parameter(Origin(names(part), stacked=True), (size,), dtype)

        def linear(kind: Literal["column", "row"], slots: tuple[int, ...], bias: bool, **widths: int) -> Linear:
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
            leaves = tuple(layout.leaves_of(origin.slots) for origin in origins.values())
            return Linear(kind, origins, other=hidden, leaves=leaves, bias=bias, dtype=dtype)

        head_slots, mlp_slots = layout.slots_of(layout.heads), layout.slots_of(layout.mlp)
        head_width, mlp_width = layout.heads_per_leaf * dim, config.intermediate_size // layout.mlp_leaves
        self.config, self.layout = config, layout
        self.attention_norm = norm("input_layernorm", hidden)
        bias = config.attention_bias
        self.qkv = linear("column", head_slots, bias, q_proj=head_width, k_proj=dim, v_proj=dim)
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("self_attn.q_norm", dim), norm("self_attn.k_norm", dim)
        self.out = linear("row", head_slots, bias, o_proj=head_width)
        self.mlp_norm = norm("post_attention_layernorm", hidden)
        bias = config.mlp_bias
        self.gate_up = linear("column", mlp_slots, bias, gate_proj=mlp_width, up_proj=mlp_width)
        self.down = linear("row", mlp_slots, bias, down_proj=mlp_width)

    def __call__(
        self,
        numerics: Numerics,
        x: Array,
        normal: Array,
        next_norm: Array,
        rotary: tuple[Array, Array],
        positions: Array,
        cache: KVCache | None,
        layer: Array | None,
    ) -> tuple[Array, Array, KVCache | None]:
        """``x`` and its norm, to those of the next layer: a sum and the norm after it are one pass over memory.

        ``cache`` holds all layers, of which this is number ``layer``; or this one alone, and ``layer`` is None.
        """
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            heads, cache = self._attend(numerics, normal, rotary, positions, cache, layer)
            x, normal = self.out.add_norm(numerics, heads, x, self.mlp_norm[...], eps)
        with jax.named_scope("mlp"):
            gated = self.gate_up.gated(numerics, normal)
            return *self.down.add_norm(numerics, gated, x, next_norm, eps), cache

    def _attend(
        self,
        numerics: Numerics,
        normal: Array,
        rotary: tuple[Array, Array],
        positions: Array,
        cache: KVCache | None,
        layer: Array | None,
    ) -> tuple[Array, KVCache | None]:
        config, layout = self.config, self.layout
        q, k, v = self.qkv(numerics, normal)
        q, k, v = (a.reshape(*a.shape[:-1], -1, config.head_dim) for a in (q, k, v))
        if config.qk_norm:
            norms = self.q_norm[...], self.k_norm[...]
            leaves = self.qkv.leaves[0], self.qkv.leaves[1]
            q, k = numerics.norm_rope(q, k, *norms, config.rms_norm_eps, *rotary, TENSOR, leaves)
        else:
            q, k = numerics.rope(q, *rotary), numerics.rope(k, *rotary)
        if cache is None:
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        elif layer is None:
            cache = KVCache(*numerics.write_kv(*cache, k, v, positions))
            k, v = cache
        else:
            cache = KVCache(*(_write(of, new, layer, positions) for of, new in zip(cache, (k, v), strict=True)))
            k, v = (lax.dynamic_index_in_dim(of, layer, keepdims=False) for of in cache)
        kv_head_of = None
        if layout.kv_of_head is not None:
            kv_head_of = jnp.array(layout.kv_of_head)[lax.axis_index(TENSOR)]
        y = numerics.attention(q, k, v, positions, config.head_dim**-0.5, kv_head_of)
        return y.reshape(*y.shape[:2], -1), cache


def _write(cache: Array, new: Array, layer: Array, positions: Array) -> Array:
    """Put ``new [B, T, kv, D]`` at ``cache[layer, b, :, positions[b, 0]:]``, in place inside the scan."""
    new, zero = new.swapaxes(1, 2), jnp.zeros((), positions.dtype)
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
        self.blocks: Block | nnx.List[Block] = Block(config, layout, dtype)
        self.final_norm = parameter(Origin(("model.norm.weight",)), (config.hidden_size,), dtype)
        tied = config.tie_word_embeddings
        origin = rows if tied else Origin(("lm_head.weight",), "rows", slots, width)
        self.head = Linear(
            "column",
            {"lm_head": origin},
            other=config.hidden_size,
            leaves=(layout.vocab_leaves,),
            bias=False,
            dtype=dtype,
            shared=self.embedding if tied else None,
        )

    @property
    def vocabulary(self) -> dense.Vocabulary:
        return dense.Vocabulary(self.config.vocab_size, self.numerics.contract, TENSOR)

    def pack(self, mesh: jax.sharding.Mesh) -> None:
        """Lay all weights out for inference, in place. Bits do not change; gradients are no longer to be had."""
        for block in [self.blocks] if isinstance(self.blocks, Block) else self.blocks:
            for linear in (block.qkv, block.out, block.gate_up, block.down):
                linear.pack(self.numerics, mesh)
        self.head.pack(self.numerics, mesh)

    def unstack(self, mesh: jax.sharding.Mesh) -> None:
        """Give every layer arrays of its own, in place. Performance-only.

        A kernel that reads one layer of a stack reads a copy, made at each call; a program that scans a stack is compiled
        once for all layers. The former matters on GPUs.
        """
        if not isinstance(self.blocks, Block):
            return
        graph, state = nnx.split(self.blocks)
        variables, structure = jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
        apart = []
        for variable in variables:
            spec = variable.get_metadata()["spec"]
            rest = P(*spec[1:])
            cut = jax.jit(jax.shard_map(lambda x: [*x], mesh=mesh, in_specs=spec, out_specs=rest))
            apart.append([variable.replace(x, spec=rest) for x in cut(variable[...])])
        self.blocks = nnx.List(
            [nnx.merge(graph, jax.tree.unflatten(structure, layer)) for layer in zip(*apart, strict=True)]
        )

    def __call__(
        self, tokens: Array, positions: Array, cache: KVCache | None = None, *, only: Array | None = None
    ) -> tuple[Array, KVCache | None]:
        """Logits of ``tokens [B, T]`` at ``positions [B, T]`` (consecutive in a row), and the cache with them in it.

        Without a cache the row is the whole context and starts at position 0. ``only [B]`` picks one column of T per row,
        whose logits alone are computed.

        Returns:
            ``([B, T or 1, V] f32, the same on every rank of TENSOR; the cache or None)``.
        """
        logits, cache = self.local_logits(tokens, positions, cache, only)
        return dense.gather_logits(logits, self.vocabulary), cache

    def cross_entropy(self, tokens: Array, positions: Array, labels: Array) -> Array:
        """``-log p(labels)``, f32 ``[B, T]``, the same on every rank of TENSOR; 0 where a label is no token (-100, say).

        ``labels [B, T]`` are what follows ``tokens``. The logits of the vocabulary stay on the ranks that hold them.
        """
        logits, _ = self.local_logits(tokens, positions)
        return self.numerics.cross_entropy(logits, labels, self.vocabulary)

    def local_logits(
        self, tokens: Array, positions: Array, cache: KVCache | None = None, only: Array | None = None
    ) -> tuple[Array, KVCache | None]:
        """What a call gathers: ``[B, T or 1, slots * width]`` f32, of this rank's part of the vocabulary; and the cache."""
        numerics, config = self.numerics, self.config
        length = tokens.shape[1] if cache is None else jax.tree.leaves(cache)[0].shape[-2]
        cos, sin = (jnp.asarray(table)[positions] for table in rope_tables(config, length))
        table = self.embedding[...].reshape(-1, config.hidden_size)
        x = numerics.embedding(tokens, table, self.vocabulary)
        if cache is not None:
            numerics = numerics.opened(TENSOR, x, (self.layout.head_leaves, self.layout.mlp_leaves))
        run = self._scanned if isinstance(self.blocks, Block) else self._unrolled
        normal, cache = run(numerics, x, (cos, sin), positions, cache)
        if only is not None:
            normal = jnp.take_along_axis(normal, only[:, None, None], axis=1)
        with jax.named_scope("logits"):
            (logits,) = self.head(numerics, normal, jnp.float32)
        return logits, cache

    def _scanned(
        self, numerics: Numerics, x: Array, rotary: tuple[Array, Array], positions: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        graph, stacked = nnx.split(self.blocks)
        norms = self.blocks.attention_norm[...]  # type: ignore[union-attr]
        next_norms = jnp.concatenate([norms[1:], self.final_norm[...][None]])

        def one(carry: tuple[Array, Array, Any], of_layer: tuple[Array, Array, Any]) -> tuple[Any, None]:
            x, normal, cache = carry
            layer, next_norm, state = of_layer
            block = nnx.merge(graph, state)
            return block(numerics, x, normal, next_norm, rotary, positions, cache, layer), None

        layers = jnp.arange(self.config.num_layers)
        begin = (x, numerics.rms_norm(x, norms[0], self.config.rms_norm_eps), cache)
        (_, normal, cache), _ = lax.scan(one, begin, (layers, next_norms, stacked))
        return normal, cache

    def _unrolled(
        self, numerics: Numerics, x: Array, rotary: tuple[Array, Array], positions: Array, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        blocks: Any = self.blocks
        graph, _ = nnx.split(blocks[0])

        @jax.jit  # traced once: the layers have the same shapes
        def one(
            state: Any, x: Array, normal: Array, next_norm: Array, rotary: Any, positions: Array, cache: KVCache | None
        ) -> Any:
            return nnx.merge(graph, state)(numerics, x, normal, next_norm, rotary, positions, cache, None)

        norms = [block.attention_norm[...] for block in blocks] + [self.final_norm[...]]
        normal = numerics.rms_norm(x, norms[0], self.config.rms_norm_eps)
        caches = []
        for i, block in enumerate(blocks):
            of_layer = None if cache is None else KVCache(cache.k[i], cache.v[i])
            state = nnx.split(block)[1]
            x, normal, of_layer = one(state, x, normal, norms[i + 1], rotary, positions, of_layer)
            caches.append(of_layer)
        if cache is not None:
            cache = KVCache(tuple(c.k for c in caches), tuple(c.v for c in caches))
        return normal, cache
