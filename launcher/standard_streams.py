"""Standard streams that are closed, or that nobody reads or writes any more. Used by the `phalanx` command before
anything else, and by what shows progress; what is said to nobody is lost, and ends nothing."""

from __future__ import annotations

import os
import sys
from typing import IO, TextIO


def open_missing() -> None:
    """Opens 0, 1 and 2 on the null device where the caller has closed them (`phalanx serve 2>&-`): else a socket of
    ours would get that number, and a child's output would go into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(descriptor, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


class HeedlessStream:
    """A stream as others take it for one; what cannot be written, as to a terminal that was closed, is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def heedless(stream: TextIO) -> IO[str]:
    """The same stream, whose writes never raise OSError."""
    return HeedlessStream(stream)  # type: ignore[return-value]
