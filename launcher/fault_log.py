"""The faults of a deployment: one record for each, for the log, `/cluster` and the metrics. Used by the supervisor
alone; what is learned later (when the world was dead, when one served again) is filled in."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from gateway.control_messages import MOST_IN_FLIGHT_IDS, Fault, InFlight
from launcher.logs import EventLog
from launcher.post_mortem import signal_name, telling_line
from launcher.world_records import Doing, WorldFault
from launcher.worlds import World

KEPT_FAULTS = 20


class FaultLog:
    """The last faults, newest first."""

    def __init__(self, log: EventLog) -> None:
        self.records: list[Fault] = []
        self.version = 0
        """Grows with each change."""
        self._log = log
        self._recovered_by = 0
        """The world that recovered last from faults, and which ones."""
        self._recovered: set[tuple[int, float]] = set()
        self._in_flight: dict[int, InFlight] = {}
        """By the pid of the front: in the last world that it lost."""

    def __bool__(self) -> bool:
        return bool(self.records)

    def record(self, world: World, fault: WorldFault, event: str, recover_s: float | None) -> None:
        """A world has to die of it. `recover_s` is 0 where serving was never interrupted."""
        watch = world.ranks.get(fault.rank) if fault.rank is not None else None
        doing = fault.doing or (watch.doing if watch is not None else None) or Doing()
        record = Fault(
            epoch=world.epoch,
            at=time.time(),
            kind=fault.kind,
            rank=fault.rank,
            host=fault.host,
            detail=f"spare: {fault.detail}" if world.is_spare else fault.detail,
            detect_s=fault.detect_s,
            recover_s=recover_s,
            tp=None if fault.rank is None else fault.rank % world.plan.tp,
            pp=None if fault.rank is None else fault.rank // world.plan.tp,
            pid=watch.hello.pid if watch is not None else None,
            signal=signal_name(fault.exit_code),
            exit_code=fault.exit_code if fault.exit_code is None or fault.exit_code >= 0 else None,
            phase=doing.phase,
            step=doing.step,
            collective=doing.collective,
            progress_age_s=doing.age_s,
            last_lines=fault.last_lines,
            stacks=fault.stacks,
        )
        self._log.error(
            event,
            epoch=world.epoch,
            rank=fault.rank,
            tp=record.tp,
            pp=record.pp,
            host=fault.host,
            kind=fault.kind,
            signal=record.signal,
            exit_code=record.exit_code,
            phase=record.phase,
            step=record.step,
            collective=record.collective,
            progress_age_s=record.progress_age_s,
            detail=fault.detail,
            detect_s=fault.detect_s,
            last_line=telling_line(fault.last_lines),
        )
        self.records = [record, *self.records][:KEPT_FAULTS]
        self.version += 1

    def on_dead(self, epoch: int, abort_s: float) -> None:
        """No process of that world is left, so many seconds after the order to end it."""
        self._replace(
            [fault.epoch == epoch and fault.abort_s is None for fault in self.records], abort_s=abort_s
        )

    def on_served(self, epoch: int, recover_s: float) -> None:
        """World `epoch` serves again, so many seconds after the first fault that is not recovered."""
        self._recovered_by = epoch
        self._recovered = {(fault.epoch, fault.at) for fault in self.records if fault.recover_s is None}
        self._replace([fault.recover_s is None for fault in self.records], recover_s=recover_s)

    def on_resumed(self, epoch: int, resumed_at: float) -> None:
        """The first request that world `epoch` took over has brought a token, at this Unix time."""
        if epoch != self._recovered_by:
            return
        waiting = [fault for fault in self.records if (fault.epoch, fault.at) in self._recovered]
        for fault in waiting:
            resume_s = max(0.0, resumed_at - fault.at)
            self._replace([other is fault for other in self.records], resume_s=resume_s)
            self._log.info("requests resumed", epoch=epoch, fault=fault.epoch, resumed_s=resume_s)

    def on_in_flight(self, front_pid: int, told: InFlight) -> None:
        """A front says, again and again, what the last world that it lost had of its requests."""
        faults = [fault.epoch == told.epoch for fault in self.records]
        if self._in_flight.get(front_pid) == told or not any(faults):
            return
        self._in_flight[front_pid] = told
        parts = [part for part in self._in_flight.values() if part.epoch == told.epoch]
        count, ids = sum(part.count for part in parts), [name for part in parts for name in part.ids]
        shown = ids[:MOST_IN_FLIGHT_IDS]
        self._replace(faults, in_flight=count, in_flight_ids=tuple(shown))
        if count:
            self._log.info("requests in flight", epoch=told.epoch, requests=count, ids=" ".join(shown))

    def _replace(self, concerned: list[bool], **values: Any) -> None:
        self.records = [
            msgspec.structs.replace(fault, **values) if is_concerned else fault
            for fault, is_concerned in zip(self.records, concerned, strict=True)
        ]
        self.version += 1
