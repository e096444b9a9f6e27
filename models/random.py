"""Models with random weights: for tests, for training from scratch, and for shapes whose weights are elsewhere."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from tbik_jax.models.config import ModelConfig
from tbik_jax.models.source import expected_tensors
from tbik_jax.models.tokenizer import Tokenizer

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
