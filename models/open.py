"""One way in: a name, a Hugging Face folder or a GGUF file gives a configuration, weights and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tbik_jax._problems import Problems
from tbik_jax.models.config import ModelConfig
from tbik_jax.models.gguf import GGUFSource
from tbik_jax.models.huggingface import HuggingFaceSource
from tbik_jax.models.random import TINY, RandomSource, byte_tokenizer
from tbik_jax.models.smollm2 import find_smollm2
from tbik_jax.models.source import TensorSource, validate
from tbik_jax.models.tokenizer import Tokenizer

#: Names that stand for models: weights in an installed package, and random ones.
NAMES = ("smollm2", "tiny")


@dataclass(frozen=True)
class OpenedModel:
    """A model on disk, checked and not yet read. ``tokenizer`` is None where the model comes without one."""

    config: ModelConfig
    source: TensorSource
    tokenizer: Tokenizer | None
    name: str


def open_model(path_or_name: str | Path) -> OpenedModel:
    """Open ``"smollm2"``, ``"tiny"`` (random weights), a folder with ``config.json`` and safetensors, or a ``.gguf`` file.

    A name goes before a path: write ``./smollm2`` for a folder of that name.

    Guarantee: every tensor that the configuration needs is there in its shape, and no other; every token id
    has a row.

    Raises:
        ValueError: nothing of these is there, or what is there is incomplete, damaged or contradictory.
        NotImplementedError: a model that this package does not compute.
    """
    if path_or_name == "smollm2":
        return _open_gguf(find_smollm2(), "smollm2")
    if path_or_name == "tiny":
        return OpenedModel(TINY, RandomSource(TINY), byte_tokenizer(), "tiny")
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _open_gguf(path, path.stem)
    found = "which is a file, but not a .gguf file" if path.is_file() else "and found nothing there"
    raise ValueError(
        f"open_model: {str(path_or_name)!r} is not a model. Looked for one of the names {', '.join(NAMES)}; "
        f"for a folder with config.json and model*.safetensors, and for a .gguf file, at {path.absolute()}, "
        f"{found}. Nothing is ever downloaded: give the path of a local copy"
    )


def _open_folder(folder: Path) -> OpenedModel:
    source = HuggingFaceSource(folder)
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    return _checked(source.config, source, tokenizer, folder.resolve().name)


def _open_gguf(path: Path, name: str) -> OpenedModel:
    source = GGUFSource(path)
    tokenizer = Tokenizer.from_gguf(source.file) if "tokenizer.ggml.model" in source.file.metadata else None
    return _checked(source.config, source, tokenizer, name)


def _checked(config: ModelConfig, source: TensorSource, tokenizer: Tokenizer | None, name: str) -> OpenedModel:
    validate(source, config)
    if tokenizer is not None:
        with Problems(name) as problems:
            problems.check(
                tokenizer.vocab_size <= config.vocab_size,
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the embedding {config.vocab_size} "
                "rows; tokens were added without resizing the model",
            )
    return OpenedModel(config, source, tokenizer, name)
