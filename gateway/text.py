"""A model's text side: its tokenizer, its chat template, and the text of running requests.

Loaded once by the front from the model folder. Only the `tokenizers` library: transformers takes seconds to
import and nothing of it is needed here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gateway.chat_template import ChatTemplate, Message
from gateway.detokenizer import (
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    TextStream,
    WindowDetokenizer,
    special_token_ids,
)
from gateway.errors import ModelFilesError
from gateway.protocol import SamplingParams

LONG_TEXT = 8192
"""Characters; longer texts are encoded in a thread, since the front's loop has streams to serve."""

_PLAIN = SamplingParams()
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextTooLong(ValueError):
    """A text that is so long that no look at it is needed to know that it has too many tokens."""


class TextModel:
    """Encodes prompts and conversations, and makes the text streams of requests."""

    chat_template: ChatTemplate | None
    """None for a model that has none (a base model)."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.chat_template = chat_template
        self._special = special_token_ids(tokenizer)
        self._byte_table = ByteTable(tokenizer) if _is_byte_level(tokenizer) else None
        self._token_bytes: dict[int, bytes] = {}
        self.config: dict[str, Any] = {}
        """What tokenizer_config.json says."""

    @classmethod
    def from_folder(cls, folder: Path) -> TextModel:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises ModelFilesError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFilesError(f"{path} is missing; a model folder needs a tokenizer in that format")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelFilesError(f"{path} cannot be read: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = {
            name: token for name in SPECIAL_TOKENS if (token := _token_text(config.get(name))) is not None
        }
        source = _template_source(folder, config)
        template = None if source is None else ChatTemplate(source, special_tokens)
        model = cls(tokenizer, template)
        model.config = config
        return model

    def encode(self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Token ids of a text. Raises ValueError for text that is no valid Unicode (lone surrogates), and
        TextTooLong for one that certainly has more than `at_most` tokens: megabytes of text would take seconds
        to encode, only to be refused. (A text that is too long by less is encoded.)"""
        if at_most is not None and len(text) > LONG_TEXT and len(text) > at_most * self._longest_token:
            raise TextTooLong(f"the prompt has {len(text)} characters, which are more than {at_most} tokens")
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise ValueError("the text is not valid Unicode: it has a lone surrogate") from None
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, without special tokens unless they are asked for."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty for an id that it does not have."""
        return self._tokenizer.id_to_token(token_id) or ""

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id that the tokenizer knows."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_chat(
        self,
        messages: list[Message],
        *,
        at_most: int | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer unless told otherwise; `variables` are for
        the template. Raises ChatTemplateError, and what `encode` raises.

        The template writes its special tokens itself, so that none are added unless `add_special_tokens`."""
        text = self.template().render(messages, add_generation_prompt, variables)
        return self.encode(text, add_special_tokens=add_special_tokens, at_most=at_most)

    def template(self) -> ChatTemplate:
        """Raises ModelFilesError for a model that has none."""
        if self.chat_template is None:
            raise ModelFilesError("this model has no chat template; use /v1/completions")
        return self.chat_template

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself; of a special token its name. Empty for an id that the tokenizer
        does not know. Log-probabilities name tokens by it."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._look_up_bytes(token_id)
        return found

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return str(token).encode()
        if self._byte_table is not None:
            return self._byte_table[token_id]
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
        if byte:
            return bytes([int(byte[1], 16)])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def stream(
        self,
        stops: Sequence[str] = (),
        context: Sequence[int] = (),
        params: SamplingParams = _PLAIN,
    ) -> TextStream:
        """The text of a request's output, behind the tokens of its prompt. Raises ValueError for an empty stop
        string."""
        shown = (
            self._special.intersection(params.shown_token_ids)
            if params.skip_special_tokens
            else self._special
        )
        return TextStream(self._detokenizer(context, shown), stops, params.include_stop_str_in_output)

    def special_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """The ids of those texts that are special tokens."""
        ids = {text: self._tokenizer.token_to_id(text) for text in texts}
        return {text: token_id for text, token_id in ids.items() if token_id in self._special}

    @cached_property
    def _longest_token(self) -> float:
        """Characters of text that one token can stand for at most; infinite if that is not known."""
        if self._byte_table is None or self._tokenizer.normalizer is not None:
            return math.inf
        # In a byte-level vocabulary a token has a character for each byte of text.
        return max(map(len, self._tokenizer.get_vocab()), default=math.inf)

    def _detokenizer(self, context: Sequence[int], shown: frozenset[int]) -> Detokenizer:
        if self._byte_table is not None:
            return ByteLevelDetokenizer(self._byte_table, shown)
        return WindowDetokenizer(self._tokenizer, self._special, context, shown)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    if decoder["type"] == "Sequence":
        return [part["type"] for part in decoder["decoders"]] == ["ByteLevel"]
    return bool(decoder["type"] == "ByteLevel")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelFilesError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is not a JSON object")
    return content


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The file wins over the entry in the config, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):  # several named templates
        named = {part.get("name"): part.get("template") for part in entry if isinstance(part, dict)}
        entry = named.get("default")
    if entry is not None and not isinstance(entry, str):
        raise ModelFilesError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return entry


def _token_text(entry: Any) -> str | None:
    """A special token is written as its text, or as an object with its content."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
