"""What a tokenizer's token ids mean, as one hash: by it the journal knows whether its tokens are this model's.

Called by the front at its start. The hash is of the content, never of the file: the same tokenizer may be written
again with other spaces or in another order while a front serves from it.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import msgspec


class _Model(msgspec.Struct):
    vocab: Any = None


class _Tokenizer(msgspec.Struct):
    """The parts of tokenizer.json that say what a token id stands for. How a text is cut into tokens is none."""

    model: _Model
    added_tokens: Any = None
    decoder: Any = None


def tokenizer_identity(path: Path) -> bytes:
    """The hash (16 bytes) of a tokenizer.json. Of a file that is of another kind it is one of its bytes. Raises
    OSError."""
    content = path.read_bytes()
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        content = msgspec.json.encode(msgspec.json.decode(content, type=_Tokenizer), order="deterministic")
    return hashlib.blake2b(content, digest_size=16).digest()
