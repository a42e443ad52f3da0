"""What lies in the shard cache: folders of worlds, who uses them, and files in them that nobody comes back for.

Called by `shard_cache`, which removes what is chosen here. Reads and probes locks; removes nothing itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MARKER = ".phalanx-shards"
"""A file in every folder of a world. Its text names the model, its time is the last use, its lock means use."""

STALE_AFTER_S = 7 * 24 * 3600.0
"""A file that was last mapped so long before its folder's last use is one that no world of today reads."""


@dataclass(frozen=True)
class StaleFile:
    """A rank's file of an earlier cut or of other kernels, or a half of one whose builder was killed."""

    path: Path
    num_bytes: int
    last_used: float


@dataclass(frozen=True)
class Entry:
    """The folder of one world: one model, cut and rounded in one way, for one kind of processor."""

    folder: Path
    model: str
    """The folder that the weights were cut from; empty where it was never written down."""
    num_bytes: int
    last_used: float
    """Seconds since 1970."""
    in_use: bool
    stale: tuple[StaleFile, ...]


@dataclass(frozen=True)
class Clearing:
    """What goes: files out of folders that stay, and whole folders."""

    files: list[StaleFile] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files) + sum(entry.num_bytes for entry in self.entries)


def read_entries(root: Path) -> list[Entry]:
    """Every folder that bears the cache's marker, least recently used first. The caller holds the cache's lock, so
    that nobody begins to use a folder meanwhile."""
    return sorted((_read(marker) for marker in root.glob(f"*/{MARKER}")), key=lambda entry: entry.last_used)


def choose(found: list[Entry], surplus_bytes: int) -> Clearing:
    """What has to go so that `surplus_bytes` fewer are taken: stale files, then folders that nobody uses, each the
    least recently used first. May be less than asked for: what is in use stays."""
    files: list[StaleFile] = []
    for file in sorted((file for entry in found for file in entry.stale), key=lambda file: file.last_used):
        if surplus_bytes <= 0:
            break
        files.append(file)
        surplus_bytes -= file.num_bytes
    entries: list[Entry] = []
    for entry in found:
        if surplus_bytes <= 0:
            break
        if not entry.in_use:
            entries.append(entry)
            surplus_bytes -= entry.num_bytes - sum(file.num_bytes for file in entry.stale if file in files)
    whole = {entry.folder for entry in entries}
    return Clearing([file for file in files if file.path.parent not in whole], entries)


def is_locked(path: Path) -> bool:
    """Whether any process holds a lock on a file, shared or not; False where there is none. True for another user's
    file that cannot be asked: it is not ours to remove."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _read(marker: Path) -> Entry:
    folder, last_used = marker.parent, marker.stat().st_mtime
    sizes = 0
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            sizes += file.stat().st_size
    model = ""
    with contextlib.suppress(OSError):
        model = marker.read_text(errors="replace")
    return Entry(folder, model, sizes, last_used, is_locked(marker), tuple(_stale(folder, last_used)))


def _stale(folder: Path, folder_used: float) -> Iterator[StaleFile]:
    for file in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            last_used = max(status.st_atime, status.st_mtime)
            if file.suffix == ".partial":
                # stage0-rank1-314074.4711.partial: a process that still writes it holds stage0-rank1-314074.lock.
                gone = not is_locked(file.with_suffix("").with_suffix(".lock"))
            else:
                gone = (
                    file.suffix == ".safetensors"
                    and last_used < folder_used - STALE_AFTER_S
                    and not is_locked(file)
                )
            if gone:
                yield StaleFile(file, status.st_size, last_used)
