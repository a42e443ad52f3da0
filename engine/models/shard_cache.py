"""The folder in which ranks keep their cut weights: who uses it, who builds, and what is thrown away.

Called by the loader. Knows files and locks, nothing of tensors. Layout: `<root>/<world key>/<rank file>`; a
world's folder holds a marker file, on which every process that has the folder's files mapped keeps a shared
lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engine.models.errors import ModelError
from engine.models.locks import HeldLock, locked

DEFAULT_MAX_BYTES = 50 * 2**30
DEFAULT_MAX_DISK_SHARE = 0.25

_MARKER = ".phalanx-shards"
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
        """`max_bytes` bounds the folders' sizes; None means 50 GiB or a quarter of the disk, the lesser.

        Raises ModelError if the folder cannot be made or written to.
        """
        self.root = root
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK | os.X_OK):
                raise PermissionError(0, "permission denied")
            disk_bytes = shutil.disk_usage(root).total
        if max_bytes is None:
            max_bytes = min(DEFAULT_MAX_BYTES, int(disk_bytes * DEFAULT_MAX_DISK_SHARE))
        self.max_bytes = max_bytes

    def use(self, name: str) -> FolderUse:
        """Marks the folder `name` as in use from now on, makes it if need be, and counts it as used now."""
        with _writing(self.root), self._root_lock():
            folder = self.root / name
            folder.mkdir(exist_ok=True)
            fd = os.open(folder / _MARKER, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.utime(fd)
            return FolderUse(folder, fd)

    def make_room(self, needed_bytes: int) -> None:
        """Removes folders that nobody uses, least recently used first, until `needed_bytes` more fit into the
        bound and onto the disk.

        The bound gives way to folders that are in use; the disk does not: raises ModelError if it is full.
        """
        with _writing(self.root), self._root_lock():
            for leftover in self.root.glob(f"{_EVICTED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            folders = sorted(self._folders())
            total = sum(size for _, size, _ in folders)
            for _, size, folder in folders:
                fits_disk = shutil.disk_usage(self.root).free >= needed_bytes
                if fits_disk and total + needed_bytes <= self.max_bytes:
                    break
                if _remove_unless_used(folder):
                    total -= size
            free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ModelError(
                f"{self.root}: {needed_bytes / 2**20:.0f} MiB are needed for cut weights and "
                f"{free / 2**20:.0f} MiB are free; free some, or set PHALANX_CACHE to a folder elsewhere"
            )

    def _root_lock(self) -> contextlib.AbstractContextManager[HeldLock]:
        return locked(self.root / "lock", waiting=lambda: None)

    def _folders(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size in bytes and path of every folder that bears the cache's marker."""
        for marker in self.root.glob(f"*/{_MARKER}"):
            sizes = 0
            for file in marker.parent.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    sizes += file.stat().st_size
            yield marker.stat().st_mtime, sizes, marker.parent


def _remove_unless_used(folder: Path) -> bool:
    fd = os.open(folder / _MARKER, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    # Renamed first: a removal that is cut short must not leave a folder that looks whole.
    aside = folder.with_name(f"{_EVICTED}{folder.name}")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return True


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the shard cache {root} cannot be written: {error.strerror}; "
            "set PHALANX_CACHE to a folder that can be"
        ) from None
