"""A ``tokenizers`` backend from the token tables in GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from tbik_jax._problems import Problems
from tbik_jax.models._gguf_file import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4


class _Splitting(NamedTuple):
    """What a GGUF file only names: how text is cut before byte-pair merges."""

    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    composes: bool = False  # Unicode NFC first
    whole_words: bool = False  # a word that is a token stays one, whatever the merges say
    adds_bos: bool = False  # where the file does not say


def _by_pattern(digits: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_SPLITTINGS = {
    "smollm": _Splitting(_single_digits),
    "qwen2": _Splitting(_by_pattern(r"\p{N}"), composes=True),
    "llama-bpe": _Splitting(_by_pattern(r"\p{N}{1,3}"), whole_words=True, adds_bos=True),
}


def adds_bos(file: GGUFFile) -> bool:
    """Whether a text begins with bos, by the file or else by its pre-tokenizer."""
    splitting = _SPLITTINGS.get(str(file.metadata.get("tokenizer.ggml.pre")), _Splitting(_single_digits))
    return file.metadata.get("tokenizer.ggml.add_bos_token", splitting.adds_bos) is True


def build(file: GGUFFile) -> tokenizers.Tokenizer:
    """The byte-level BPE backend of a GGUF file; see :meth:`Tokenizer.from_gguf`."""
    with Problems(f"{file.path}: tokenizer") as problems:

        def table(name: str, kind: type) -> list[str] | list[int]:
            values = file.metadata.get(f"tokenizer.ggml.{name}")
            sound = isinstance(values, list) and all(isinstance(value, kind) for value in values)
            problems.check(
                sound,
                f"tokenizer.ggml.{name} is {'missing' if values is None else 'not a list of ' + kind.__name__}",
            )
            return values if sound else []  # type: ignore[return-value]

        model, splitting = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if model is not None and model != "gpt2":
            problems.unsupported(
                f"tokenizer.ggml.model = {model!r} is not byte-level BPE ('gpt2'); use the tokenizer.json of "
                "the model's Hugging Face folder"
            )
            return tokenizers.Tokenizer(models.BPE())
        problems.check(model is not None, "tokenizer.ggml.model is missing; the file has no tokenizer")
        if splitting not in _SPLITTINGS:
            problems.unsupported(
                f"tokenizer.ggml.pre = {splitting!r} is not a known pre-tokenizer "
                f"({', '.join(_SPLITTINGS)}); use the tokenizer.json of the model's Hugging Face folder"
            )
        tokens, types, merges = table("tokens", str), table("token_type", int), table("merges", str)
        problems.check(
            len(tokens) == len(types),
            f"{len(tokens)} tokens, but {len(types)} token types; the file is corrupt",
        )
        vocabulary = {str(token): index for index, token in enumerate(tokens)}
        problems.check(len(vocabulary) == len(tokens), "a token occurs twice; the file is corrupt")
        pairs = [tuple(str(merge).split(" ")) for merge in merges]
        broken = [pair for pair in pairs if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}]
        problems.check(not broken, f"{len(broken)} merges are not of two tokens into a third, the first {broken[:1]}")
        for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            token = file.metadata.get(f"tokenizer.ggml.{role}_token_id", 0)
            problems.check(
                isinstance(token, int) and 0 <= token < max(len(tokens), 1),
                f"tokenizer.ggml.{role}_token_id = {token!r} is not one of the {len(tokens)} tokens",
            )

    chosen = _SPLITTINGS[str(splitting)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for left, right in pairs],
            ignore_merges=chosen.whole_words,
        )
    )
    if chosen.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = chosen.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(str(token), special=special, normalized=False)
                for token, own in zip(tokens, types, strict=True)
                if own == kind
            ]
        )
    return backend
