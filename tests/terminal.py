"""A command on a terminal of its own, for tests."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from collections.abc import Sequence


class Terminal:
    """Runs until it ends by itself; `wait` reaps it."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        pid, self._descriptor = pty.fork()
        if pid == 0:
            os.execve(command[0], list(command), {**os.environ, "TERM": "xterm", **environment})
        self._pid = pid
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Everything up to the end of the pattern, which is taken away."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < deadline, self.output
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._descriptor, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.output), self.output
        text, self.output = self.output[: found.end()], self.output[found.end() :]
        return text

    def wait(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self._descriptor], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self._descriptor, 65536).decode(errors="replace")
                except OSError:
                    break
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
