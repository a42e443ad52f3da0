"""How fast recovery is to be, in seconds; printed beside what was measured by the recovery benchmark and the chaos
runs. Two cores, SmolLM2-135M, tp 2."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    part: str
    """What is timed, from the fault on: see benchmarks/recovery.py."""
    share: str
    """p50 or p99."""
    limit_s: float
    spare: str | None = None
    """With this kind of spare only; None: with any."""
    fault: str = "kill"

    @property
    def label(self) -> str:
        where = f", {self.spare}" if self.spare else ""
        return f"{self.fault} to {self.part}{where}"


TARGETS = (
    Target("detected", "p50", 0.05),
    Target("detected", "p99", 0.2),
    Target("detected", "p99", 0.6, fault="freeze"),
    Target("fenced", "p99", 1.5, fault="silent cut"),
    Target("serving", "p50", 0.1, "hot"),
    Target("serving", "p99", 0.5, "hot"),
    Target("serving", "p99", 1.5, "warm"),
    Target("serving", "p99", 8.0, "none"),
    Target("all streams", "p99", 3.0, "hot"),
    Target("spare", "p99", 10.0),
)
