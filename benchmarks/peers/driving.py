"""A peer's process, driven over its standard input and output as `work.answer` expects it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers.work import Generate


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
