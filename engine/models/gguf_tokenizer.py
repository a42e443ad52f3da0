"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json.

Called by the importer. What is special for a kind of vocabulary stands in gguf_bpe and gguf_sentencepiece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_bpe import adds_bos_by_default, byte_level_tokenizer
from engine.models.gguf_file import GgufFile
from engine.models.gguf_sentencepiece import is_matched_normalized, piece_names, sentencepiece_tokenizer
from engine.models.gguf_tokens import SENTENCEPIECE, TokenType, special_token_id, token_types

_BYTE_LEVEL = "gpt2"
_KEEP_WHAT_FOLLOWS = ("<unk>", "<s>", "<|endoftext|>")
"""Control tokens of Phi-3 that leave the spaces and lines behind them alone; the others swallow them."""


def write_tokenizer(gguf: GgufFile, folder: Path, max_model_len: int) -> None:
    """Writes both files into `folder`. Raises ModelError for a kind of tokenizer that is not supported."""
    model = gguf.get("tokenizer.ggml.model", str)
    if model not in (_BYTE_LEVEL, SENTENCEPIECE):
        raise ModelError(
            f"{gguf.path}: tokenizer {model!r} is not supported; supported in GGUF are {_BYTE_LEVEL} (byte-level "
            f"BPE) and {SENTENCEPIECE} (SentencePiece). Serve the model's Hugging Face folder, or its hub id, instead"
        )
    names = gguf.strings("tokenizer.ggml.tokens")
    types = token_types(gguf)
    if model == _BYTE_LEVEL:
        tokenizer = byte_level_tokenizer(gguf, names)
    else:
        names = piece_names(gguf, names, types)
        tokenizer = sentencepiece_tokenizer(gguf, names, types)
    _add_tokens(gguf, tokenizer, names, types)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    data["post_processor"] = _post_processor(gguf, names)
    _write_json(folder / "tokenizer.json", data)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(gguf, names, max_model_len))


def _add_tokens(gguf: GgufFile, tokenizer: Any, names: list[str], types: list[int]) -> None:
    """Makes the control tokens special, which never appear in the text that clients see, and the user's own tokens
    whole, whatever stands around them."""
    from tokenizers import AddedToken

    is_phi3 = gguf.get("general.architecture", str) == "phi3"
    swallows = is_phi3 and gguf.get("tokenizer.ggml.model", str) == SENTENCEPIECE
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    # One call for each, in the order of their ids.
    tokenizer.add_special_tokens(
        [
            AddedToken(
                name, special=True, normalized=False, rstrip=swallows and name not in _KEEP_WHAT_FOLLOWS
            )
            for name, kind in zip(names, types, strict=False)
            if kind in special
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(name, special=False, normalized=is_matched_normalized(gguf, name))
            for name, kind in zip(names, types, strict=False)
            if kind == TokenType.USER_DEFINED
        ]
    )


def _adds_bos(gguf: GgufFile) -> bool:
    is_byte_level = gguf.get("tokenizer.ggml.model", str) == _BYTE_LEVEL
    default = adds_bos_by_default(gguf) if is_byte_level else True
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
            config[f"{key}_token"] = names[index]
    if gguf.has("tokenizer.chat_template"):
        config["chat_template"] = gguf.get("tokenizer.chat_template", str)
    return config


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
