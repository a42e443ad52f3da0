"""The file of API keys: who has one, and what each may ask for. A key itself is in no file, only its salted hash.

Read by the front (keys.py), written by `phalanx keys`. The standard library and msgspec only.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from gateway.errors import GatewayError

PREFIX = "phx"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_SECRET_BYTES = 32


class KeyFileError(GatewayError):
    """The file cannot be used, with what to do about it."""


class KeyRecord(Struct, frozen=True, kw_only=True):
    """One key."""

    id: str
    """A part of the key that is no secret: by it the record is found."""
    name: str
    salt: str
    hash: str
    """SHA-256 of salt and key, in hex. A key has 256 random bits, which nobody guesses: a slow hash would protect
    nothing more, and would let anybody with wrong keys keep the front busy."""
    created: int = 0
    """Unix time in seconds."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together. None: as many as the server can."""


class _Content(Struct):
    keys: list[KeyRecord]


def make_key(
    name: str, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
) -> tuple[str, KeyRecord]:
    """A new key, which is shown once, and its record. Raises KeyFileError for a name or limit that cannot be."""
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"name {name!r}: allowed are 1 to 64 of letters, digits, and . _ @ -")
    for flag, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute)):
        if limit is not None and limit < 1:
            raise KeyFileError(f"--{flag}-per-minute {limit}: must be 1 or more")
    key_id, salt = secrets.token_hex(4), secrets.token_hex(16)
    key = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    return key, KeyRecord(
        id=key_id,
        name=name,
        salt=salt,
        hash=_hash(salt, key.encode()),
        created=int(time.time()),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
    )


def id_of(key: bytes) -> str | None:
    """The id in a key; None for what has none."""
    parts = key.split(b"-", 2)
    if len(parts) != 3 or parts[0] != PREFIX.encode():
        return None
    return parts[1].decode("ascii", "replace")


def matches(record: KeyRecord, key: bytes) -> bool:
    """Whether the record is of this key; takes as long for a wrong one."""
    return hmac.compare_digest(_hash(record.salt, key), record.hash)


def load(path: Path) -> list[KeyRecord]:
    """The records of a file. Raises KeyFileError."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_Content)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; make it with `phalanx keys add NAME`") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: it is no file of `phalanx keys`: {error}") from None
    ids = [record.id for record in content.keys]
    if len(set(ids)) != len(ids):
        raise KeyFileError(f"{path}: two keys have the same id; remove one of them")
    return content.keys


def save(path: Path, records: list[KeyRecord]) -> None:
    """Replaces the file as a whole, readable for its owner alone. Raises KeyFileError."""
    text = msgspec.json.format(msgspec.json.encode(_Content(records)), indent=2) + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None


def _hash(salt: str, key: bytes) -> str:
    return hashlib.sha256(salt.encode() + b":" + key).hexdigest()
