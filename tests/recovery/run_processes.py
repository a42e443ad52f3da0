"""The processes of a deployment, found by the id of its run, whoever their parent is by now."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterable

import psutil

from launcher.processes import environment_of
from launcher.run_dir import RUN_ID_VARIABLE

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def of_run(run_id: str) -> list[psutil.Process]:
    """Every living process that a supervisor of this run has started."""
    return [
        process
        for process in psutil.process_iter()
        if environment_of(process.pid).get(RUN_ID_VARIABLE) == run_id
    ]


def is_left(process: psutil.Process) -> bool:
    """Whether it runs, or is a zombie that one of ours should have reaped. Those whose parent has died are for init,
    or for a process above this one that stands in for it, which in a container may take its time."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.is_running()
        return process.is_running() and process.ppid() not in {p.pid for p in psutil.Process().parents()}
    except psutil.NoSuchProcess:
        return False


def left_of(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there now."""
    return [process for process in processes if is_left(process)]


def end_with_parent() -> None:
    """For a child between its fork and its exec: it gets SIGTERM when the thread that started it ends, however that
    happens, so that tests that are killed leave no deployment behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
