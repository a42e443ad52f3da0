"""What a GGUF file says of its tokens, whatever kind of tokenizer they are of.

Called by the importer and by what writes its tokenizer.
"""

from __future__ import annotations

from enum import IntEnum

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile

SENTENCEPIECE = "llama"
"""What `tokenizer.ggml.model` calls it."""

_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a model's turn whatever else the file says: many files name one token as the end of a text, which
chats never come to."""

_SENTENCEPIECE_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp takes where the file names none."""


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def token_types(gguf: GgufFile) -> list[int]:
    """By token. Ends of turns are control tokens, as in llama.cpp: some converters forgot to say so."""
    types = gguf.numbers("tokenizer.ggml.token_type")
    ends = set(_TURN_ENDS)
    return [
        TokenType.CONTROL if name in ends and kind == TokenType.USER_DEFINED else kind
        for name, kind in zip(gguf.strings("tokenizer.ggml.tokens"), types, strict=False)
    ]


def special_token_id(gguf: GgufFile, name: str) -> int | None:
    """The id of the bos, eos, unknown or padding token; None if there is none. Raises ModelError for an id that is
    no token's."""
    key = f"tokenizer.ggml.{name}_token_id"
    if gguf.has(key):
        index: int = gguf.get(key, int)
        # -1 and its unsigned twin stand for "none" in files that older tools wrote.
        if index in (-1, 2**32 - 1):
            return None
    elif gguf.get("tokenizer.ggml.model", str) == SENTENCEPIECE and name in _SENTENCEPIECE_DEFAULTS:
        index = _SENTENCEPIECE_DEFAULTS[name]
    else:
        return None
    count = gguf.length("tokenizer.ggml.tokens")
    if not 0 <= index < count:
        raise ModelError(f"{gguf.path}: the {name} token {index} lies beyond the {count} tokens")
    return index


def end_token_ids(gguf: GgufFile) -> list[int]:
    """Every token that ends a sequence: of the text, of a turn, and those that are known by their names."""
    ids = [index for name in ("eos", "eot") if (index := special_token_id(gguf, name)) is not None]
    ids += [
        index
        for index, (name, kind) in enumerate(
            zip(gguf.strings("tokenizer.ggml.tokens"), token_types(gguf), strict=False)
        )
        if name in _TURN_ENDS and kind == TokenType.CONTROL
    ]
    return list(dict.fromkeys(ids))
