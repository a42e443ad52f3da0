"""A peer's process, driven over its standard input and output as `work.answer` expects it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

import psutil

from benchmarks.peers.work import Generate


@dataclass(frozen=True)
class Contestant:
    """An engine that is loaded."""

    asked: Callable[[], AbstractContextManager[Generate]]
    """What gives it work, while the others are stopped."""
    max_sequences: int | None
    process: psutil.Process
    """The one that this process has started for it."""

    def signal(self, stop: bool) -> None:
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.suspend() if stop else process.resume()


@contextmanager
def alone(contestant: Contestant, everybody: Iterable[Contestant]) -> Iterator[None]:
    """The others are stopped meanwhile: engines without work look for some, on cores that this one is measured on."""
    others = [other for other in everybody if other is not contestant]
    try:
        for other in others:
            other.signal(stop=True)
        yield
    finally:
        for other in others:
            other.signal(stop=False)


@contextmanager
def driven(name: str, process: subprocess.Popen[str]) -> Iterator[tuple[Generate, float]]:
    """What gives it work, and the seconds until it was loaded and warm. Raises RuntimeError if it does not start;
    so does a piece of work that it dies of."""
    begin = time.perf_counter()
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def generate(sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        stdin.write(f"{sequences} {prompt_tokens} {new_tokens}\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{name} ended with exit code {process.wait()}")
        return float(line)

    try:
        if stdout.readline().strip() != "ready":
            raise RuntimeError(f"{name} does not start, exit code {process.wait()}")
        yield generate, time.perf_counter() - begin
    finally:
        stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stdout.close()
