"""What `phalanx doctor` finds: one line each, with its remedy. Used by doctor.py and doctor_hosts.py; data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Level(Enum):
    """How much a finding matters: a MISSING part makes `serve` fail."""

    OK = "ok"
    OPTIONAL = "optional"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    part: str
    text: str
    remedy: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, in seconds and bytes a second, for programs."""
