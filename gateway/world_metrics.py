"""Worlds and ranks as Prometheus sees them, out of the supervisor's table, and what the engine has counted over all
worlds. Part of what metrics.py shows.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric

from gateway.control_messages import WorldTable
from gateway.protocol import Stats

WORLD_STATES = ("active", "starting", "spare", "dying")
_COUNTED = ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits")


class Table(Protocol):
    """Who has the supervisor's table."""

    table: WorldTable | None
    table_at: float


class EngineTotals:
    """What the worlds of this front have counted, one after the other: it never falls when a world is replaced."""

    def __init__(self) -> None:
        self._before: Counter[str] = Counter()
        self._last: Stats | None = None

    def note(self, stats: Stats) -> None:
        """What a world says of itself; its own counters begin at 0."""
        if self._last is not None and stats.epoch != self._last.epoch:
            for name in _COUNTED:
                self._before[name] += getattr(self._last, name)
        self._last = stats

    def __getitem__(self, name: str) -> int:
        """One of the counters of Stats."""
        return self._before[name] + (getattr(self._last, name) if self._last is not None else 0)


def collect_worlds(worlds: Table, model: str) -> Iterator[Metric]:
    """For the registry. Without a table, the supervisor has not spoken yet, there is nothing."""
    table = worlds.table
    if table is None:
        return
    age_s = time.monotonic() - worlds.table_at
    yield _gauge("phalanx_world_table_age_seconds", "Since the supervisor's last word.", model, age_s)
    yield _gauge(
        "phalanx_epoch", "The highest epoch handed out: worlds begun, failed ones too.", model, table.epoch
    )
    states = Counter(world.state for world in table.worlds)
    family = GaugeMetricFamily("phalanx_worlds", "Living worlds, by state.", labels=["model", "state"])
    for state in WORLD_STATES:
        family.add_metric([model, state], states[state])
    yield family
    parked = sum(
        world.state == "spare"
        and len(world.ranks) == world.tp * world.pp
        and all(rank.state == "parked" for rank in world.ranks)
        for world in table.worlds
    )
    yield _gauge("phalanx_spares_ready", "Spares all of whose ranks are parked.", model, parked)
    labels = ["model", "epoch", "world", "rank", "host"]
    beats = GaugeMetricFamily(
        "phalanx_rank_heartbeat_age_seconds", "Since the last sign of life of a rank's guard.", labels=labels
    )
    steps = GaugeMetricFamily("phalanx_rank_step", "The step that a rank is at.", labels=labels)
    phases = GaugeMetricFamily("phalanx_rank_phase", "1 for what a rank is doing.", labels=[*labels, "phase"])
    for world in table.worlds:
        for rank in world.ranks:
            values = [model, str(world.epoch), world.state, str(rank.rank), rank.host]
            beats.add_metric(values, rank.heartbeat_age_s + age_s)
            steps.add_metric(values, rank.step)
            phases.add_metric([*values, rank.state], 1)
    yield from (beats, steps, phases)


def _gauge(name: str, text: str, model: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=["model"])
    family.add_metric([model], value)
    return family
