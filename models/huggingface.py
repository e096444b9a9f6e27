"""Weights and configuration of a Hugging Face folder: ``config.json`` and safetensors, whole or in shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tbik_jax._problems import Problems
from tbik_jax.models._hf_config import eos_token_ids
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.source import Array, check_rows, no_such_tensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{sign}{bits}": np.dtype(f"{sign.lower()}{bits // 8}") for sign in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
}


class HuggingFaceSource:
    """The tensors of a folder, memory-mapped: opening reads the headers, :meth:`read` the bytes of the rows
    asked for.

    ``config`` is the folder's :class:`ModelConfig`. Its ``eos_token_ids`` are those of
    ``generation_config.json`` where that file names any, as in transformers' own generation.

    Raises:
        ValueError: what is missing, unreadable or contradictory in the folder, all of it at once.
        NotImplementedError: a model that this package does not compute; see :meth:`ModelConfig.from_hf`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file_of: dict[str, Any] = {}
        with Problems(str(self.folder)) as problems:
            if not problems.check(self.folder.is_dir(), _not_a_folder(self.folder)):
                return
            data = read_json(self.folder / "config.json", problems)
            self._open_weights(problems)
        self.config = self._with_generation_config(ModelConfig.from_hf(data))

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype[Any]:
        return _DTYPES[self._slice(name).get_dtype()]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        tensor = self._slice(name)
        shape = tensor.get_shape()
        if not shape:
            raise ValueError(f"{name} is a scalar; it has no rows")
        start, stop = check_rows(name, shape[0], start, stop)
        if start == stop:
            return np.empty((0, *shape[1:]), self.dtype(name))
        rows: Array = tensor[start:stop]
        return rows

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise no_such_tensor(self.folder, name)
        return self._file_of[name].get_slice(name)

    def _open_weights(self, problems: Problems) -> None:
        if (self.folder / _SINGLE).is_file():
            self._open(_SINGLE, None, problems)
        elif (self.folder / _INDEX).is_file():
            shard_of = _read_index(self.folder / _INDEX, problems)
            for shard in sorted(set(shard_of.values())):
                self._open(shard, {name for name, holder in shard_of.items() if holder == shard}, problems)
        else:
            problems.add(_no_weights(self.folder))

    def _open(self, shard: str, indexed: set[str] | None, problems: Problems) -> None:
        """Open one file; ``indexed`` are the names that it must hold, or None for whatever it holds."""
        path = self.folder / shard
        if not problems.check(
            path.is_file(), f"{_INDEX} names {shard}, which is not in the folder; the download is incomplete"
        ):
            return
        try:
            file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            problems.add(f"{shard} is truncated or not a safetensors file ({error}); fetch it again")
            return
        held = set(file.keys())
        for name in sorted((indexed or held) - held):
            problems.add(f"{_INDEX} places {name} in {shard}, which does not hold it")
        for name in sorted(held - (held if indexed is None else indexed)):
            problems.add(f"{shard} holds {name}, which {_INDEX} does not place there; it would be ignored")
        for name in sorted(held):
            code = file.get_slice(name).get_dtype()
            if code not in _DTYPES:
                problems.unsupported(f"{name} in {shard} has the storage type {code}, which is not supported")
            self._file_of[name] = file

    def _with_generation_config(self, config: ModelConfig) -> ModelConfig:
        path = self.folder / "generation_config.json"
        if not path.is_file():
            return config
        with Problems(str(self.folder)) as problems:
            ids = eos_token_ids(read_json(path, problems))
        return dataclasses.replace(config, eos_token_ids=ids) if ids else config


def read_json(path: Path, problems: Problems) -> dict[str, Any]:
    """The object in a JSON file; an unusable file goes to ``problems`` and gives an empty one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.add(f"there is no {path.name}")
    except UnicodeDecodeError as error:
        problems.add(f"{path.name} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}")
    except json.JSONDecodeError as error:
        problems.add(f"{path.name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except OSError as error:
        problems.add(f"{path.name} cannot be read: {error.strerror}")
    else:
        if problems.check(
            isinstance(data, dict),
            f"{path.name} holds a {type(data).__name__}, not an object with named fields",
        ):
            found: dict[str, Any] = data
            return found
    return {}


def _read_index(path: Path, problems: Problems) -> dict[str, str]:
    index = read_json(path, problems)
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, Mapping) or not shard_of:
        if index:
            problems.add(f"{path.name} has no weight_map of tensor names to file names")
        return {}
    for shard in {shard for shard in shard_of.values() if not _is_file_name(shard)}:
        problems.add(f"{path.name} names {shard!r}, which is not the name of a file beside it")
    return {name: shard for name, shard in shard_of.items() if _is_file_name(shard)}


def _is_file_name(shard: object) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard


def _not_a_folder(folder: Path) -> str:
    if folder.is_file():
        return "it is a file; give the folder that holds config.json and the safetensors files"
    return "there is no such folder"


def _no_weights(folder: Path) -> str:
    message = f"there is neither {_SINGLE} nor {_INDEX}"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickled:
        message += (
            f", only {', '.join(pickled[:3])}: pickled files can run code, and are not read. Convert to "
            "safetensors: model.save_pretrained(folder, safe_serialization=True) in transformers"
        )
    elif others:
        message += f", only {', '.join(others[:3])}; these need the index, or the name {_SINGLE} if one file is all"
    return message
