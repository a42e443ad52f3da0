"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

Called by the importer. GGUF names a pre-tokenizer instead of describing it; this module knows what the names
stand for (llama.cpp, `llm_tokenizer_bpe` in src/llama-vocab.cpp), and refuses those that it does not know.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

_KINDS = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
}
"""Names in files: what they stand for."""


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def write_tokenizer(gguf: GgufFile, folder: Path, max_model_len: int) -> None:
    """Writes both files into `folder`. Raises ModelError for a kind of tokenizer that is not supported."""
    model = gguf.get("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise ModelError(
            f"{gguf.path}: tokenizer {model!r} (SentencePiece or another) cannot be imported from GGUF "
            "yet; serve the model's Hugging Face folder, or its hub id, instead"
        )
    named = gguf.get("tokenizer.ggml.pre", str, "gpt-2")
    kind = _KINDS.get(named)
    if kind is None:
        raise ModelError(
            f"{gguf.path}: pre-tokenizer {named!r} is not supported; supported are {', '.join(_KINDS)}. "
            "Serve the model's Hugging Face folder, or its hub id, instead"
        )
    names = gguf.strings("tokenizer.ggml.tokens")
    _write_json(folder / "tokenizer.json", _tokenizer(gguf, kind, names))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf, names, max_model_len))


def special_token_id(gguf: GgufFile, name: str) -> int | None:
    """The id of the bos, eos, unknown or padding token; None if the file names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    return gguf.get(key, int) if gguf.has(key) else None


def _tokenizer(gguf: GgufFile, kind: str, names: list[str]) -> dict[str, Any]:
    """tokenizer.json, built by the library that will read it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    merges = [_pair(gguf, merge) for merge in gguf.strings("tokenizer.ggml.merges")]
    vocabulary = {name: index for index, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ModelError(f"{gguf.path}: tokenizer.ggml.tokens holds a token twice")
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "llama-bpe")
    except Exception as error:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = Tokenizer(model)
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf.numbers("tokenizer.ggml.token_type")
    special = (_TokenType.CONTROL, _TokenType.UNKNOWN)
    # One call for each, in the order of their ids: special tokens never appear in the text that clients see.
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name, token_type in zip(names, types, strict=False)
            if token_type in special
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(name, special=False, normalized=False)
            for name, token_type in zip(names, types, strict=False)
            if token_type == _TokenType.USER_DEFINED
        ]
    )
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    data["post_processor"] = _post_processor(gguf, names)
    return data


def _pair(gguf: GgufFile, merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not separator:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.merges holds {merge!r}, which is not two tokens")
    return left, right


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if kind == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    words = _LLAMA3_WORDS if kind == "llama-bpe" else _QWEN2_WORDS
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _adds_bos(gguf: GgufFile) -> bool:
    # What llama.cpp does where the file doesn't say.
    default = _KINDS.get(gguf.get("tokenizer.ggml.pre", str, "gpt-2")) == "llama-bpe"
    return bool(gguf.get("tokenizer.ggml.add_bos_token", bool, default))


def _post_processor(gguf: GgufFile, names: list[str]) -> dict[str, Any] | None:
    """Puts the bos token before a text, where the model wants it."""
    bos = special_token_id(gguf, "bos")
    if bos is None or not _adds_bos(gguf):
        return None
    token = {"SpecialToken": {"id": names[bos], "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            token,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": names[bos], "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {names[bos]: {"id": names[bos], "ids": [bos], "tokens": [names[bos]]}},
    }


def _tokenizer_config(gguf: GgufFile, names: list[str], max_model_len: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(gguf),
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = special_token_id(gguf, name)
        if index is not None:
            if index >= len(names):
                raise ModelError(f"{gguf.path}: the {name} token {index} lies beyond the {len(names)} tokens")
            config[f"{key}_token"] = names[index]
    if gguf.has("tokenizer.chat_template"):
        config["chat_template"] = gguf.get("tokenizer.chat_template", str)
    return config


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
