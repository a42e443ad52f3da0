"""All fronts of a deployment, as the supervisor sees them: each is started, restarted and told of the worlds by
itself; what they say together is what one would say. Owned by the supervisor; must never block."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq

from gateway.control_messages import Claim, FrontState, WorldTable, of_front
from launcher.front_process import FrontProcess
from launcher.logs import EventLog
from launcher.processes import AdoptedProcess, ProcessId
from launcher.run_dir import RunDir
from launcher.world_claims import WorldClaims


@dataclass(frozen=True)
class FrontPlan:
    """What one front is started with."""

    command: list[str]
    listener: socket.socket
    """For HTTP. It stays open here, so that clients of a front that is away wait for the next one."""


class Fronts:
    """In the order of their numbers. The first has the ports of ZeroMQ and gRPC."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        plans: Sequence[FrontPlan],
        environment: dict[str, str],
        run_dir: RunDir,
        log: EventLog,
    ) -> None:
        self._log = log
        self._all = [
            FrontProcess(
                context,
                plan.command,
                environment,
                plan.listener,
                run_dir.path / of_front("control.sock", number),
                run_dir.path / of_front("front.log", number),
            )
            for number, plan in enumerate(plans)
        ]
        self._serves_grpc = bool(plans) and "--grpc" in plans[0].command
        self._claims = WorldClaims()
        self._notices: dict[int, str | None] = {}

    def adopt(self, processes: Sequence[ProcessId | None]) -> None:
        """Takes over those of an earlier supervisor."""
        for front, process in zip(self._all, processes, strict=False):
            if process is not None:
                front.adopt(process)

    def start_missing(self) -> None:
        """Starts those that are not there. Raises OSError."""
        for front in self._all:
            if not front.is_there:
                front.start()

    @property
    def routers(self) -> list[zmq.Socket[bytes]]:
        """To be polled: something was said."""
        return [front.router for front in self._all]

    @property
    def started_at(self) -> float:
        """Start of the youngest, on the monotonic clock."""
        return max(front.started_at for front in self._all)

    @property
    def processes(self) -> list[ProcessId | None]:
        """None for one that does not run now."""
        return [front.process for front in self._all]

    @property
    def identities(self) -> tuple[int | None, ...]:
        """Pids of those that have spoken."""
        return tuple(front.state.pid if front.state is not None else None for front in self._all)

    @property
    def serving_epoch(self) -> int | None:
        """Of the world that serves every one of them; None while there is none."""
        epochs = {front.state.serving_epoch if front.state is not None else None for front in self._all}
        return epochs.pop() if len(epochs) == 1 else None

    @property
    def claim(self) -> Claim | None:
        """Which one has a world for itself now."""
        return self._claims.judge([front.state for front in self._all])

    def receive(self) -> list[FrontState]:
        """What was said since the last call, with the epoch that serves all of them and the ports of the first."""
        found = []
        for number, front in enumerate(self._all):
            for state in front.receive():
                if state.notice is not None and state.notice != self._notices.get(number):
                    self._log.error("the front says", notice=state.notice, log=str(front.log_path))
                self._notices[number] = state.notice
                first = self._all[0].state or state
                found.append(
                    msgspec.structs.replace(
                        state, serving_epoch=self.serving_epoch, zmq=first.zmq, grpc=first.grpc
                    )
                )
        return found

    @property
    def grpc_endpoint(self) -> str | None:
        """Of the first front: where gRPC is served; None while it is not, or not yet."""
        state = self._all[0].state
        return state.grpc if state is not None else None

    @property
    def awaits_grpc(self) -> bool:
        """Whether it is to be served and is not yet: the front imports and binds it beside everything else."""
        return self._serves_grpc and self.grpc_endpoint is None

    def send(self, table: WorldTable) -> None:
        """Tells those that are there of the worlds."""
        for front in self._all:
            front.send(table)

    def restart_ended(self, now: float) -> None:
        """Starts those again that have just ended; the others go on undisturbed. Raises LauncherError if one said
        that no restart helps, or ended too often in a row."""
        for front in self._all:
            code = front.check(now)
            if code is not None:
                known = code if code != AdoptedProcess.UNKNOWN_CODE else None
                self._log.error("front ended", exit_code=known, log=str(front.log_path))
                front.start()

    def terminate(self, at_once: bool = False) -> None:
        """See FrontProcess; to all."""
        for front in self._all:
            front.terminate(at_once)

    def has_ended(self) -> bool:
        """Whether all have."""
        return all(front.has_ended() for front in self._all)

    def end(self) -> None:
        for front in self._all:
            front.end()

    def close(self) -> None:
        for front in self._all:
            front.close()
