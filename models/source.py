"""Where weights come from: tensors by Hugging Face name, in Hugging Face orientation, read by rows.

A sharded model asks for the rows of its rank and never holds a whole tensor, so every format reads by rows
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tbik_jax._problems import Problems
from tbik_jax.models.config import ModelConfig

Array = npt.NDArray[Any]

#: The dtypes that a weight may be stored in.
WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

_SHOWN = 20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class TensorSource(Protocol):
    """Named tensors on disk. Matrices are [out, in], as in Hugging Face folders, in every format."""

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that :meth:`read` returns; ``ml_dtypes.bfloat16`` for bfloat16."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows ``start`` to ``stop - 1`` of the first dimension, as an array that owns its memory.

        Raises:
            ValueError: no such tensor, or rows that are not a range inside it.
        """
        ...


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that ``config`` computes with, and its shape; a tied head is not one of them."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        linear(f"{block}.self_attn.q_proj", queries, hidden, config.attention_bias)
        linear(f"{block}.self_attn.k_proj", keys, hidden, config.attention_bias)
        linear(f"{block}.self_attn.v_proj", keys, hidden, config.attention_bias)
        linear(f"{block}.self_attn.o_proj", hidden, queries, config.attention_bias)
        if config.qk_norm:
            shapes[f"{block}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{block}.self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{block}.mlp.gate_proj", ffn, hidden, config.mlp_bias)
        linear(f"{block}.mlp.up_proj", ffn, hidden, config.mlp_bias)
        linear(f"{block}.mlp.down_proj", hidden, ffn, config.mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def validate(source: TensorSource, config: ModelConfig) -> None:
    """Check that ``source`` holds exactly the tensors of ``config``, before any of them is read.

    Two kinds of extra tensor carry nothing and are allowed: ``rotary_emb.inv_freq`` of old files (it
    follows from the configuration), and a tied ``lm_head.weight`` that equals the embedding.

    Raises:
        ValueError: missing or unexpected tensors, wrong shapes, dtypes that are no weight's; the first 20
            of them and how many there are.
    """
    found = list(_violations(source, config))
    with Problems("weights") as problems:
        for message in found[:_SHOWN]:
            problems.add(message)
        if len(found) > _SHOWN:
            problems.add(f"and {len(found) - _SHOWN} more, {len(found)} in all")


def check_rows(name: str, rows: int, start: int, stop: int | None) -> tuple[int, int]:
    """``start`` and ``stop`` of a read, with the end filled in."""
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"{name}: rows {start}..{stop} are not a range inside its {rows} rows")
    return start, stop


def no_such_tensor(where: object, name: str) -> ValueError:
    """The error of every source for an unknown name."""
    return ValueError(f"{where}: no tensor {name!r}; names() lists those that there are")


def _violations(source: TensorSource, config: ModelConfig) -> Iterator[str]:
    expected, present = expected_tensors(config), source.names()
    for name, shape in expected.items():
        if name not in present:
            yield f"{name} {list(shape)} is missing"
            continue
        if source.shape(name) != shape:
            yield f"{name} has shape {list(source.shape(name))}, and the configuration asks for {list(shape)}"
        if source.dtype(name) not in WEIGHT_DTYPES:
            yield f"{name} is stored as {source.dtype(name)}; weights are float32, bfloat16 or float16"
    for name in sorted(present - expected.keys()):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == _HEAD and config.tie_word_embeddings:
            if _EMBEDDING in present and not _equal(source, _HEAD, _EMBEDDING):
                yield (
                    f"{_HEAD} differs from {_EMBEDDING}, though tie_word_embeddings is true; set it to false "
                    "to use the head, or remove the head"
                )
            continue
        yield f"{name} {list(source.shape(name))} is not part of this architecture; it would be ignored"


def _equal(source: TensorSource, one: str, other: str, rows: int = 8192) -> bool:
    """Bitwise, a slab of rows at a time."""
    if source.shape(one) != source.shape(other) or source.dtype(one) != source.dtype(other):
        return False
    total = source.shape(one)[0]
    slabs = ((start, min(start + rows, total)) for start in range(0, total, rows))
    return all(source.read(one, *slab).tobytes() == source.read(other, *slab).tobytes() for slab in slabs)


class CachedSource:
    """A source that is read once, for loading the same weights onto mesh after mesh. Holds every tensor in memory."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._tensors: dict[str, Array] = {}

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of them."""
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that :meth:`read` returns."""
        return self._source.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows ``start`` to ``stop - 1``."""
        if name not in self._tensors:
            self._tensors[name] = self._source.read(name)
        return self._tensors[name][start:stop]
