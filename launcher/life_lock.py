"""Tells a guard that its rank has begun to end, before the kernel takes the rank's memory down, which lasts from
hundredths of a second to seconds and is over before a pidfd or wait(2) say anything.

A robust mutex in shared memory (pthread_mutexattr_setrobust(3)) that the rank's main thread holds for as long as it
lives. The kernel hands it on first of all when that thread exits, whatever ended it. Used by guard and rank; where
there is no such mutex, nothing happens, and the end is seen as late as ever.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

_ATTRIBUTE_BYTES = 128
"""More than any pthread_mutexattr_t or pthread_mutex_t takes."""
_PROCESS_SHARED = 1
_ROBUST = 1
_HELD_OFFSET = 512


class LifeLock:
    """The mutex of one rank, in a file of its own that both ends map."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    @classmethod
    def create(cls, path: Path) -> LifeLock | None:
        """The guard's end, made before the rank is started; None where this system has no such mutex."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, mmap.PAGESIZE)
            lock = cls(mmap.mmap(descriptor, mmap.PAGESIZE))
        finally:
            os.close(descriptor)
        attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        try:
            library = _library()
            failed = (
                library.pthread_mutexattr_init(attribute)
                or library.pthread_mutexattr_setpshared(attribute, _PROCESS_SHARED)
                or library.pthread_mutexattr_setrobust(attribute, _ROBUST)
                or library.pthread_mutex_init(ctypes.c_void_p(lock._address), attribute)
            )
        except AttributeError:  # a C library without them
            return None
        return None if failed else lock

    @classmethod
    def hold(cls, path: Path) -> LifeLock | None:
        """The rank's end: from now on this thread, which must be the one that lives longest, holds the mutex. Keep
        what is returned. None where there is no file, or somebody holds it."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            lock = cls(mmap.mmap(descriptor, mmap.PAGESIZE))
        finally:
            os.close(descriptor)
        try:
            if _library().pthread_mutex_trylock(ctypes.c_void_p(lock._address)) != 0:
                return None
        except AttributeError:
            return None
        lock._memory[_HELD_OFFSET] = 1
        return lock

    @property
    def is_held(self) -> bool:
        """Whether the rank has ever taken it; until then nobody may wait for it, or the rank would have to."""
        return self._memory[_HELD_OFFSET] == 1

    def watch(self, on_end: Callable[[], None]) -> None:
        """Calls `on_end`, in a thread of its own, when the rank begins to end. Needs `is_held`."""

        def wait() -> None:
            if _library().pthread_mutex_lock(ctypes.c_void_p(self._address)) == errno.EOWNERDEAD:
                on_end()

        threading.Thread(target=wait, name="life-lock", daemon=True).start()


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
