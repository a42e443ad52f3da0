"""The front's log: one event a line, as JSON or for a console, on standard error. A front at rest writes nothing.

A line that is written while a request is answered has the request's id. Keys and prompts are never logged.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol, TextIO, cast

import structlog

request_id_of_log: ContextVar[bytes | None] = ContextVar("request_id_of_log", default=None)
"""x-request-id of the request that is being answered."""


class Logger(Protocol):
    """What this package needs of a structured logger."""

    def debug(self, event: str, **fields: Any) -> Any: ...
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


def _add_request_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    request_id = request_id_of_log.get()
    if request_id is not None and "x_request_id" not in event:
        event["x_request_id"] = request_id.decode("latin-1")
    return event


def configure_log(format: str = "json", level: str = "info") -> Logger:
    """Sets the format up ("json" or "console"), once in a process; returns the front's logger."""
    renderer: Any = structlog.processors.JSONRenderer()
    if format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            _add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
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
