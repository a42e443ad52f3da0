"""What all fronts of a deployment count together: a small file in the run folder that each of them maps into memory.

Made by front.py where there are several fronts, read by admission.py and keys.py. No number has two writers: a front
changes its own only, so that nothing on the way of a request waits for a lock or for another front.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from pathlib import Path

from gateway.errors import EndpointError

MAX_BUCKETS = 4096
LOCK_WAIT_S = 1.0
"""For another front that makes a place for a key, which takes microseconds."""
_LOCK_RETRY_S = 0.005
_MAGIC = 0x5048_414C_0001
_WORD_BYTES = 8
_WAITING = 1
"""The first word behind the mark of the format: requests and prompt tokens that wait at each front, in turn."""


class SharedCounts:
    """The file, as one front sees it. Words of 64 bits, in the machine's order."""

    def __init__(self, run_dir: Path, front: int, fronts: int) -> None:
        """Of a front that starts: nothing waits there. Raises EndpointError if the file cannot be used."""
        self.front = front
        self.fronts = fronts
        self._path = run_dir / f"counts-{fronts}.shared"
        self._places = _WAITING + 2 * fronts
        self._place_words = 1 + 3 * fronts
        size = _WORD_BYTES * (self._places + MAX_BUCKETS * self._place_words)
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # All of it, now: a page for which the disk has no room would kill the process when it is written.
            os.posix_fallocate(self._descriptor, 0, size)
            memory = memoryview(mmap.mmap(self._descriptor, size))
        except OSError as error:
            text = (
                f"{self._path}: {error}; the fronts count together there: make room, or serve with one front"
            )
            raise EndpointError(text) from None
        self._numbers: memoryview[int] = memory.cast("q")
        self._floats: memoryview[float] = memory.cast("d")
        if self._numbers[0] not in (0, _MAGIC):
            raise EndpointError(f"{self._path} was written by another version; remove it")
        self._numbers[0] = _MAGIC
        self._own_waiting = _WAITING + 2 * front
        self._other_waiting = [_WAITING + 2 * other for other in range(fronts) if other != front]
        self.set_waiting(0, 0)

    def set_waiting(self, num_requests: int, num_tokens: int) -> None:
        """What waits at this front for its first token."""
        self._numbers[self._own_waiting] = num_requests
        self._numbers[self._own_waiting + 1] = num_tokens

    def waiting_elsewhere(self) -> tuple[int, int]:
        """Requests and tokens that wait at the other fronts."""
        numbers = self._numbers
        requests = sum([numbers[at] for at in self._other_waiting])
        return requests, sum([numbers[at + 1] for at in self._other_waiting])

    def bucket(self, name: str) -> SharedBucket | None:
        """The charges of all fronts to the limit of this name; None if there is no place for it."""
        digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
        place = self._place(1 + int.from_bytes(digest, "big"))
        return None if place is None else SharedBucket(self._floats, place + 1, self.front, self.fronts)

    def _place(self, mark: int) -> int | None:
        """Where the words of a mark begin. The lock is taken for making a place only, and released by the kernel with
        a process that dies."""
        found = self._find(mark)
        if found is None or self._numbers[found] == mark:
            return found
        give_up_at = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > give_up_at:
                    return None
                time.sleep(_LOCK_RETRY_S)
        try:
            found = self._find(mark)
            if found is not None:
                self._numbers[found] = mark
            return found
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _find(self, mark: int) -> int | None:
        """The place of a mark, or the free one that it would get; None if all are taken by others."""
        for number in range(MAX_BUCKETS):
            place = self._places + (mark + number) % MAX_BUCKETS * self._place_words
            if self._numbers[place] in (0, mark):
                return place
        return None


class SharedBucket:
    """One limit: what each front has charged in all, and how full it found the bucket when it did so last."""

    __slots__ = ("_charged", "_floats", "_own")

    def __init__(self, floats: memoryview[float], begin: int, front: int, fronts: int) -> None:
        self._floats = floats
        self._own = begin + 3 * front
        self._charged = [begin + 3 * number for number in range(fronts)]

    def total(self) -> float:
        """Charged by all fronts, ever; whole numbers, exact to 2**53."""
        floats = self._floats
        return sum([floats[at] for at in self._charged])

    def charge(self, amount: float, level: float, now: float) -> None:
        """`level`: what is left after that, at `now`."""
        floats, own = self._floats, self._own
        floats[own] += amount
        floats[own + 1] = level
        floats[own + 2] = now

    def last_level(self, now: float) -> tuple[float, float] | None:
        """What was left at which moment, by the youngest charge; None if there was none since the machine started."""
        floats = self._floats
        found = [(floats[at + 2], -floats[at + 1]) for at in self._charged if 0.0 < floats[at + 2] <= now]
        if not found:
            return None
        at, minus_level = max(found)
        return -minus_level, at
