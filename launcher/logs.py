"""The supervisor's log: one event a line, `time level event key=value ...`, on standard error and in the run
folder. Called by everything in the supervisor; must never end the process that logs."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

_FIELDS = "event_fields"


class EventLog:
    """Structured events over the standard library's logging."""

    def __init__(self, name: str = "phalanx") -> None:
        self._logger = logging.getLogger(name)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        # A full disk or a reader that went away must not reach the supervisor.
        logging.raiseExceptions = False

    def to_stream(self, handler: logging.Handler) -> None:
        """Adds a destination."""
        handler.setFormatter(_EventFormatter())
        self._logger.addHandler(handler)

    def to_stderr(self) -> None:
        self.to_stream(logging.StreamHandler(sys.stderr))

    def to_file(self, path: Path) -> None:
        self.to_stream(logging.FileHandler(path, encoding="utf-8"))

    def close(self) -> None:
        """Closes every destination."""
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            handler.close()

    def info(self, event: str, **fields: Any) -> None:
        self._logger.info(event, extra={_FIELDS: fields})

    def warning(self, event: str, **fields: Any) -> None:
        self._logger.warning(event, extra={_FIELDS: fields})

    def error(self, event: str, **fields: Any) -> None:
        self._logger.error(event, extra={_FIELDS: fields})


class _EventFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [f"{moment}.{int(record.msecs):03d}Z", record.levelname.lower(), record.getMessage()]
        fields = getattr(record, _FIELDS, {})
        parts += [f"{name}={_value(value)}" for name, value in fields.items() if value is not None]
        return " ".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    # Quoted like JSON where it could be taken for more than one word.
    return json.dumps(text) if not text or any(c.isspace() or c in '="' for c in text) else text
