"""The faults of worlds as Prometheus sees them: how many of each kind, and how long recovery took.

Fed by requests.py with the supervisor's fault table; part of what metrics.py shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from gateway.control_messages import Fault
from gateway.histogram import Histogram

RECOVERY_BUCKETS_S = (
    0.025,
    0.05,
    0.1,
    0.2,
    0.35,
    0.5,
    0.75,
    1.0,
    1.5,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
KINDS = ("exit", "killed", "frozen", "hung", "lost", "mpirun", "start")
_TIMES = {
    "detect_s": ("detect", "From the last sign of life of a rank to the detection of its fault."),
    "abort_s": ("abort", "From detection until no process of the world was left."),
    "recover_s": ("recovery", "From detection until a world served again."),
    "resume_s": ("resume", "From detection until the first request that went on had a new token."),
}


class FaultMetrics:
    """Counts each fault once, and each of its times once it is known."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._times = {field: Histogram(RECOVERY_BUCKETS_S) for field in _TIMES}
        self._seen: dict[tuple[int, float], set[str]] = {}
        """Of each fault of the table, by epoch and time, the fields that were counted."""

    def update(self, faults: Iterable[Fault]) -> None:
        """The supervisor's last faults. What has left this table is never counted again: it is old."""
        seen: dict[tuple[int, float], set[str]] = {}
        for fault in faults:
            key = (fault.epoch, fault.at)
            counted = seen[key] = self._seen.get(key, set())
            if "kind" not in counted:
                counted.add("kind")
                self._kinds[fault.kind] += 1
            for field, histogram in self._times.items():
                value = getattr(fault, field)
                if value is not None and field not in counted:
                    counted.add(field)
                    histogram.observe(value)
        self._seen = seen

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        kinds = CounterMetricFamily("phalanx_faults", "Faults of worlds, by kind.", labels=["model", "kind"])
        for kind, count in self._kinds.items():
            kinds.add_metric([self._model, kind], count)
        yield kinds
        for field, (name, text) in _TIMES.items():
            family = HistogramMetricFamily(f"phalanx_fault_{name}_seconds", text, labels=["model"])
            histogram = self._times[field]
            family.add_metric([self._model], histogram.buckets(), histogram.total)
            yield family
