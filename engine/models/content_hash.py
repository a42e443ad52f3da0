"""Hashes of the contents of large files, computed once and remembered.

Called by whoever keys a cache by content. A record lies in a cache of ours, never beside the files, which may
be read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError

Advance = Callable[[int], None]
"""Is told the bytes that were done since the last call."""

_VERSION = 1
_CHUNK_BYTES = 32 * 2**20


class ContentHashes:
    """SHA-256 of files, remembered in a JSON file as long as size, modification time and inode stay."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._entries = _read(record)

    @classmethod
    def for_source(cls, cache: Path, source: Path) -> ContentHashes:
        """Those of one model (a folder or a file), kept under `cache`/sources."""
        return cls(record_path(cache, source))

    def known(self, file: Path) -> str | None:
        """The hash of a file that has not changed since it was computed; None otherwise."""
        entry = self._entries.get(str(file))
        if entry is None or len(entry) != 4 or entry[:3] != _stamp(file):
            return None
        return str(entry[3])

    def compute(self, file: Path, advance: Advance) -> str:
        """The hash of a file, read for it unless it is known. Raises ModelError if it cannot be read."""
        known = self.known(file)
        if known is None:
            stamp = _stamp(file)
            known = hash_file(file, advance)
            self._entries[str(file)] = [*stamp, known]
        return known

    def save(self) -> None:
        """Writes the record, aside and renamed, so that nobody sees half of it."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        aside = self._record.with_name(f"{self._record.name}.{os.getpid()}.partial")
        aside.write_text(json.dumps({"version": _VERSION, "files": self._entries}))
        os.replace(aside, self._record)


def record_path(cache: Path, source: Path) -> Path:
    """Where the hashes of a model's files are kept."""
    name = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:32]
    return cache / "sources" / f"{name}.json"


def hash_file(file: Path, advance: Advance) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. Raises ModelError if it cannot be read."""
    content = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                content.update(buffer[:count])
                advance(count)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    return content.hexdigest()


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _read(record: Path) -> dict[str, list[Any]]:
    try:
        data = json.loads(record.read_bytes())
        if data["version"] != _VERSION:
            return {}
        return {str(name): list(entry) for name, entry in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there yet, or broken: it only remembers what can be computed again
