"""Shows a person what a start is doing, on standard error: bars on a terminal, plain lines elsewhere. Called
by `serve` and `pull`; must never print more than a few lines a second."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Protocol, TextIO

from launcher.standard_streams import heedless

_LINE_INTERVAL_S = 0.5


class Display(Protocol):
    """`update` shows how far a task is (again and again, as often as it likes); `say` shows one line; after
    `finish` only `say` shows anything."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, task: str, done: int, total: int | None, unit: str) -> None: ...

    def say(self, text: str) -> None: ...

    def finish(self) -> None: ...


class PlainDisplay:
    """For logs, pipes, and terminals that know no cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown_at: dict[str, float] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, task: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        due = now - self._shown_at.get(task, 0.0) >= _LINE_INTERVAL_S
        if task in self._finished or not (due or finished):
            return
        self._shown_at[task] = now
        if finished:
            self._finished.add(task)
        percent = f" ({100 * done // total} %)" if total else ""
        self.say(f"{task}: {_share(done, total, unit)}{percent}")

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(text, file=self._stream, flush=True)

    def finish(self) -> None:
        return None


class BarDisplay:
    """For terminals; without colour where the terminal or NO_COLOR says so."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskID,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True),
            console=Console(file=heedless(sys.stderr), stderr=True),
            transient=False,
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}
        self._finished = False

    def __enter__(self) -> BarDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, task: str, done: int, total: int | None, unit: str) -> None:
        if self._finished:
            return
        amount = _share(done, total, unit)
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, amount=amount)
        self._progress.update(self._tasks[task], completed=done, total=total, amount=amount)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def finish(self) -> None:
        # The bars stay as they are; a thread that redraws them has nothing to do at rest.
        self._finished = True
        self._progress.stop()


def choose_display() -> Display:
    """Bars where standard error is a terminal that can move its cursor."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return BarDisplay()
    return PlainDisplay(sys.stderr)


def _share(done: int, total: int | None, unit: str) -> str:
    if unit == "B":
        amount = f"{done / 1e6:.1f}"
        return f"{amount} MB" if total is None else f"{amount} of {total / 1e6:.1f} MB"
    return f"{done} {unit}" if total is None else f"{done} of {total} {unit}"
