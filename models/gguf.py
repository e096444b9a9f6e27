"""Weights and configuration of a GGUF file, under Hugging Face names, dequantized by rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_from_byte_shape

from tbik_jax._problems import Problems
from tbik_jax.models._gguf_config import ROPE_FACTORS, fields_from_gguf
from tbik_jax.models._gguf_file import GGUFFile
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.source import Array, check_rows, no_such_tensor

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Formats that are arrays of plain numbers: kept as they are. All others are blocks, and become float32.
_PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    **{GGMLQuantizationType[f"I{bits}"]: np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
}


class GGUFSource:
    """The tensors of a GGUF file of architecture ``llama`` (Mistral's included) or ``qwen3``.

    Quantized tensors are float32, by ``gguf.quants.dequantize``; float32, float16 and bfloat16 ones stay
    so. llama.cpp stores the rows of ``attn_q`` and ``attn_k`` of a llama with the two halves of each head
    interleaved; here they are in Hugging Face's order again. ``config`` is the file's :class:`ModelConfig`,
    ``file`` its metadata.

    Raises:
        ValueError: a file that is missing, truncated, malformed or contradictory; all findings at once.
        NotImplementedError: another architecture, or metadata that would change the function.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = GGUFFile(path)
        self._stored = {_hugging_face_name(name): name for name in self.file.tensors if name != ROPE_FACTORS}
        factors = None
        if ROPE_FACTORS in self.file.tensors:
            factors = self._read(ROPE_FACTORS, slice(None)).astype(np.float64)
        with Problems(str(self.path)) as problems:
            for name, tensor in self.file.tensors.items():
                if tensor.kind not in _PLAIN and not _can_decode(tensor.kind):
                    problems.unsupported(f"{name} is in the block format {tensor.kind.name}, which gguf cannot decode")
            fields = fields_from_gguf(self.file.metadata, self._shapes(), factors, problems)
            fields["dtype"] = self._stored_dtype()
        self.config = ModelConfig.from_dict(fields)
        self._heads = {}
        if self.file.metadata["general.architecture"] == "llama":
            self._heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}

    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[self._stored_name(name)].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return _PLAIN.get(self.file.tensors[self._stored_name(name)].kind, np.dtype(np.float32))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        stored = self._stored_name(name)
        rows = self.shape(name)[0]
        start, stop = check_rows(name, rows, start, stop)
        parts = name.split(".")
        heads = self._heads.get(parts[-2]) if len(parts) > 1 else None
        if heads is None or rows % heads:
            return self._read(stored, slice(start, stop))
        return self._read(stored, interleaved_rows(rows, heads)[start:stop])

    def _read(self, stored: str, rows: slice | npt.NDArray[np.intp]) -> Array:
        tensor = self.file.tensors[stored]
        if len(tensor.shape) == 1:
            # A vector is one run of blocks: it has no rows to read apart.
            return np.array(_decode(self.file.rows(stored, slice(None)), tensor.kind)[rows])
        return _decode(self.file.rows(stored, rows), tensor.kind)

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise no_such_tensor(self.path, name)
        return self._stored[name]

    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self._stored}

    def _stored_dtype(self) -> str:
        """The dtype of the matrices if they share one that is a weight's; norms are float32 in every file."""
        found = {str(self.dtype(name)) for name, shape in self._shapes().items() if len(shape) > 1}
        only = found.pop() if len(found) == 1 else "float32"
        return only if only in ("float16", "bfloat16") else "float32"


def interleaved_rows(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Where llama.cpp stores each row of a Hugging Face query or key projection.

    Hugging Face rotates dimension i with i + head_dim/2, llama.cpp 2 i with 2 i + 1; so row (head, half, i)
    is stored at (head, i, half).
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _hugging_face_name(name: str) -> str:
    """The Hugging Face name; a tensor without one keeps its own, for ``validate`` to refuse."""
    stem, _, kind = name.rpartition(".")
    if stem in _MODEL_NAMES:
        return f"{_MODEL_NAMES[stem]}.{kind}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _BLOCK_NAMES:
        return f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}.{kind}"
    return name


def _can_decode(kind: GGMLQuantizationType) -> bool:
    _, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decode(stored: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> Array:
    if kind in _PLAIN:
        return stored.view(_PLAIN[kind])
    if stored.size == 0:
        return np.empty(quant_shape_from_byte_shape(stored.shape, kind), np.float32)
    return np.asarray(dequantize(stored, kind), np.float32)
