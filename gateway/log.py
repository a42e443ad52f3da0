"""The front's log: one event a line, as JSON, on standard error. A front at rest writes nothing."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any, Protocol, TextIO, cast

import structlog


class Logger(Protocol):
    """What this package needs of a structured logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class _Lenient:
    """A file whose disk may be full: what cannot be written is lost, and nothing fails for it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._file.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


def configure_log() -> Logger:
    """Sets the format up, once in a process; returns the front's logger."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Lenient(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    # Libraries (uvicorn, asyncio) log through the standard library; their warnings belong here too.
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    logger: Logger = structlog.get_logger(process="front")
    return logger
