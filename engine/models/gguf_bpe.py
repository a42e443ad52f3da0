"""A byte-level BPE vocabulary of a GGUF file (`tokenizer.ggml.model` is `gpt2`) as a tokenizer of the `tokenizers`
library.

Called by gguf_tokenizer. GGUF names a pre-tokenizer instead of describing it; this module knows what the names stand
for (llama.cpp, `llm_tokenizer_bpe` in src/llama-vocab.cpp), and refuses those that it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile


@dataclass(frozen=True)
class _Kind:
    """How a text is cut into words before their bytes are merged."""

    words: str | None = None
    """A regular expression whose matches are the words; None: those of GPT-2."""
    single_digits: bool = False
    """Each digit is a word of its own, before anything else."""
    ignores_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    adds_bos: bool = False
    """What it means if the file doesn't say."""
    composes: bool = False
    """Characters are composed first (Unicode's NFC)."""


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_MARKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED_MARKS}"
_GPT4O = (
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_FIRST}{_UPPER}+{_LOWER}*{_ENDINGS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHED_MARKS}"
)

_GPT2 = _Kind()
_DIGITS = _Kind(single_digits=True)
_LLAMA_BPE = _Kind(_LLAMA3, ignores_merges=True, adds_bos=True)
_KINDS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "granite-docling": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "pixtral": _LLAMA_BPE,
    "dbrx": _Kind(_LLAMA3),
    "smaug-bpe": _Kind(_LLAMA3),
    "qwen2": _Kind(_QWEN2, composes=True),
    "deepseek-r1-qwen": _Kind(_QWEN2),
    "stablelm2": _Kind(_QWEN2),
    "tekken": _Kind(_TEKKEN, ignores_merges=True),
    "gpt-4o": _Kind(_GPT4O),
}
"""By their names in files."""

DEFAULT_PRE_TOKENIZER = "gpt-2"


def byte_level_tokenizer(gguf: GgufFile, names: list[str]) -> Any:
    """The tokenizer without its added tokens. Raises ModelError."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    kind = _kind(gguf)
    merges = [_pair(gguf, merge) for merge in gguf.strings("tokenizer.ggml.merges")]
    vocabulary = {name: index for index, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ModelError(f"{gguf.path}: tokenizer.ggml.tokens holds a token twice")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.ignores_merges)
    except Exception as error:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = Tokenizer(model)
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def adds_bos_by_default(gguf: GgufFile) -> bool:
    """Whether a text begins with the bos token if the file doesn't say, as llama.cpp has it."""
    return _kind(gguf).adds_bos


def _kind(gguf: GgufFile) -> _Kind:
    named = gguf.get("tokenizer.ggml.pre", str, DEFAULT_PRE_TOKENIZER)
    kind = _KINDS.get(named)
    if kind is None:
        raise ModelError(
            f"{gguf.path}: pre-tokenizer {named!r} is not supported; supported are {', '.join(_KINDS)}. "
            "Serve the model's Hugging Face folder, or its hub id, instead"
        )
    return kind


def _pair(gguf: GgufFile, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.merges holds {merge!r}, which is not two tokens")
    return left, right


def _pre_tokenizer(kind: _Kind) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind.words is None:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if not kind.single_digits:
            return words
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(kind.words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
