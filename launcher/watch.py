"""What guard, supervisor and rank share: the page of memory in which a rank shows its progress, and how a rank waits
for its guard and ends with it. Called by all three, so it uses the standard library only; it must never block, and
writing to the page must never enter the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path

from launcher.life_lock import LifeLock

PROGRESS_PAGE_VARIABLE = "PHALANX_PROGRESS_PAGE"
"""Environment variable that tells a rank the path of its progress page."""

LIFE_SUFFIX = ".life"
"""Of the file beside the page that holds the rank's life lock."""

FACTS_SUFFIX = ".facts"
"""Of the file beside the page in which the rank tells of itself."""

PARENT_VARIABLE = "PHALANX_PARENT_PID"
"""Environment variable in which a guard tells its rank the guard's own process id."""

START_GATE_VARIABLE = "PHALANX_START_GATE"
"""Environment variable in which a guard tells the rank of a spare where it parks, and the descriptor of the
pipe to wait at: `warm 5`."""

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: a rank or front that ends with it can be helped by no relaunch."""


class Phase(IntEnum):
    """What a rank is doing. The order is the order of a life, except that IDLE and STEPPING alternate, and that
    the rank of a spare is PARKED in the middle of it."""

    STARTING = 0
    IMPORTING = 1
    JOINING = 2
    LOADING = 3
    IDLE = 4
    STEPPING = 5
    STOPPING = 6
    PARKED = 7


class SpareKind(Enum):
    """What is kept ready for the next world. WARM ranks park after the imports and before MPI_Init, HOT ones
    when MPI is up and the weights are mapped."""

    NONE = "none"
    WARM = "warm"
    HOT = "hot"


@dataclass(frozen=True)
class Progress:
    """A reading of a progress page."""

    phase: Phase
    step: int
    """Number of the last step begun."""
    num_tokens: int
    """Tokens that this step computes."""
    collective: int
    """Collectives begun in that step."""
    age_s: float
    """Seconds since the rank last wrote anything."""
    load_done: int
    load_total: int
    """Bytes of weights in place, and of all; 0 of 0 before loading."""
    kv_blocks: int
    """KV blocks of the world; 0 before they are agreed on."""
    endpoint: str | None
    """Rank 0: the gateway's endpoint, once it listens."""


class ProgressPage:
    """One page of shared memory with one writer, the rank, and one reader, its guard; the word for the lease is the
    other way round.

    Aligned 64-bit words and the endpoint's text. A word is written by one store, so that the reader
    never sees half of one; the endpoint's length is written after its bytes.
    """

    _SIZE = mmap.PAGESIZE
    _STAMP, _PHASE, _STEP, _NUM_TOKENS, _COLLECTIVE, _LOAD_DONE, _LOAD_TOTAL, _KV_BLOCKS = range(8)
    _ENDPOINT_BYTES, _LEASE = 8, 9
    _ENDPOINT_OFFSET = 128
    _MAX_ENDPOINT_BYTES = 1024

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._words = memoryview(memory)[: self._ENDPOINT_OFFSET].cast("q")
        self._life: LifeLock | None = None

    @classmethod
    def create(cls, path: Path) -> ProgressPage:
        """Makes the file, zeroed, for this user only; on a memory-backed file system the writer never waits
        for a disk. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, cls._SIZE)
            page = cls(mmap.mmap(descriptor, cls._SIZE))
        finally:
            os.close(descriptor)
        page._stamp()
        return page

    @classmethod
    def open(cls, path: Path | None) -> ProgressPage:
        """The page that a guard made; with None one of the process's own, which nobody reads. From here on the
        guard also learns of this thread's end (life_lock.py). Raises OSError."""
        if path is None:
            return cls(mmap.mmap(-1, cls._SIZE))
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            page = cls(mmap.mmap(descriptor, cls._SIZE))
        finally:
            os.close(descriptor)
        page._life = LifeLock.hold(path.with_suffix(LIFE_SUFFIX))
        return page

    def enter(self, phase: Phase) -> None:
        """Begins a phase."""
        self._words[self._PHASE] = phase
        self._stamp()

    def step(self, number: int, num_tokens: int = 1) -> None:
        """Begins step `number`, which computes so many tokens."""
        words = self._words
        words[self._STEP] = number
        words[self._NUM_TOKENS] = num_tokens
        words[self._COLLECTIVE] = 0
        words[self._PHASE] = Phase.STEPPING
        self._stamp()

    def collective(self) -> None:
        """Counts a collective begun in this step."""
        self._words[self._COLLECTIVE] += 1
        self._stamp()

    def collective_words(self) -> tuple[int, int]:
        """Addresses for native code that does what `collective` does: of the count, and of the time of the last write
        (CLOCK_MONOTONIC, ns), which is written second. The page cannot be closed any more."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return address + 8 * self._COLLECTIVE, address + 8 * self._STAMP

    def load(self, done_bytes: int, total_bytes: int) -> None:
        """Weights in place so far, in bytes."""
        self._words[self._LOAD_TOTAL] = total_bytes
        self._words[self._LOAD_DONE] = done_bytes
        self._stamp()

    def hold_kv_blocks(self, count: int) -> None:
        """KV blocks that the ranks have agreed on."""
        self._words[self._KV_BLOCKS] = count
        self._stamp()

    def serve_at(self, endpoint: str) -> None:
        """Rank 0: the gateway listens at this ZeroMQ endpoint. Raises ValueError beyond 1024 bytes."""
        text = endpoint.encode()
        if len(text) > self._MAX_ENDPOINT_BYTES:
            raise ValueError(f"endpoint of {len(text)} bytes; at most {self._MAX_ENDPOINT_BYTES} fit")
        self._memory[self._ENDPOINT_OFFSET : self._ENDPOINT_OFFSET + len(text)] = text
        self._words[self._ENDPOINT_BYTES] = len(text)
        self._stamp()

    def read(self) -> Progress:
        """The guard's view; values of different fields may be from neighbouring writes."""
        words = self._words
        length = words[self._ENDPOINT_BYTES]
        text = self._memory[self._ENDPOINT_OFFSET : self._ENDPOINT_OFFSET + length]
        stamp = words[self._STAMP]
        return Progress(
            phase=Phase(words[self._PHASE]),
            step=words[self._STEP],
            num_tokens=words[self._NUM_TOKENS],
            collective=words[self._COLLECTIVE],
            age_s=max(0.0, (time.monotonic_ns() - stamp) / 1e9),
            load_done=words[self._LOAD_DONE],
            load_total=words[self._LOAD_TOTAL],
            kv_blocks=words[self._KV_BLOCKS],
            endpoint=text.decode() if length else None,
        )

    def lend(self, ends_at: float) -> None:
        """The guard's: the rank may live until then, in seconds of this host's CLOCK_MONOTONIC."""
        self._words[self._LEASE] = round(ends_at * 1e9)

    @property
    def lease_ends_at(self) -> float | None:
        """What the guard has lent; None: it needs no lease."""
        return self._words[self._LEASE] / 1e9 or None

    def close(self) -> None:
        """Unmaps the page; the file stays."""
        self._words.release()
        self._memory.close()

    def _stamp(self) -> None:
        self._words[self._STAMP] = time.monotonic_ns()  # CLOCK_MONOTONIC through the vDSO: no system call


class FactSheet:
    """What a rank tells of itself, in words: a file beside its progress page, put in place whole."""

    def __init__(self, page_path: Path | None) -> None:
        """None: nobody reads it."""
        self._path = None if page_path is None else page_path.with_suffix(FACTS_SUFFIX)
        self._facts: dict[str, str] = {}

    def tell(self, facts: Mapping[str, str]) -> None:
        """These, and what was told before."""
        if self._path is None:
            return
        self._facts.update(facts)
        temporary = self._path.with_suffix(f"{FACTS_SUFFIX}.new")
        with contextlib.suppress(OSError):  # a full disk is found out elsewhere
            temporary.write_text(json.dumps(self._facts))
            temporary.rename(self._path)


class FactReader:
    """The guard's view of it."""

    def __init__(self, page_path: Path) -> None:
        self._path = page_path.with_suffix(FACTS_SUFFIX)
        self._read_at_ns = 0

    def read_new(self) -> dict[str, str]:
        """All facts, if there are any that were not read yet; a look at the file's time, mostly."""
        try:
            changed_ns = self._path.stat().st_mtime_ns
            if changed_ns == self._read_at_ns:
                return {}
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        self._read_at_ns = changed_ns
        return {name: value for name, value in content.items() if isinstance(value, str)}


class StartGate:
    """Where the rank of a spare waits, asleep, until its guard lets it go on."""

    def __init__(self, kind: SpareKind, descriptor: int = -1) -> None:
        self.kind = kind
        """Where the rank parks; NONE: nowhere."""
        self._descriptor = descriptor

    @classmethod
    def from_environment(cls) -> StartGate:
        """The gate that the guard made; without a guard, or in a world that is no spare, one of kind NONE."""
        value = os.environ.pop(START_GATE_VARIABLE, None)
        if value is None:
            return cls(SpareKind.NONE)
        kind, descriptor = value.split()
        return cls(SpareKind(kind), int(descriptor))

    def is_open(self) -> bool:
        """Whether `wait` would return at once."""
        return self.kind is SpareKind.NONE or bool(select.select([self._descriptor], [], [], 0)[0])

    def wait(self) -> None:
        """Until the guard says go, for hours if need be. Raises SystemExit if the guard is gone."""
        if self.kind is not SpareKind.NONE and not os.read(self._descriptor, 1):
            raise SystemExit(1)


_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent() -> None:
    """Has the kernel SIGKILL this process when its parent ends; ends it now if the parent is gone already.

    The kernel watches the *thread* that forked, so a parent must fork from a thread that lives as long as it
    does. Raises OSError where the kernel has no such thing.
    """
    die_with(int(os.environ.get(PARENT_VARIABLE) or os.getppid()))


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """The same, for a parent that is known by its pid, and by any signal."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the kernel was told to watch it
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Orphaned descendants become children of this process, so that it can see and reap them all."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
