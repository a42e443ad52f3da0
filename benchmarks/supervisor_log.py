"""Reads the supervisor's log: the moments at which a fault was found, a world was dead, the next one served.

Used by the recovery benchmark and by the chaos runs; knows the format of launcher/logs.py and nothing else of it.
"""

from __future__ import annotations

import calendar
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(
    r"(?P<second>\S+)\.(?P<ms>\d{3})Z \w+ (?P<name>.*?)(?P<fields>(?: \w+=(?:\"(?:[^\"\\]|\\.)*\"|\S*))*)$"
)
_FIELD = re.compile(r" (\w+)=(\"(?:[^\"\\]|\\.)*\"|\S*)")


@dataclass(frozen=True)
class Event:
    """One line. The log has whole milliseconds, cut off."""

    at: float
    """Unix time."""
    name: str
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def epoch(self) -> int | None:
        return int(self.fields["epoch"]) if "epoch" in self.fields else None


def events(log: Path, since: float = 0.0) -> Iterator[Event]:
    """The events since this Unix time, in their order; lines that are none are left out."""
    try:
        text = log.read_text()
    except FileNotFoundError:
        return
    for line in text.splitlines():
        found = parse(line)
        if found is not None and found.at >= since - 0.001:
            yield found


def parse(line: str) -> Event | None:
    """The event of one line; None if it is none."""
    match = _LINE.match(line)
    if match is None:
        return None
    try:
        moment = time.strptime(match["second"], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return None
    fields = {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in _FIELD.findall(match["fields"])
    }
    return Event(calendar.timegm(moment) + int(match["ms"]) / 1e3, match["name"], fields)
