"""One exposition of Prometheus out of those of all fronts.

Called by peers.py when somebody scrapes. What each front counts by itself is added up; what all of them are told by
the engine and the supervisor is the same for all, and the largest is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

SHARED_COUNTERS = (
    "num_preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "phalanx_faults",
    "phalanx_fault_",
)
"""Of the world, which every front knows all of: beginnings, without the prefixes of ours and vLLM's."""
OWN_GAUGES = ("requests_live", "journal_bytes", "process_open_fds", "process_resident_memory_bytes")
"""Of each front; other gauges are of the world, or say whether something is so."""
_WAITING, _RUNNING, _LIVE = "num_requests_waiting", "num_requests_running", "phalanx_requests_live"


def merge(expositions: Sequence[str]) -> str:
    """Families and samples in the order in which they come first."""
    lines: dict[str, float | None] = {}
    """Comments, and samples by name and labels."""
    for exposition in expositions:
        kind = ""
        for line in exposition.splitlines():
            if line.startswith("#"):
                lines.setdefault(line, None)
                if line.startswith("# TYPE "):
                    kind = line.rpartition(" ")[2]
                continue
            sample, _, text = line.rpartition(" ")
            value, known = float(text), lines.get(sample)
            if known is None:
                lines[sample] = value
            else:
                lines[sample] = known + value if _adds_up(sample, kind) else max(known, value)
    _count_waiting(lines)
    return "".join(
        line + "\n" if value is None else f"{line} {_number(value)}\n" for line, value in lines.items()
    )


def _adds_up(sample: str, kind: str) -> bool:
    name = sample.partition("{")[0]
    plain = name.removeprefix("phalanx_").removeprefix("vllm:")
    if kind in ("counter", "histogram", "summary"):
        return not any(name.startswith(shared) or plain.startswith(shared) for shared in SHARED_COUNTERS)
    return plain in OWN_GAUGES


def _count_waiting(lines: dict[str, float | None]) -> None:
    """A front takes all that run for its own; those that wait are what all fronts have, less what runs."""
    live = sum(value or 0.0 for sample, value in lines.items() if sample.partition("{")[0] == _LIVE)
    for sample in [sample for sample in lines if _WAITING in sample and not sample.startswith("#")]:
        running = lines.get(sample.replace(_WAITING, _RUNNING)) or 0.0
        lines[sample] = max(live - running, 0.0)


def _number(value: float) -> str:
    return str(value)
