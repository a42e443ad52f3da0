"""The supervisor: the process that the user starts. Its loop hears guards, fronts, hosts and whoever asks for a
change, has each world judged and replaced (`launcher.succession`), and tells the fronts. It must never block, must
import neither torch nor the HTTP stack, and must leave no process, port or shared memory behind."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq

from gateway.control_messages import FrontState
from launcher.adoption import Found, RecordKeeper
from launcher.fronts import FrontPlan, Fronts
from launcher.guard_link import GuardLink
from launcher.guard_messages import Kill
from launcher.host_watch import HostWatch
from launcher.logs import EventLog
from launcher.processes import ProcessId
from launcher.reload import ChangeMaker, Reloads
from launcher.run_dir import RUN_ID_VARIABLE, RunDir
from launcher.stop_signals import StopSignals
from launcher.succession import Succession
from launcher.watch import SpareKind
from launcher.world_proof import clock_warnings
from launcher.world_records import WorldFault, WorldPlan, WorldState
from launcher.world_table import TableTeller
from launcher.worlds import DEATH_TIMEOUT_S, World

TURN_S = 0.05
DYING_TURN_S = 0.005
"""A world's end is looked at often, since everybody waits for it."""
FRONT_GRACE_S = 5.0
"""How long the front may take to end after the drain timeout."""
LAST_GRACE_S = 2.0
"""How long it may take where nothing is waited for any more."""
TELL_DRAIN_AFTER_S = 1.0
LATE_S = 1.0
"""A turn that begins so much too late has been kept from a processor, as others may have been."""
EXCUSED_AT_MOST_S = 60.0
"""What such turns add to the time in which front and world have to meet, however many there are."""
SERVE_TIMEOUT_S = 30.0
"""How long the front may take to be welcomed by a world that is ready."""
GRPC_WAIT_S = 3.0
"""How long a world that serves is kept from whoever waits for it, so that the address of gRPC can be told as well."""


class Supervisor:
    """One deployment. `run` returns when a signal has ended it, and raises LauncherError when it gave up;
    either way everything it started has ended."""

    def __init__(
        self,
        plan: WorldPlan,
        run_dir: RunDir,
        fronts: Sequence[FrontPlan],
        environment: dict[str, str],
        log: EventLog,
        stop: StopSignals,
        on_progress: Callable[[World], None],
        on_ready: Callable[[World, FrontState], None],
        spare: SpareKind = SpareKind.NONE,
        drain_timeout_s: float = 0.0,
        keeper: RecordKeeper | None = None,
        found: Found | None = None,
        changes: ChangeMaker | None = None,
        on_turn: Callable[[], None] = lambda: None,
        front_secrets: dict[str, str] | None = None,
    ) -> None:
        """`on_turn` is called every turn, `on_progress` too until the first world serves, `on_ready` once it does
        and gRPC is there or has had its time.
        `found` is what an earlier supervisor left serving: it is taken over. `front_secrets`: variables that no rank
        gets."""
        self._run_dir = run_dir
        self._log = log
        self._stop = stop
        self._on_progress = on_progress
        self._told_clocks: set[str] = set()
        self._on_ready = on_ready
        self._on_turn = on_turn
        self._environment = {**environment, RUN_ID_VARIABLE: run_dir.run_id}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        own_id = ProcessId.of(os.getpid())
        assert own_id is not None
        self._own_id = own_id
        self._keeper = keeper or RecordKeeper(run_dir, {})
        self._hosts = HostWatch(plan, self._environment, log)
        self._link = GuardLink(
            self._context,
            own_id,
            f"ipc://{run_dir.guards_socket}",
            found.keys if found is not None else None,
            found.remote_endpoint if found is not None else plan.remote_endpoint,
        )
        self._fronts = Fronts(
            self._context, fronts, {**self._environment, **(front_secrets or {})}, run_dir, log
        )
        self._reloads = Reloads(self._context, run_dir.commands_socket, changes)
        self._poller = zmq.Poller()
        own = (self._link.router, self._link.zap, *self._fronts.routers, self._reloads.socket)
        for pollable in (*own, stop):
            self._poller.register(pollable, select.POLLIN)
        self._worlds = Succession(
            plan, spare, run_dir, self._link, self._hosts, self._reloads, self._environment, log
        )
        self._was_ready = False
        self._untold: tuple[World, FrontState, float] | None = None
        """What is to be told of the first world that serves, and when at the latest."""
        self._drain_timeout_s = drain_timeout_s
        self._table = TableTeller()
        self._record_failed = False
        self._turned_at = self._excused_at = time.monotonic()
        """When the last turn began, and when one last began that was late: what should have happened meanwhile could
        not be seen."""
        if found is not None:
            self._fronts.adopt(found.fronts)
            self._worlds.take_over(found)

    def run(self) -> None:
        """Serves until a signal comes, or until no relaunch can help (LauncherError)."""
        self._keep_record()
        try:
            self._fronts.start_missing()
            while not self._stop.requested():
                self._turn()
            self._drain()
        finally:
            self._worlds.is_stopping = True
            self._shut_down()

    # ----------------------------------------------------------------- the loop

    def _turn(self) -> None:
        """Waits for news, hears it, judges, acts, tells the front. Takes TURN_S at most if nothing hangs."""
        ready = dict(self._poller.poll(round(self._turn_length_s() * 1000)))
        now = time.monotonic()
        late_s = max(0.0, now - self._turned_at - TURN_S)
        self._turned_at = now
        if late_s > LATE_S:
            self._excused_at = now
        if self._stop.fileno() in ready or self._stop in ready:
            self._stop.drain()
        self._on_turn()
        self._link.answer_zap()
        self._hear_guards(now)
        self._hear_fronts(now)
        self._hear_commands(now)
        self._hear_hosts(now)
        for world in list(self._worlds.living):
            world.extend_deadlines(late_s, now)
            self._worlds.judge(world, now, self._find_unserved)
        if not self._worlds.is_stopping:
            self._worlds.keep_up(now)
            if not self._worlds.is_draining:
                self._fronts.restart_ended(now)
            if not self._was_ready and self._worlds.current is not None:
                self._tell_clocks(self._worlds.current)
                self._on_progress(self._worlds.current)
        self._tell_ready(now)
        self._tell_fronts(now)
        self._keep_record()

    def _tell_ready(self, now: float) -> None:
        if self._untold is None:
            return
        world, state, latest = self._untold
        if now >= latest or not self._fronts.awaits_grpc:
            self._untold = None
            self._on_ready(world, msgspec.structs.replace(state, grpc=self._fronts.grpc_endpoint))

    def _tell_clocks(self, world: World) -> None:
        warnings = clock_warnings(world.hosts, world.ranks) if len(world.ranks) == world.size else []
        for warning in warnings:
            if warning not in self._told_clocks:
                self._told_clocks.add(warning)
                self._log.warning("clocks differ", detail=warning)

    def _turn_length_s(self) -> float:
        if any(world.state is WorldState.DYING for world in self._worlds.living):
            return DYING_TURN_S
        if self._worlds.current is None and not self._worlds.starts.is_waiting_for_hosts:
            # at once, or after the back-off
            return min(TURN_S, max(0.0, self._worlds.restarts.not_before - time.monotonic()))
        return TURN_S

    def _hear_guards(self, now: float) -> None:
        for identity, message in self._link.receive():
            # Whatever carries another epoch comes from a world that is dead already, or should be: a host that was
            # cut off is back.
            world = next((world for world in self._worlds.living if world.epoch == message.epoch), None)
            if world is not None:
                world.on_message(identity, message, now)
            else:
                self._link.send(identity, Kill(epoch=message.epoch))

    def _hear_fronts(self, now: float) -> None:
        for state in self._fronts.receive():
            if state.in_flight is not None:
                self._worlds.faults.on_in_flight(state.pid, state.in_flight)
            if self._reloads.world is not None and state.serving_epoch == self._reloads.world.epoch:
                self._on_served(self._worlds.end_change(now), state, now)
            world = self._worlds.current
            if world is None or state.serving_epoch != world.epoch or world.state is not WorldState.ACTIVE:
                continue
            if world.times.served is None:
                world.times.served = now
                self._on_served(world, state, now)
            if state.resumed_at is not None:
                self._worlds.on_resumed(world, state.resumed_at, now)

    def _hear_commands(self, now: float) -> None:
        """`phalanx reload`: the new world starts beside the one that serves."""
        refusal = None
        current = self._worlds.current
        if self._worlds.is_draining or self._worlds.is_stopping:
            refusal = "the server is shutting down"
        elif current is None or current.times.served is None:
            refusal = "no world serves now; wait until `phalanx status` shows one"
        change = self._reloads.hear(now, refusal)
        if change is not None and self._reloads.world is None:
            self._log.info("planned change", version=change.plan.version)
            self._worlds.begin_change(change)

    def _hear_hosts(self, now: float) -> None:
        """What was asked of hosts that are lost, or may be."""
        may_ask = not self._worlds.starts.is_waiting_for_hosts
        is_back, hopeless = self._hosts.hear(self._worlds.living, now, may_ask)
        if is_back:
            self._worlds.restarts.on_host_back(now)
        for world, fault in hopeless:
            self._worlds.abort(world, fault, now)

    def _on_served(self, world: World, state: FrontState, now: float) -> None:
        self._worlds.on_served(world, now)
        if not self._was_ready:
            self._was_ready = True
            self._keep_record()  # from the moment at which anybody is told, it can be taken over
            self._untold = (world, state, now + GRPC_WAIT_S)

    def _keep_record(self) -> None:
        worlds = self._worlds
        try:
            self._keeper.keep(
                self._own_id,
                self._link,
                self._fronts.processes,
                worlds.current,
                worlds.adoptable,
                worlds.kv_blocks,
            )
        except OSError as error:  # a full disk; it is tried again at every turn
            if not self._record_failed:
                self._log.error("record cannot be written", detail=str(error))
            self._record_failed = True
        else:
            self._record_failed = False

    def _find_unserved(self, world: World, now: float) -> WorldFault | None:
        if self._fronts.serving_epoch == world.epoch:
            return None
        since = max(world.times.active or now, self._fronts.started_at)
        since = max(since, min(self._excused_at, since + EXCUSED_AT_MOST_S))
        if now - since < SERVE_TIMEOUT_S:
            return None
        detail = f"the front and the gateway of rank 0 did not meet within {SERVE_TIMEOUT_S:.0f} s"
        return WorldFault("start", 0, None, detail)

    # ----------------------------------------------------------------- the front

    def _tell_fronts(self, now: float) -> None:
        worlds = self._worlds
        if any(world.is_being_adopted for world in worlds.living):
            return  # the front serves from it all the while, and must not be told that it is not active
        self._table.tell(
            self._fronts,
            worlds.starts.epoch,
            worlds.most_important_first(),
            worlds.faults,
            worlds.notice(now),
            worlds.plan,
            self._hosts.pool,
            now,
        )

    # ----------------------------------------------------------------- the end

    def _drain(self) -> None:
        """The front takes nothing new and ends when what runs has finished, or its time is over. A second signal
        cuts that short."""
        self._worlds.is_draining = True
        self._fronts.terminate()
        began = time.monotonic()
        told = False
        while not self._fronts.has_ended() and self._stop.count < 2:
            lasts_s = time.monotonic() - began
            if lasts_s > self._drain_timeout_s + FRONT_GRACE_S:
                return
            if lasts_s > TELL_DRAIN_AFTER_S and not told:
                told = True
                self._log.info(
                    "finishing what runs; a second signal ends it", at_most_s=self._drain_timeout_s
                )
            self._turn()

    def _shut_down(self) -> None:
        """Front first, so that it can still tell its clients; then the world."""
        self._fronts.terminate(at_once=True)
        grace_ends = time.monotonic() + LAST_GRACE_S
        while not self._fronts.has_ended() and time.monotonic() < grace_ends:
            self._turn()
        self._fronts.end()
        for world in self._worlds.living:
            world.abort(time.monotonic())
        give_up_at = time.monotonic() + DEATH_TIMEOUT_S
        while self._worlds.living and time.monotonic() < give_up_at:
            self._turn()
        self._hosts.close()
        if not self._worlds.living:
            self._run_dir.forget()
        self._worlds.starts.close()
        self._fronts.close()
        self._reloads.close()
        self._link.close()
        self._context.term()
