import json
import re

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tbik_jax.models.tokenizer import Tokenizer
from tests.models.checkpoints import FIXTURES, add_key

TEXTS = [
    "",
    "Hello, world!",
    "  two  spaces\n\n\ttab \r\n",
    "It's 12345 o'clock, we'LL see: 3.14159",
    "naïve café — Ünïcödé e\u0301",
    "日本語とemoji 👩‍👩‍👧‍👦🌸",
    "a\x00b\ufffdc",
]

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def train():
    """A byte-level BPE with merges, so that characters and tokens end in different places."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3 + ["the other there then 111 222 hello world 日本 日本語"] * 5, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    return content["vocab"], [tuple(pair) for pair in content["merges"]]


VOCABULARY, MERGES = train()


def reference(pre_tokenizer, ignore_merges=False, normalizer=None):
    """What the model's own tokenizer.json would hold."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=VOCABULARY, merges=MERGES, ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def split_by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# As the tokenizer.json of Qwen3 and of Llama 3 have them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_folder(folder, config=None, backend=None, **files):
    folder.mkdir(exist_ok=True)
    (backend or reference(SMOLLM)).save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def write_gguf(path, pre="smollm", **changes):
    tokens = sorted(VOCABULARY, key=VOCABULARY.__getitem__)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in MERGES],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if value is not ...:
            add_key(writer, key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.from_folder(write_folder(tmp_path, {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == reference(SMOLLM).encode(text).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text


def test_special_tokens(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), len(VOCABULARY))
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_token_objects_and_more_ends_of_text(tmp_path):
    config = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}, "bos_token": None}
    folder = write_folder(tmp_path, config, generation_config__json='{"eos_token_id": [0, 2]}')
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.bos_token_id is None
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    assert Tokenizer.from_folder(folder).eos_token_ids == (2, 0)


def test_the_folder_of_transformers():
    tokenizer = Tokenizer.from_folder(FIXTURES / "tiny-llama")
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (259, 1, (2,))
    ids = tokenizer.chat([{"role": "user", "content": "Grüß"}])
    text = "<|im_start|>user\nGrüß<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) == len(text.encode()) - 2 * len("<|im_start|>") - len("<|im_end|>") + 3


def test_stored_truncation_and_padding_are_switched_off(tmp_path):
    backend = reference(SMOLLM)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend=backend))
    assert tokenizer.encode(TEXTS[3]) == reference(SMOLLM).encode(TEXTS[3]).ids


def test_bos_by_tokenizer_json_and_by_the_llama_class(tmp_path):
    backend = reference(SMOLLM)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    plain = reference(SMOLLM).encode("hi").ids
    folder = write_folder(tmp_path, config, backend)
    assert Tokenizer.from_folder(folder).encode("hi") == [1, *plain]
    write_folder(tmp_path, {**config, "tokenizer_class": "LlamaTokenizerFast"}, backend)
    assert Tokenizer.from_folder(folder).encode("hi") == plain
    write_folder(
        tmp_path, {**config, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    )
    assert Tokenizer.from_folder(folder).encode("hi") == [1, *plain, 2]


@pytest.mark.parametrize("text", ["\ud800", "ok \udcff"])
def test_lone_surrogates(tokenizer, text):
    match = rf"the text holds the lone surrogate U\+{ord(text[-1]):04X} at {len(text) - 1}"
    with pytest.raises(ValueError, match=f"encode: {match}"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match=f"chat: {match.split(' at ')[0]}"):
        tokenizer.chat([{"role": "user", "content": text}])


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"]])
def test_text_that_is_no_string(tokenizer, text):
    with pytest.raises(ValueError, match=rf"encode: the text is a {type(text).__name__}, not a string"):
        tokenizer.encode(text)


@pytest.mark.parametrize(
    ("token", "message"), [(1.0, "1.0 is a float, not an integer"), (-1, "-1 is not in"), (2**32, "is not in 0..2")]
)
def test_ids_that_are_none(tokenizer, token, message):
    with pytest.raises(ValueError, match=f"decode: token id {re.escape(str(token))}"):
        tokenizer.decode([token])
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer.stream().push(token)


def test_an_id_without_a_token_reads_as_a_replacement_character(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, 5000, *ids]) == "ab\ufffdab"


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_joins_to_the_text(tokenizer, text):
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    # The whole text is valid, so no piece but one with the text's own U+FFFD may hold one.
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_stream_withholds_half_a_character(tokenizer):
    bytes_of_flower = [VOCABULARY[c] for c in bytes_as_tokens("🌸")]
    assert streamed(tokenizer, bytes_of_flower) == ["", "", "", "🌸", ""]
    assert streamed(tokenizer, [*bytes_of_flower[:3], VOCABULARY["a"]]) == ["", "", "", "\ufffda", ""]
    assert streamed(tokenizer, bytes_of_flower[:2]) == ["", "", "\ufffd"]


def bytes_as_tokens(text):
    """Each byte of a text as the character that byte-level BPE writes for it."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def test_streams_of_random_ids_join_to_their_decoding(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(0, len(VOCABULARY) + 5, 40).tolist()
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_finished_stream_starts_over(tokenizer):
    stream = tokenizer.stream()
    assert stream.push(VOCABULARY[bytes_as_tokens("é")[0]]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(VOCABULARY["a"]) == "a"


def test_a_stream_keeps_the_spaces_of_word_tokenizers(tmp_path):
    # SentencePiece-like decoders strip the space of the first token of whatever they are given.
    vocabulary = {"<unk>": 0, "▁one": 1, "▁two": 2, "s": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, {}, backend))
    assert tokenizer.decode([1, 2, 3]) == "one twos"
    assert streamed(tokenizer, [1, 2, 3]) == ["one", " two", "s", ""]


def test_chat(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
    assert tokenizer.chat(messages) == reference(SMOLLM).encode(text).ids
    assert tokenizer.decode(tokenizer.chat(messages), skip_special_tokens=False) == text
    assert tokenizer.has_chat_template


def render(tmp_path, template, messages=None, config=None, **arguments):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, {**(config or {}), "chat_template": template}))
    ids = tokenizer.chat(messages or [{"role": "user", "content": "x"}], **arguments)
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_what_templates_may_use(tmp_path):
    assert render(tmp_path, "{{ bos_token }}{{ messages|length }}", config={"bos_token": "<|im_start|>"}) == (
        "<|im_start|>1"
    )
    assert render(tmp_path, "{% if add_generation_prompt %}yes{% endif %}") == "yes"
    assert (
        render(tmp_path, "{% if add_generation_prompt %}yes{% else %}no{% endif %}", add_generation_prompt=False)
        == "no"
    )
    assert render(tmp_path, "{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render(tmp_path, "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render(tmp_path, "{% generation %}in{% endgeneration %}side") == "inside"
    assert re.fullmatch(r"\d{4}", render(tmp_path, "{{ strftime_now('%Y') }}"))
    assert render(tmp_path, "{{ tools is none }}{{ enable_thinking is defined }}") == "TrueFalse"
    assert render(tmp_path, "{{ enable_thinking }}", enable_thinking=False) == "False"
    # Blocks take their line with them, as template authors expect.
    assert render(tmp_path, "a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ missing.attribute }}", "refuses this conversation: 'missing' is undefined"),
        ("{{ 1 // 0 }}", "refuses this conversation: "),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses this conversation: "),
        ("a\n{% if %}", "does not compile: .*, line 2"),
    ],
)
def test_templates_that_fail(tmp_path, template, message):
    with pytest.raises(ValueError, match=f"chat: the chat template {message}"):
        render(tmp_path, template)


def test_which_template(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "ab"}]
    assert render(tmp_path, named) == "ab"
    (tmp_path / "chat_template.jinja").write_text("aé")
    assert render(tmp_path, named) == "aé"


def test_no_template(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match=r"chat: this model has no chat template; use encode\(\)"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_bad_messages_all_at_once(tokenizer):
    with pytest.raises(ValueError, match="chat: 3 problems") as caught:
        tokenizer.chat([{"role": "user", "content": None}, "hello", {"role": "user"}])
    for line in ["message 0: content is a NoneType, not a string", "message 1 is not", "message 2 is not"]:
        assert line in str(caught.value)
    with pytest.raises(ValueError, match="messages is empty"):
        tokenizer.chat([])


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, {"eos_token": "</s>", "chat_template": 3}, generation_config__json='{"eos_token_id": 9999}')
    with pytest.raises(ValueError, match="3 problems") as caught:
        Tokenizer.from_folder(tmp_path)
    for line in [
        "eos_token = '</s>' is not in tokenizer.json's vocabulary",
        "eos_token_id 9999 is not in tokenizer.json's vocabulary",
        "chat_template in tokenizer_config.json is a int, not a string",
    ]:
        assert line in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="3 problems") as caught:
        Tokenizer.from_folder(tmp_path)
    for line in [
        "tokenizer.json cannot be read",
        "tokenizer_config.json is not UTF-8",
        "chat_template.jinja is not UTF-8 text: byte 0xff at 1",
    ]:
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", lambda: reference(SMOLLM)),
        ("qwen2", lambda: reference(split_by(QWEN2), normalizer=normalizers.NFC())),
        ("llama-bpe", lambda: reference(split_by(LLAMA3), ignore_merges=True)),
    ],
)
def test_gguf_encodes_as_tokenizer_json(tmp_path, pre, expected):
    tokenizer, expected = Tokenizer.from_gguf(write_gguf(tmp_path / "t.gguf", pre)), expected()
    for text in [*TEXTS, *(f"{text}<|im_end|>{text}" for text in TEXTS)]:
        assert tokenizer.encode(text) == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == expected.decode(
            expected.encode(text).ids, skip_special_tokens=False
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, (2,), len(VOCABULARY))
    assert not tokenizer.has_chat_template


def test_gguf_bos_eos_and_template(tmp_path):
    arguments = {"add_bos_token": True, "add_eos_token": True, "eot_token_id": 0}
    path = write_gguf(tmp_path / "t.gguf", **arguments, **{"tokenizer.chat_template": TEMPLATE + "{{ eos_token }}"})
    tokenizer = Tokenizer.from_gguf(path)
    plain = reference(SMOLLM).encode("hi").ids
    assert tokenizer.encode("hi") == [1, *plain, 2]
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.decode(tokenizer.chat([{"role": "u", "content": "x"}]), skip_special_tokens=False) == (
        "<|im_start|>u\nx<|im_end|>\n<|im_end|>"
    )


def test_llama_bpe_begins_with_bos_unless_the_file_says_not(tmp_path):
    for add, first in ((..., 1), (True, 1), (False, VOCABULARY["h"])):
        path = write_gguf(tmp_path / "t.gguf", "llama-bpe", add_bos_token=add)
        assert Tokenizer.from_gguf(path).encode("hx")[0] == first


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "llama"}, NotImplementedError, "tokenizer.ggml.model = 'llama' is not byte-level BPE"),
        ({"pre": "tekken"}, NotImplementedError, "tokenizer.ggml.pre = 'tekken' is not a known pre-tokenizer"),
        ({"pre": ...}, NotImplementedError, "tokenizer.ggml.pre = None is not a known pre-tokenizer"),
        ({"model": ...}, ValueError, "tokenizer.ggml.model is missing; the file has no tokenizer"),
        ({"merges": ...}, ValueError, "tokenizer.ggml.merges is missing"),
        ({"tokens": [1, 2]}, ValueError, "tokenizer.ggml.tokens is not a list of str"),
        ({"token_type": [1, 2]}, ValueError, "tokens, but 2 token types; the file is corrupt"),
        ({"tokens": ["a"] * len(VOCABULARY)}, ValueError, "a token occurs twice"),
        ({"merges": ["zz h", "q"]}, ValueError, "2 merges are not of two tokens into a third, the first [('zz', 'h')]"),
        ({"merges": ["q q q"]}, ValueError, "merges are not of two tokens"),
        ({"eos_token_id": 9999}, ValueError, "tokenizer.ggml.eos_token_id = 9999 is not one of the"),
    ],
)
def test_bad_gguf(tmp_path, changes, kind, message):
    path = write_gguf(tmp_path / "t.gguf", **changes)
    with pytest.raises(kind) as caught:
        Tokenizer.from_gguf(path)
    assert caught.type is kind
    assert message in str(caught.value)
