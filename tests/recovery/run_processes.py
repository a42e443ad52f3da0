"""The processes of a deployment, found by the id of its run, whoever their parent is by now."""

from __future__ import annotations

import ctypes
import signal

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
    which in a container may take its time."""
    try:
        return process.is_running() and not (process.status() == psutil.STATUS_ZOMBIE and process.ppid() == 1)
    except psutil.NoSuchProcess:
        return False


def end_with_parent() -> None:
    """For a child between its fork and its exec: it gets SIGTERM when the thread that started it ends, however that
    happens, so that tests that are killed leave no deployment behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
