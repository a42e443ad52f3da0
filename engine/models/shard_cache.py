"""The folder in which ranks keep their cut weights: who uses it, who builds, and what is thrown away.

Called by the loader, and by `cache_contents` for a person. Knows files and locks, nothing of tensors. Layout:
`<root>/<world key>/<rank file>`; a world's folder holds a marker file, on which every process that has the folder's
files mapped keeps a shared lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.models.cache_entries import MARKER, Clearing, Entry, choose, read_entries
from engine.models.errors import ModelError
from engine.models.locks import HeldLock, locked

DEFAULT_MAX_BYTES = 50 * 2**30
DEFAULT_MAX_DISK_SHARE = 0.25
DEFAULT_FREE_DISK_SHARE = 0.1
"""What the cache leaves free of its disk, as far as it can by giving up what nobody uses: others live there, too."""

_LEAST_FREE_DISK_SHARE = 0.01
_LEAST_FREE_BYTES = 2**30
"""The lesser of the two stays free in any case: on a disk that is full to the last byte, journals fail with it."""

_EVICTED = ".evicted-"


class FolderUse:
    """A mark that a folder of the cache is in use. It ends with the process, or when it is released."""

    def __init__(self, folder: Path, fd: int) -> None:
        self.folder = folder
        self._fd: int | None = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.release()


class ShardCache:
    """The cache as a whole: hands out folders, and keeps their total size within a bound."""

    def __init__(self, root: Path, max_bytes: int | None = None) -> None:
        """`max_bytes` bounds the folders' sizes; None means 50 GiB or a quarter of the disk, the lesser, and less
        where that leaves the disk less than a tenth free.

        Raises ModelError if the folder cannot be made or written to.
        """
        self.root = root
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK | os.X_OK):
                raise PermissionError(0, "permission denied")
            disk_bytes = shutil.disk_usage(root).total
        self.keep_free_bytes = 0 if max_bytes is not None else int(disk_bytes * DEFAULT_FREE_DISK_SHARE)
        if max_bytes is None:
            max_bytes = min(DEFAULT_MAX_BYTES, int(disk_bytes * DEFAULT_MAX_DISK_SHARE))
        self.max_bytes = max_bytes
        self._least_free_bytes = min(_LEAST_FREE_BYTES, int(disk_bytes * _LEAST_FREE_DISK_SHARE))

    def use(self, name: str, model: Path | None = None) -> FolderUse:
        """Marks the folder `name` as in use from now on, makes it if need be, and counts it as used now. `model`:
        what its weights are cut from, for whoever looks into the cache."""
        with _writing(self.root), self._root_lock():
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            fd = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if model is not None:
                length = os.pwrite(fd, os.fsencode(model), 0)
                os.truncate(fd, length)
            os.utime(fd)
            return FolderUse(folder, fd)

    def entries(self) -> list[Entry]:
        """What it holds, least recently used first."""
        with _writing(self.root), self._root_lock():
            return read_entries(self.root)

    def bound_bytes(self, held_bytes: int) -> int:
        """What all folders may take together, where they take `held_bytes` now: `max_bytes`, or less on a disk that
        others fill."""
        free = shutil.disk_usage(self.root).free
        return max(0, min(self.max_bytes, held_bytes + free - self.keep_free_bytes))

    def make_room(self, needed_bytes: int) -> None:
        """Removes stale files, then folders that nobody uses, least recently used first, until `needed_bytes` more
        fit into the bound and onto the disk.

        The bound gives way to folders in use and to what is needed; the disk does not: raises ModelError if it is
        full.
        """
        reserve = self._least_free_bytes
        with _writing(self.root), self._root_lock() as lock:
            found = read_entries(self.root)
            held = sum(entry.num_bytes for entry in found)
            over_bound = held + needed_bytes - self.bound_bytes(held)
            over_disk = needed_bytes + reserve - shutil.disk_usage(self.root).free
            self._remove(choose(found, max(over_bound, over_disk)), lock)
            free = shutil.disk_usage(self.root).free
        if free < needed_bytes + reserve:
            raise ModelError(
                f"{self.root}: {needed_bytes / 2**20:.0f} MiB are needed for cut weights and "
                f"{free / 2**20:.0f} MiB are free, of which {reserve / 2**20:.0f} MiB are left to others; free "
                "some (`phalanx cache prune --all`), or set PHALANX_CACHE to a folder elsewhere"
            )

    def prune(self, keep_bytes: int | None = None, dry_run: bool = False) -> Clearing:
        """Removes what `make_room` would until no more than `keep_bytes` are left (None: the bound), and says what
        that was; with `dry_run` only says it."""
        with _writing(self.root), self._root_lock() as lock:
            found = read_entries(self.root)
            held = sum(entry.num_bytes for entry in found)
            clearing = choose(found, held - (self.bound_bytes(held) if keep_bytes is None else keep_bytes))
            if not dry_run:
                self._remove(clearing, lock)
            return clearing

    def _remove(self, clearing: Clearing, lock: HeldLock) -> None:
        for leftover in self.root.glob(f"{_EVICTED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for file in clearing.files:
            file.path.unlink(missing_ok=True)
            lock.beat()
        for entry in clearing.entries:
            # Renamed first: a removal that is cut short must not leave a folder that looks whole.
            aside = entry.folder.with_name(f"{_EVICTED}{entry.folder.name}")
            os.rename(entry.folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
            lock.beat()

    def _root_lock(self) -> contextlib.AbstractContextManager[HeldLock]:
        return locked(self.root / "lock", waiting=lambda: None)


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the shard cache {root} cannot be written: {error.strerror}; "
            "set PHALANX_CACHE to a folder that can be"
        ) from None
