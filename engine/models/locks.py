"""Locks between processes that share a folder: ranks that build shards, starts that import a model.

All of them are `flock`: the kernel gives a lock back when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.models.errors import ModelError

STALL_LIMIT_S = 120.0
"""A lock whose holder has shown no progress for so long is given up."""

_POLL_S = 0.05


class HeldLock:
    """An exclusive lock; its holder beats while it works, so that those who wait know that it lives."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def beat(self) -> None:
        os.utime(self._fd)


@contextlib.contextmanager
def locked(
    path: Path, waiting: Callable[[], None], stall_limit_s: float = STALL_LIMIT_S
) -> Iterator[HeldLock]:
    """Holds an exclusive lock on `path`, a file that is made if need be and must never be removed.

    `waiting` is called every 50 ms of the wait. Raises ModelError when the holder has not beaten for
    `stall_limit_s`: it is frozen, or its disk is.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        began = time.time()
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            if time.time() - max(began, os.fstat(fd).st_mtime) > stall_limit_s:
                raise ModelError(
                    f"{path} has been locked for {stall_limit_s:.0f} s by a process that makes no progress; "
                    "end that process (`fuser` shows it) and start again"
                )
            waiting()
            time.sleep(_POLL_S)
        lock = HeldLock(fd)
        lock.beat()
        yield lock
    finally:
        os.close(fd)
