"""Text to token ids and back, over the ``tokenizers`` library, for Hugging Face folders and GGUF files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from tbik_jax._problems import Problems
from tbik_jax.models import _gguf_tokenizer
from tbik_jax.models._chat import ChatTemplate
from tbik_jax.models._gguf_config import eos_token_ids as gguf_eos_token_ids
from tbik_jax.models._gguf_file import GGUFFile
from tbik_jax.models._hf_config import eos_token_ids as hf_eos_token_ids
from tbik_jax.models.huggingface import read_json

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer with the ids that begin and end its texts, and the chat template of its model.

    Built by :meth:`from_folder` or :meth:`from_gguf`. ``vocab_size`` counts all tokens, added ones
    included; the model may have more rows. ``eos_token_ids`` are all ids after which generation stops.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # A file may carry settings that shorten or lengthen every text that is encoded.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self._chat = None if chat_template is None else ChatTemplate(chat_template, special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder: ``tokenizer.json``, and what stands beside it.

        ``tokenizer_config.json`` names the special tokens and may hold the chat template, for which
        ``chat_template.jinja`` goes first; ``generation_config.json``, or else ``config.json``, may name more
        ids that end a text.

        Raises:
            ValueError: ``tokenizer.json`` is missing, or a file is unreadable or contradictory.
        """
        folder = Path(folder)
        with Problems(str(folder)) as problems:
            settings = _optional_json(folder / "tokenizer_config.json", problems)
            named = [
                hf_eos_token_ids(_optional_json(folder / name, problems))
                for name in ("generation_config.json", "config.json")
            ]
            backend = _load_backend(folder / "tokenizer.json", problems)
            template = _folder_template(folder, settings, problems)
            special = _special_tokens(settings)
            ids: dict[str, int] = {}
            ends = named[0] or named[1]
            if backend is not None:
                for token in ends:
                    problems.check(
                        isinstance(token, int) and token >= 0 and backend.id_to_token(token) is not None,
                        f"eos_token_id {token!r} is not in tokenizer.json's vocabulary",
                    )
                for role in ("bos_token", "eos_token"):
                    if role in special:
                        found = backend.token_to_id(special[role])
                        if found is None:
                            problems.add(f"{role} = {special[role]!r} is not in tokenizer.json's vocabulary")
                        else:
                            ids[role] = found
        assert backend is not None
        if settings.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
            # This class alone lets tokenizer_config.json overrule what tokenizer.json adds around a text.
            bos, eos = settings.get("add_bos_token"), settings.get("add_eos_token")
            if bos is not None or eos is not None:
                _add_around(backend, bos is not False, eos is True, special)
        return cls(
            backend,
            bos_token_id=ids.get("bos_token"),
            eos_token_ids=dict.fromkeys([ids["eos_token"], *ends] if "eos_token" in ids else ends),
            chat_template=template,
            special_tokens=special,
        )

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFFile) -> Tokenizer:
        """The byte-level BPE tokenizer in a GGUF file's metadata.

        Raises:
            ValueError: the file is unreadable, or its token tables are missing or contradictory.
            NotImplementedError: a SentencePiece vocabulary, or a pre-tokenizer that is not known here.
        """
        file = source if isinstance(source, GGUFFile) else GGUFFile(source)
        metadata = file.metadata
        backend = _gguf_tokenizer.build(file)
        special = {
            f"{role}_token": backend.id_to_token(metadata[f"tokenizer.ggml.{key}_token_id"]) or ""
            for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
            if f"tokenizer.ggml.{key}_token_id" in metadata
        }
        _add_around(
            backend,
            _gguf_tokenizer.adds_bos(file),
            metadata.get("tokenizer.ggml.add_eos_token", False) is True,
            special,
        )
        return cls(
            backend,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=gguf_eos_token_ids(metadata),
            chat_template=metadata.get("tokenizer.chat_template"),
            special_tokens=special,
        )

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with what the model's own tokenizer puts around a text (most often a bos, or
        nothing).

        Special tokens written out in the text become their ids, as in transformers: do not encode untrusted
        text raw.

        Raises:
            ValueError: ``text`` is no string, or holds a surrogate, which no UTF-8 text can.
        """
        _check_text("encode", text)
        return list(self._backend.encode(text).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. An id that has no token (a padding row of the model's vocabulary) reads
        U+FFFD.

        Raises:
            ValueError: an id that is not an integer in 0..2**32 - 1.
        """
        ids = [_check_id(token) for token in ids]
        text = ""
        for known, run in itertools.groupby(ids, lambda token: self._backend.id_to_token(token) is not None):
            if known:
                text += self._backend.decode(list(run), skip_special_tokens=skip_special_tokens)
            else:
                text += _REPLACEMENT * len(list(run))
        return text

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation, by the model's chat template.

        ``messages`` are ``{"role": ..., "content": ...}``. ``add_generation_prompt`` ends with the opening
        of the assistant's turn. ``variables`` reach the template (Qwen3 knows ``enable_thinking=False``).
        Nothing is put around the text: the template writes its own special tokens.

        Raises:
            ValueError: there is no template, a message is not a dictionary of strings, or the template
                refuses them.
        """
        if self._chat is None:
            raise ValueError(
                "chat: this model has no chat template; use encode() on a prompt of your own, or a model "
                "that was tuned for conversations"
            )
        with Problems("chat") as problems:
            problems.check(len(messages) > 0, "messages is empty")
            for index, message in enumerate(messages):
                if not problems.check(
                    isinstance(message, Mapping) and "role" in message and "content" in message,
                    f'message {index} is not {{"role": ..., "content": ...}}',
                ):
                    continue
                for key, value in message.items():
                    problems.check(
                        isinstance(value, str),
                        f"message {index}: {key} is a {type(value).__name__}, not a string",
                    )
        text = self._chat.render(messages, add_generation_prompt, variables)
        _check_text("chat", text)
        return list(self._backend.encode(text, add_special_tokens=False).ids)


class StreamDecoder:
    """Text from ids as they arrive; a character is emitted once all its bytes are there.

    Guarantee: for byte-level BPE the emitted pieces, :meth:`finish` included, join to ``decode`` of all
    ids, and no piece ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Some decoders join words by the token before: the last emitted ids stay as context.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Add an id; returns the new whole characters, which may be none.

        Raises:
            ValueError: an id that is not an integer in 0..2**32 - 1.
        """
        self._pending.append(_check_id(token))
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What was held back where a text ends inside a character: U+FFFD. Ready for another text."""
        text = self._pending_text()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        both = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=self._skip)
        return both[len(before) :]


def _check_text(where: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{where}: the text is a {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the text holds the lone surrogate U+{ord(text[error.start]):04X} at {error.start}, "
            "which UTF-8 cannot express; it is not valid text, often bytes that were decoded with "
            "surrogateescape"
        ) from None


def _check_id(token: Any) -> int:
    try:
        value = token.__index__()
    except (AttributeError, TypeError):
        raise ValueError(f"decode: token id {token!r} is a {type(token).__name__}, not an integer") from None
    if not 0 <= value < 2**32:
        raise ValueError(f"decode: token id {value} is not in 0..2**32 - 1")
    return int(value)


def _add_around(backend: tokenizers.Tokenizer, bos: bool, eos: bool, special: Mapping[str, str]) -> None:
    """Put bos before, and eos behind, every encoded text, where the model has such tokens."""
    before = [special["bos_token"]] if bos and "bos_token" in special else []
    behind = [special["eos_token"]] if eos and "eos_token" in special else []
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *behind],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(before + behind)],
    )


def _optional_json(path: Path, problems: Problems) -> dict[str, Any]:
    return read_json(path, problems) if path.is_file() else {}


def _load_backend(path: Path, problems: Problems) -> tokenizers.Tokenizer | None:
    if not problems.check(
        path.is_file(), "there is no tokenizer.json; save the fast tokenizer of the model into the folder"
    ):
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        problems.add(f"tokenizer.json cannot be read: {error}")
        return None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role. A token is a string, or an object with its ``content``."""
    found = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(role)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _folder_template(folder: Path, settings: Mapping[str, Any], problems: Problems) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            problems.add(f"{path.name} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}")
            return None
    template = settings.get("chat_template")
    if isinstance(template, list):
        # Several named templates: the others are for tools and documents.
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    problems.check(
        template is None or isinstance(template, str),
        f"chat_template in tokenizer_config.json is a {type(template).__name__}, not a string",
    )
    return template
