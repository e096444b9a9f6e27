"""The GGUF container: metadata and tensor positions, parsed once; tensor bytes stay on disk.

The ``gguf`` package's own reader makes a NumPy array of every token and merge, seconds for a large
vocabulary, and reports a truncated file as an index error. This one reads the same format in a fraction of
that, and checks every bound. Block formats are left to ``gguf.quants``.

References: the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tbik_jax._problems import Problems

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: NumPy's order of dimensions, the block format, and where its bytes start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one index of the leading dimensions; blocks lie along the last one."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


class GGUFFile:
    """``metadata`` by key and ``tensors`` by name of a little-endian GGUF file, version 2 or 3.

    Raises:
        ValueError: not a GGUF file, truncated, or malformed.
        NotImplementedError: another version or byte order, one part of a split file, an unknown block format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        with Problems(str(self.path)) as problems:
            if not problems.check(self.path.is_file(), "there is no such file"):
                return
            if not problems.check(self.path.stat().st_size >= 24, "it is too short to be a GGUF file"):
                return
            self._bytes = np.memmap(self.path, np.uint8, "r")
            try:
                self._parse(_Cursor(self._bytes), problems)
            except _MalformedError as error:
                problems.add(str(error))

    def rows(self, name: str, indices: slice | npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """The stored bytes of some rows, uint8 [..., row_bytes]; only these are read."""
        tensor = self.tensors[name]
        leading, row = tensor.shape[:-1], tensor.row_bytes
        size = math.prod(leading) * row
        stored = self._bytes[tensor.offset : tensor.offset + size].reshape(*leading, row)
        return np.array(stored[indices])

    def _parse(self, cursor: _Cursor, problems: Problems) -> None:
        magic = cursor.take(4)
        if not problems.check(magic == _MAGIC, f"it starts with {magic!r}, not {_MAGIC!r}; it is not a GGUF file"):
            return
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            found = "big-endian" if swapped else f"version {version}"
            problems.unsupported(f"it is {found}; little-endian GGUF of version 2 or 3 is supported")
            return
        tensors, entries = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(entries):
            key = cursor.string()
            if key in self.metadata:
                raise _MalformedError(f"the key {key} occurs twice")
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        parts = self.metadata.get("split.count", 1)
        if parts > 1:
            problems.unsupported(f"it is one of {parts} parts; merge them with llama-gguf-split --merge")
            return
        infos = [self._tensor_info(cursor) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _MalformedError(f"general.alignment = {alignment!r} is not a power of two")
        data = -(-cursor.position // alignment) * alignment
        for name, shape, kind, offset in infos:
            self._place(name, shape, kind, data + offset, problems)

    @staticmethod
    def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        dimensions = cursor.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _MalformedError(f"{name} has {dimensions} dimensions")
        # GGUF lists the fastest dimension first.
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        return name, shape, cursor.scalar("I"), cursor.scalar("Q")

    def _place(self, name: str, shape: tuple[int, ...], code: int, offset: int, problems: Problems) -> None:
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            problems.unsupported(f"{name} has the block format {code}, which this version of gguf does not know")
            return
        tensor = StoredTensor(shape, kind, offset)
        block, _ = GGML_QUANT_SIZES[kind]
        problems.check(name not in self.tensors, f"{name} occurs twice")
        problems.check(
            shape[-1] % block == 0, f"{name} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}"
        )
        end = offset + math.prod(shape[:-1]) * tensor.row_bytes
        problems.check(
            end <= len(self._bytes),
            f"{name} ends at byte {end} of a file of {len(self._bytes)}; it is truncated, fetch it again",
        )
        self.tensors[name] = tensor


class _MalformedError(Exception):
    """The header cannot be read past this point."""


class _Cursor:
    """Reads a little-endian header front to back, never past its end."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self._data = data.data
        self.position = 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise _MalformedError(
                f"its header asks for byte {end} of a file of {len(self._data)}; it is truncated or corrupt, "
                "fetch it again"
            )
        taken = self._data[self.position : end].tobytes()
        self.position = end
        return taken

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        start, size = self.position, self.scalar("Q")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise _MalformedError(f"the string at byte {start} is not UTF-8; the file is corrupt") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise _MalformedError(f"the value before byte {self.position} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise _MalformedError(f"the array before byte {self.position} has elements of the unknown type {kind}")
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
