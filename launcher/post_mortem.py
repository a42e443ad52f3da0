"""What can be told of a rank from outside: what it was doing, its last words, the memory it holds. Used by guard
and supervisor; reads files only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launcher.watch import Phase, Progress

LAST_LINES_BYTES = 4096


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
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_LINES_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    if size > LAST_LINES_BYTES and "\n" in text:
        text = text.split("\n", 1)[1]
    return text.strip("\n")


def memory_bytes(pid: int) -> int:
    """Memory that a process holds: all of its own, and its share of what it shares (PSS, proc_pid_smaps(5)).
    0 where the kernel does not say. Walks the page tables, which takes milliseconds."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration, ValueError):
        return 0
