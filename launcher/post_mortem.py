"""What can be told of a rank from outside: what it was doing, its last words, the memory it holds. Used by guard
and supervisor; reads files only."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from launcher.watch import Phase, Progress

LAST_LINES_BYTES = 4096
STACK_BYTES = 8192
STACK_VARIABLE = "PHALANX_STACK_DUMP"
"""Environment variable in which a guard tells its rank how to dump its stacks, signal and file: `41 PATH`."""
STACK_SIGNAL = signal.SIGRTMIN + 7
"""One that no MPI uses."""
STACK_WAIT_S = 0.2


def signal_name(exit_code: int | None) -> str | None:
    """Name of the signal that ended a process, from its exit code as subprocess gives it; None if none did."""
    if exit_code is None or exit_code >= 0:
        return None
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def describe_progress(progress: Progress) -> str:
    """What a rank is doing, as the end of a sentence after "while"."""
    if progress.phase is Phase.STEPPING:
        return f"in step {progress.step}, after {progress.collective} collectives"
    if progress.phase is Phase.LOADING:
        return f"loading ({progress.load_done / 1e6:.0f} of {progress.load_total / 1e6:.0f} MB)"
    return progress.phase.name.lower()


def last_lines(path: Path) -> str:
    """The end of a file of output, at most 4 KiB, beginning with a whole line; empty if there is none."""
    return _end_of(path, LAST_LINES_BYTES)


def telling_line(lines: str) -> str | None:
    """Of the end of a file of output, the one line to show: what Python says of a fatal signal (its stacks and the
    names of its modules come behind that), else the last one."""
    found = lines.splitlines()
    fatal = [line for line in found if line.startswith("Fatal Python error: ")]
    return next(iter([*fatal[-1:], *found[-1:]]), None)


def _end_of(path: Path, at_most_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - at_most_bytes))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    if size > at_most_bytes and "\n" in text:
        text = text.split("\n", 1)[1]
    return text.strip("\n")


def python_stacks(log_path: Path) -> str:
    """What Python said last of its stacks in a rank's output, at most 8 KiB: the traceback of an exception, or what
    faulthandler writes at a fatal signal. Empty if there is nothing of the kind."""
    text = _end_of(log_path, 4 * STACK_BYTES)
    starts = [text.rfind(sign) for sign in ("Traceback (most recent call last)", "Fatal Python error")]
    begin = max(starts)
    return text[begin:][:STACK_BYTES].strip("\n") if begin >= 0 else ""


def dump_stacks(pid: int, path: Path) -> str:
    """Asks a rank that hangs for its stacks, waits STACK_WAIT_S for them at most, and returns up to 8 KiB. Empty if
    the rank has not said, by making the file, that it can do that, or does not answer."""
    if not path.exists():
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACK_SIGNAL)
    give_up_at = time.monotonic() + STACK_WAIT_S
    size = 0
    while time.monotonic() < give_up_at:
        time.sleep(0.02)
        before, size = size, path.stat().st_size
        if 0 < size == before:
            break
    with path.open("rb") as file:
        return file.read(STACK_BYTES).decode(errors="replace").strip("\n")


def memory_bytes(pid: int) -> int:
    """Memory that a process holds: all of its own, and its share of what it shares (PSS, proc_pid_smaps(5)).
    0 where the kernel does not say. Walks the page tables, which takes milliseconds."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration, ValueError):
        return 0


def resident_bytes(pid: int) -> int:
    """Memory of which a process has pages in RAM, shared ones counted in full (proc_pid_statm(5)). 0 where the kernel
    does not say. Costs microseconds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
