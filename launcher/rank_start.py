"""How a guard starts its rank: with what environment, and for a spare with the gate at which it waits. Used by the
guard alone; the rank's end is the guard's business."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from launcher.guard_environment import PREFIX
from launcher.post_mortem import STACK_SIGNAL, STACK_VARIABLE
from launcher.watch import (
    PARENT_VARIABLE,
    PROGRESS_PAGE_VARIABLE,
    START_GATE_VARIABLE,
    SpareKind,
    die_with,
)


class StartGate:
    """The write end of the pipe at which the rank of a spare waits."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def is_shut(self) -> bool:
        return self._descriptor is not None

    def shut(self) -> int:
        """Returns the end for the rank, which the caller closes when the rank has it."""
        for_rank, self._descriptor = os.pipe()
        os.set_inheritable(for_rank, True)
        return for_rank

    def open(self) -> None:
        """The rank goes on. Only for one that is shut."""
        assert self._descriptor is not None
        with contextlib.suppress(BrokenPipeError):  # the rank is dead, which is reported by itself
            os.write(self._descriptor, b"g")
        os.close(self._descriptor)
        self._descriptor = None


@contextlib.contextmanager
def _bound(cpus: Collection[int]) -> Iterator[None]:
    """What is started meanwhile inherits the binding; this process does not keep it."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)


def start_rank(
    command: Sequence[str],
    page_path: Path,
    log_path: Path,
    stack_path: Path,
    spare: SpareKind,
    gate: StartGate,
    cpus: Collection[int] = (),
) -> subprocess.Popen[bytes]:
    """Its output goes to `log_path`. `cpus`: processors that it is bound to; none: wherever this one may run. Raises
    OSError."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    variables[PROGRESS_PAGE_VARIABLE] = str(page_path)
    variables[PARENT_VARIABLE] = str(os.getpid())
    variables[STACK_VARIABLE] = f"{STACK_SIGNAL:d} {stack_path}"
    variables["PYTHONUNBUFFERED"] = "1"
    variables["PYTHONFAULTHANDLER"] = "1"  # a segmentation fault leaves a trace for the post-mortem
    for_rank = -1
    if spare is not SpareKind.NONE:
        for_rank = gate.shut()
        variables[START_GATE_VARIABLE] = f"{spare.value} {for_rank}"
    with log_path.open("ab") as log, _bound(cpus):
        # MPICH's launcher hands the rank an open file descriptor, which has to reach it.
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            close_fds=False,
            # With autogroups the kernel shares processors between sessions first. Ranks of one session that wait
            # and yield kept all others from their processors for up to 98 s under Linux 6.18; ranks with a session
            # each never did (docs/recovery.md).
            start_new_session=True,
            # From the first moment: what Python imports before the rank can ask for it may take long.
            preexec_fn=partial(die_with, os.getpid()),
        )
    if for_rank >= 0:
        os.close(for_rank)
    return process
