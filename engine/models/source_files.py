"""The weight files of a model folder: which they are, where each tensor lies, and what their content is.

Called by the loader. Imports no torch and writes nothing into the model folder, which may be read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.models.errors import ModelError

_INDEX = "model.safetensors.index.json"
_HASH_CHUNK_BYTES = 32 * 2**20

Advance = Callable[[int], None]
"""Is told the bytes that were done since the last call; 0 says "still waiting, still alive"."""


class SourceFiles:
    """The safetensors files of a folder, single or with an index. Raises ModelError where there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] | None = None
        index = folder / _INDEX
        if index.is_file():
            self._file_of = _read_index(index)
            self.paths = [folder / name for name in sorted(set(self._file_of.values()))]
            for path in self.paths:
                if not path.is_file():
                    raise ModelError(f"{path} is missing, and {index.name} names it; fetch the model again")
            self._hashed = [*self.paths, index]
        else:
            single = folder / "model.safetensors"
            self.paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
            if not self.paths:
                hint = ""
                if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
                    hint = "; it has pickled weights, which are never read: convert them to safetensors"
                raise ModelError(f"{folder} holds no *.safetensors files{hint}")
            if len(self.paths) > 1:
                raise ModelError(
                    f"{folder} holds {len(self.paths)} *.safetensors files but neither model.safetensors nor "
                    f"{_INDEX}, which says what belongs to the model; fetch the model again"
                )
            self._hashed = self.paths

    def file_of(self, tensor: str) -> Path:
        """The file that holds a tensor, or should hold it. Raises ModelError for one that the index lacks."""
        if self._file_of is None:
            return self.paths[0]
        name = self._file_of.get(tensor)
        if name is None:
            raise ModelError(f"{self.folder / _INDEX}: tensor {tensor} is missing; the model is not complete")
        return self.folder / name

    def recorded_identity(self, record: Path) -> str | None:
        """The content hash that `identity` left in `record`, if every file still has the size, modification
        time and inode that it had then; None otherwise."""
        return self._combine(_read_record(record))

    def bytes_to_hash(self, record: Path) -> int:
        """Bytes that `identity` will read."""
        known = _read_record(record)
        return sum(path.stat().st_size for path in self._hashed if self._known(known, path) is None)

    def identity(self, record: Path, advance: Advance) -> str:
        """SHA-256 over names and contents of all files. What was computed is kept in `record` (a JSON file),
        so that a file is read for it once only."""
        known = _read_record(record)
        for path in self._hashed:
            if self._known(known, path) is None:
                known[str(path)] = [*_stamp(path), _hash_file(path, advance)]
        record.parent.mkdir(parents=True, exist_ok=True)
        aside = record.with_name(f"{record.name}.{os.getpid()}.partial")
        aside.write_text(json.dumps({"version": 1, "files": known}))
        os.replace(aside, record)
        combined = self._combine(known)
        if combined is None:
            raise ModelError(
                f"{self.folder}: the weight files are being changed; start again when that is done"
            )
        return combined

    def _known(self, known: dict[str, list[Any]], path: Path) -> str | None:
        entry = known.get(str(path))
        if entry is None or len(entry) != 4 or entry[:3] != _stamp(path):
            return None
        return str(entry[3])

    def _combine(self, known: dict[str, list[Any]]) -> str | None:
        combined = hashlib.sha256()
        for path in self._hashed:
            content = self._known(known, path)
            if content is None:
                return None
            combined.update(f"{path.name}\0{content}\0".encode())
        return combined.hexdigest()


def record_path(shard_cache: Path, folder: Path) -> Path:
    """Where the content hashes of a model folder are kept."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return shard_cache / "sources" / f"{name}.json"


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not a valid index of safetensors files: {error!r}") from None
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{index}: weight_map holds {name!r}; the name of a file in that folder is allowed"
            )
    return names


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _read_record(record: Path) -> dict[str, list[Any]]:
    try:
        data = json.loads(record.read_bytes())
        return (
            {str(name): list(entry) for name, entry in data["files"].items()} if data["version"] == 1 else {}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there yet, or broken: it is only a memory of what can be computed again


def _hash_file(path: Path, advance: Advance) -> str:
    content = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                content.update(buffer[:count])
                advance(count)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    return content.hexdigest()
