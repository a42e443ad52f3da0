"""Tokenizers out of GGUF metadata give the tokens of the tokenizers that went in: SentencePiece itself, and
byte-level BPE written out here."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import sentencepiece
from tokenizers import Tokenizer

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile
from engine.models.gguf_tokenizer import write_tokenizer
from engine.models.gguf_tokens import end_token_ids

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
TEXTS = [
    "The phalanx moves as one, and when a man of the front rank falls the one behind steps forward.",
    "  leading, and   runs    of spaces  ",
    "tabs\tand\nlines\n\nand\r\n\r\n\n\nmore",
    "331 BC, 3.14159, 1,000,000 and 2024-11-22",
    "don't I'LL we're THEY'VE it's o'clock",
    "你好，世界。今天天气很好",
    "こんにちは世界 カタカナ",
    "안녕하세요 세계",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "Việt Nam đẹp, naïve café é ﬁ Ａ",
    "🙂😀👩‍👩‍👧‍👦🇩🇪 emoji",
    "def f(x):\n    return x ** 2  # squared\n\n\nclass A:\n\tpass",
    '{"a": [1, 2, {"b": null}]} <td>x</td>',
    "https://example.com/a?b=c&d=%20",
    "\x01\x7f\u00a0\u200b\u2028",
    "CamelCaseWORDS and SCREAMING_SNAKE",
    "...!!!???///\\\\",
    " " * 40 + "x" + " " * 3,
    "\n" * 9 + "y",
    f"{SPACE} under {SPACE}{SPACE} bar",
]


def corpus() -> list[str]:
    """The texts, and random mixtures of them and of their characters."""
    chance = random.Random(0)
    pool = "".join(TEXTS)
    mixed = ["".join(chance.choices(TEXTS, k=chance.randint(2, 4))) for _ in range(100)]
    scattered = ["".join(chance.choices(pool, k=chance.randint(1, 60))) for _ in range(400)]
    return TEXTS + mixed + scattered


def write(folder: Path, **metadata: Any) -> Tokenizer:
    """The tokenizer that comes out of a file with this under `tokenizer.ggml`, and nothing else."""
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        part()
    writer.close()
    write_tokenizer(GgufFile(file), folder, 128)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# --------------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module", params=[True, False], ids=["space prefix", "no prefix"])
def original(request: pytest.FixtureRequest) -> tuple[Any, bool]:
    """A SentencePiece model as Llama 2 has it, or as Gemma: without a prefix, with tokens of the user's."""
    model = io.BytesIO()
    users = (
        []
        if request.param
        else ["<tool>", "<td>", "</td>", "\n", "\n\n", "\n\n\n", SPACE * 2, SPACE * 3, SPACE * 4]
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS[:15] * 4 for line in text.split("\n") if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=620,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=users,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), request.param


def metadata_of(pieces: Any, prefix: bool) -> dict[str, Any]:
    """What llama.cpp's converter writes of it: runs of spaces with plain spaces."""
    kinds, names = [], []
    for index in range(pieces.vocab_size()):
        name, score = pieces.id_to_piece(index), pieces.get_score(index)
        if pieces.is_unknown(index):
            kinds.append(2)
        elif pieces.is_control(index):
            kinds.append(3)
        elif pieces.is_byte(index):
            kinds.append(6)
        else:
            # In a trained model those of the user's have no score.
            kinds.append(4 if score == 0.0 and index < 20 else 1)
        names.append(name.replace(SPACE, " ") if kinds[-1] == 4 else name)
    return {
        "model": "llama",
        "tokens": names,
        "scores": [pieces.get_score(index) for index in range(len(names))],
        "token_type": kinds,
        "unknown_token_id": pieces.unk_id(),
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        "add_space_prefix": prefix,
    }


def test_sentencepiece(tmp_path: Path, original: tuple[Any, bool]) -> None:
    pieces, prefix = original
    metadata = metadata_of(pieces, prefix)
    assert metadata["token_type"].count(6) == 256
    assert (metadata["token_type"].count(4) > 0) != prefix
    tokenizer = write(tmp_path, **metadata)
    for text in corpus():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == pieces.encode(text), repr(text)
        assert tokenizer.decode(ids) == text.replace(SPACE, " "), repr(text)


def test_tokens_around_a_text(tmp_path: Path, original: tuple[Any, bool]) -> None:
    pieces, prefix = original
    metadata = metadata_of(pieces, prefix)
    tokenizer = write(tmp_path, **metadata)
    plain = tokenizer.encode("the man", add_special_tokens=False).ids
    assert tokenizer.encode("the man").ids == [pieces.bos_id(), *plain], (
        "bos is added unless the file says no"
    )
    assert tokenizer.encode("the man</s>", add_special_tokens=False).ids == [*plain, pieces.eos_id()]
    assert tokenizer.decode([pieces.bos_id(), *plain, pieces.eos_id()]) == "the man"
    tokenizer = write(tmp_path, **metadata, add_bos_token=False)
    assert tokenizer.encode("the man").ids == plain


def test_bytes_make_characters(tmp_path: Path, original: tuple[Any, bool]) -> None:
    pieces, prefix = original
    tokenizer = write(tmp_path, **metadata_of(pieces, prefix))
    ids = tokenizer.encode("𓀀", add_special_tokens=False).ids[-4:]
    assert [tokenizer.id_to_token(index) for index in ids] == ["<0xF0>", "<0x93>", "<0x80>", "<0x80>"]
    assert tokenizer.decode(ids) == "𓀀"


def test_a_long_text(tmp_path: Path, original: tuple[Any, bool]) -> None:
    """No words are cut out of it: merging must not take the square of its length."""
    pieces, prefix = original
    text = "".join(TEXTS[:15]) * 200
    assert write(tmp_path, **metadata_of(pieces, prefix)).encode(
        text, add_special_tokens=False
    ).ids == pieces.encode(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": [0.0]}, ["scores", "1 and"]),
        ({"token_type": [1]}, ["token_type"]),
        ({"model": "t5"}, ["'t5'", "gpt2", "llama"]),
        ({"bos_token_id": 100000}, ["bos token 100000"]),
    ],
)
def test_what_is_refused(
    tmp_path: Path, original: tuple[Any, bool], changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as error:
        write(tmp_path, **{**metadata_of(*original), **changes})
    for word in [*words, str(tmp_path / "model.gguf")]:
        assert word in str(error.value)


def test_ends_of_turns(tmp_path: Path) -> None:
    names = ["<unk>", "<s>", "</s>", "<end_of_turn>", "<|im_end|>", "<|end|>", "a"]
    metadata = {"model": "llama", "tokens": names, "scores": [0.0] * 7, "token_type": [2, 3, 3, 3, 4, 1, 1]}
    tokenizer = write(tmp_path, **metadata)
    # Named or not: the end of the text, ends of turns that are control tokens, and those that ought to be.
    assert end_token_ids(GgufFile(tmp_path / "model.gguf")) == [2, 3, 4]
    assert tokenizer.decode([6, 3, 4]) == "a"


# --------------------------------------------------------------------------- byte-level BPE

WORDS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "stablelm2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""As the models' own tokenizer.json have them."""


def printable() -> dict[int, str]:
    """GPT-2's characters for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def merges_of(text: str, count: int) -> list[tuple[str, str]]:
    """Byte pair encoding as it was first written down (arXiv 1508.07909): the most frequent pair, again and again."""
    letters = printable()
    words = [[letters[byte] for byte in word.encode()] for word in regex.findall(WORDS["gpt-2"], text)]
    merges = []
    for _ in range(count):
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [merge(word, best) for word in words]
    return merges


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] = "".join(pair)
        else:
            merged.append(letter)
    return merged


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    return merges_of("".join(TEXTS) * 2, 250)


@pytest.mark.parametrize("pre", [*WORDS, "smollm", "refact", "dbrx", "smaug-bpe", "olmo"])
def test_byte_level(tmp_path: Path, merges: list[tuple[str, str]], pre: str) -> None:
    letters = printable()
    names = [*letters.values(), *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = write(
        tmp_path,
        model="gpt2",
        pre=pre,
        tokens=names,
        token_type=[1] * len(names),
        merges=[" ".join(pair) for pair in merges],
        add_bos_token=False,
    )
    pattern = WORDS.get(
        {"smollm": "gpt-2", "refact": "gpt-2", "olmo": "gpt-2"}.get(pre, pre), WORDS["llama-bpe"]
    )
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for text in corpus():
        # Some cut out single digits before anything else.
        parts = regex.split(r"(\p{N})", text) if pre in ("smollm", "refact") else [text]
        tokens: list[str] = []
        for word in [word for part in parts for word in regex.findall(pattern, part)]:
            spelled = [letters[byte] for byte in word.encode()]
            while known := [pair for pair in itertools.pairwise(spelled) if pair in ranks]:
                spelled = merge(spelled, min(known, key=ranks.__getitem__))
            tokens += spelled
        found = tokenizer.encode(text)
        assert found.tokens == tokens, repr(text)
        assert tokenizer.decode(found.ids) == text
