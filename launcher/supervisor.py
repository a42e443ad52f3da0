"""The supervisor: the process that the user starts. It keeps one world serving: starts it, watches it, aborts
it at the first certain sign of a fault, and puts the spare or a new one in its place. It must never block, must
import neither torch nor the HTTP stack, and must leave no process, port or shared memory behind."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq

from gateway.control_messages import FrontState
from launcher.adoption import Found, RecordKeeper, adopt_worlds
from launcher.fault_log import FaultLog
from launcher.fronts import FrontPlan, Fronts
from launcher.growth import Growth
from launcher.guard_link import GuardLink
from launcher.guard_messages import Kill
from launcher.host_watch import HostWatch
from launcher.logs import EventLog
from launcher.processes import ProcessId
from launcher.reload import Change, ChangeMaker, Reloads
from launcher.run_dir import RUN_ID_VARIABLE, RunDir
from launcher.spares import Spares
from launcher.stop_signals import StopSignals
from launcher.watch import SpareKind
from launcher.world_proof import clock_warnings
from launcher.world_records import WorldFault, WorldPlan, WorldState
from launcher.world_starts import GaveUp, NotStarted, WorldStarts
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
        self._plan = plan
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
        self._worlds: list[World] = []
        """All that live, in the order of their epochs."""
        self._current: World | None = None
        """The one that serves, or is to serve next; all before it are dying."""
        self._spares = Spares(spare)
        self._starts = WorldStarts(
            run_dir, self._link, self._hosts.pool, self._environment, log, waits_for_hosts=bool(plan.hosts)
        )
        self._restarts = self._starts.restarts
        self._growth = Growth(self._hosts.pool, self._starts.sizes)
        self._was_ready = False
        self._untold: tuple[World, FrontState, float] | None = None
        """What is to be told of the first world that serves, and when at the latest."""
        self._drain_timeout_s = drain_timeout_s
        self._draining = False
        """The front finishes what runs; worlds are watched and replaced as ever."""
        self._stopping = False
        self._faults = FaultLog(log)
        self._recovering_since: float | None = None
        self._resumed_epoch = 0
        self._table = TableTeller()
        self._record_failed = False
        self._turned_at = self._excused_at = time.monotonic()
        """When the last turn began, and when one last began that was late: what should have happened meanwhile could
        not be seen."""
        if found is not None:
            self._take_over(found)

    def run(self) -> None:
        """Serves until a signal comes, or until no relaunch can help (LauncherError)."""
        self._keep_record()
        try:
            self._fronts.start_missing()
            while not self._stop.requested():
                self._turn()
            self._drain()
        finally:
            self._stopping = True
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
        for world in list(self._worlds):
            world.extend_deadlines(late_s, now)
            self._judge_world(world, now)
        if not self._stopping:
            if self._current is None:
                self._replace_world(now)
            elif not self._draining and self._reloads.change is None:
                if self._growth.is_due(self._plan, self._current, now):
                    self._log.info("a larger world starts: hosts are back")
                    self._begin_change(self._reloads.begin_own(self._plan, self._spares.kind, now))
                elif self._spares.is_due(now):
                    self._start_spare(now)
            if not self._draining:
                self._fronts.restart_ended(now)
            if not self._was_ready and self._current is not None:
                self._tell_clocks(self._current)
                self._on_progress(self._current)
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
        if any(world.state is WorldState.DYING for world in self._worlds):
            return DYING_TURN_S
        if self._current is None and not self._starts.is_waiting_for_hosts:  # at once, or after the back-off
            return min(TURN_S, max(0.0, self._restarts.not_before - time.monotonic()))
        return TURN_S

    def _hear_guards(self, now: float) -> None:
        for identity, message in self._link.receive():
            # Whatever carries another epoch comes from a world that is dead already, or should be: a host that was
            # cut off is back.
            world = next((world for world in self._worlds if world.epoch == message.epoch), None)
            if world is not None:
                world.on_message(identity, message, now)
            else:
                self._link.send(identity, Kill(epoch=message.epoch))

    def _hear_fronts(self, now: float) -> None:
        for state in self._fronts.receive():
            if state.in_flight is not None:
                self._faults.on_in_flight(state.pid, state.in_flight)
            if self._reloads.world is not None and state.serving_epoch == self._reloads.world.epoch:
                self._change_world(state, now)
            world = self._current
            if world is None or state.serving_epoch != world.epoch or world.state is not WorldState.ACTIVE:
                continue
            if world.times.served is None:
                world.times.served = now
                self._on_served(world, state, now)
            if state.resumed_at is not None and self._resumed_epoch < world.epoch:
                self._resumed_epoch = world.epoch
                self._spares.on_resumed(now)
                self._faults.on_resumed(world.epoch, state.resumed_at)

    def _hear_commands(self, now: float) -> None:
        """`phalanx reload`: the new world starts beside the one that serves."""
        refusal = None
        if self._draining or self._stopping:
            refusal = "the server is shutting down"
        elif self._current is None or self._current.times.served is None:
            refusal = "no world serves now; wait until `phalanx status` shows one"
        change = self._reloads.hear(now, refusal)
        if change is not None and self._reloads.world is None:
            self._log.info("planned change", version=change.plan.version)
            self._begin_change(change)

    def _begin_change(self, change: Change) -> None:
        try:
            self._reloads.world = self._start_world(SpareKind.NONE, change.plan, is_change=True)
        except NotStarted as error:
            self._reloads.fail(WorldFault("start", None, None, str(error)))
            self._growth.on_failed(time.monotonic())

    def _hear_hosts(self, now: float) -> None:
        """What was asked of hosts that are lost, or may be."""
        is_back, hopeless = self._hosts.hear(self._worlds, now, not self._starts.is_waiting_for_hosts)
        if is_back:
            self._restarts.on_host_back(now)
        for world, fault in hopeless:
            self._abort(world, fault, now)

    def _change_world(self, state: FrontState, now: float) -> None:
        """The front serves from the new world: it is the current one, and what belongs to the old plan ends."""
        new = self._reloads.world
        assert new is not None
        for old in (self._current, self._spares.world):
            if old is not None:
                self._log.info("world ends as planned", epoch=old.epoch)
                old.abort(now)
        self._current, self._spares.world = new, None
        new.is_change = False
        change = self._reloads.done(now)
        self._growth.on_done()
        self._plan, self._spares.kind = change.plan, change.spare
        new.times.served = now
        self._on_served(new, state, now)

    def _on_served(self, world: World, state: FrontState, now: float) -> None:
        self._starts.on_served(world)
        if not world.is_adopted:
            self._log.info("world serves", epoch=world.epoch, **world.start_times.parts(now))
        if not self._was_ready:
            self._was_ready = True
            self._keep_record()  # from the moment at which anybody is told, it can be taken over
            self._untold = (world, state, now + GRPC_WAIT_S)
        self._spares.on_served(now, recovered=self._recovering_since is not None)
        if self._recovering_since is not None:
            recover_s = now - self._recovering_since
            self._recovering_since = None
            self._log.info("world recovered", epoch=world.epoch, recover_s=recover_s)
            self._faults.on_served(world.epoch, recover_s)

    # ----------------------------------------------------------------- the world

    def _replace_world(self, now: float) -> None:
        """Puts a world where none is: the spare, which may go ahead at once, since it serves only when the one
        before it is gone; else a new one, once that is so and the back-off is over."""
        if now < self._restarts.not_before:
            return
        spare = self._spares.take()
        if spare is not None and self._hosts.has_lost_host(spare):
            self._log.warning("spare lost with its host", epoch=spare.epoch)
            spare.abort(now)
        elif spare is not None:
            self._log.info("spare promoted", epoch=spare.epoch, state=spare.state.value)
            spare.promote(now)
            self._current = spare
        elif all(world is self._reloads.world for world in self._worlds):
            if not self._starts.hosts_answer(self._plan, now):
                return
            try:
                self._current = self._start_world(SpareKind.NONE)
            except NotStarted as error:
                self._starts.put_off(error, now)

    def _start_spare(self, now: float) -> None:
        """What keeps it from starting, like a full disk, is no reason to end the world that serves."""
        try:
            self._spares.world = self._start_world(self._spares.kind)
        except NotStarted as error:
            self._log.warning("spare not started", detail=str(error), next_start_s=self._spares.lose(now))

    def _start_world(self, spare: SpareKind, plan: WorldPlan | None = None, is_change: bool = False) -> World:
        """Raises NotStarted."""
        world = self._starts.start(spare, plan or self._plan, is_change)
        self._worlds.append(world)
        if self._faults:  # a start in good health says nothing
            event = "spare started" if world.is_spare else "world started"
            self._log.info(event, epoch=world.epoch, ranks=world.size)
        return world

    def _take_over(self, found: Found) -> None:
        """What an earlier supervisor left becomes this one's own; what it lacks is started as after a fault."""
        self._starts.epoch = self._run_dir.epoch
        self._fronts.adopt(found.fronts)
        self._worlds = adopt_worlds(found, self._plan, self._run_dir, self._link)
        self._hosts.ask_all(time.monotonic())  # whom the earlier one had lost nobody knows
        for world in self._worlds:
            if world.is_spare:
                self._spares.world = world
            else:
                self._current = world
                self._starts.sizes.note_blocks(world.plan, found.kv_blocks)
        epochs = " ".join(str(world.epoch) for world in self._worlds) or None
        self._log.warning("taken over from a supervisor that was killed", worlds=epochs, front=found.front)

    def _keep_record(self) -> None:
        # One that is to take over is no world to be adopted before it has: then it is ended as a leftover.
        next_world = self._reloads.world
        living = [w for w in self._worlds if w.state is not WorldState.DYING and w is not next_world]
        kv_blocks = self._starts.sizes.blocks(self._current.plan) if self._current is not None else 0
        try:
            self._keeper.keep(
                self._own_id, self._link, self._fronts.processes, self._current, living, kv_blocks
            )
        except OSError as error:  # a full disk; it is tried again at every turn
            if not self._record_failed:
                self._log.error("record cannot be written", detail=str(error))
            self._record_failed = True
        else:
            self._record_failed = False

    def _judge_world(self, world: World, now: float) -> None:
        was_parked = world.state is WorldState.PARKED
        fenced = not any(other.state is WorldState.DYING for other in self._worlds if not other.is_spare)
        fault = None
        if world is self._reloads.world and (problem := self._reloads.problem(self._current)):
            fault = WorldFault("start", None, None, problem)
        elif world.times.served is None and world.size < self._plan.size:
            fault = self._starts.sizes.problem(world)
        fault = fault or world.check(now, may_serve=fenced)
        # While another world is to take over, the front is asked to leave this one.
        next_world = self._reloads.world
        changing = next_world is not None and next_world.state is WorldState.ACTIVE
        expected = next_world if changing else self._current
        if fault is None and world is expected and world.state is WorldState.ACTIVE:
            fault = self._find_unserved(world, now)
        if fault is not None:
            self._abort(world, fault, now)
        elif world.state is WorldState.PARKED and not was_parked and self._faults:
            self._log.info("spare ready", epoch=world.epoch, start_s=now - world.times.started)
        if world.state is WorldState.DYING:
            assert world.times.aborted is not None
            if world.check_death(now):
                self._on_world_dead(world, now)
            elif now - world.times.aborted > DEATH_TIMEOUT_S and world.processes_left():
                pids = ", ".join(str(process.pid) for process in world.processes_left())
                raise GaveUp(
                    f"processes of world {world.epoch} do not die ({pids}); "
                    "look for a hung device or file system, and end them before the next start"
                )

    def _find_unserved(self, world: World, now: float) -> WorldFault | None:
        if self._fronts.serving_epoch == world.epoch:
            return None
        since = max(world.times.active or now, self._fronts.started_at)
        since = max(since, min(self._excused_at, since + EXCUSED_AT_MOST_S))
        if now - since < SERVE_TIMEOUT_S:
            return None
        detail = f"the front and the gateway of rank 0 did not meet within {SERVE_TIMEOUT_S:.0f} s"
        return WorldFault("start", 0, None, detail)

    def _abort(self, world: World, fault: WorldFault, now: float) -> None:
        world.abort(now)  # first of all: until it is dead it may still send tokens
        self._hosts.on_fault(world, fault, now)
        if self._is_over_for(world):
            return
        if world is self._current:
            self._current = None
            self._spares.on_unserved()
            if self._spares.world is None:  # the epoch of a spare is higher already
                self._starts.raise_epoch_ahead()
            if self._recovering_since is None:
                self._recovering_since = now
            self._faults.record(world, fault, "world fault", None)
            if world.times.served is not None:
                back_off_s = self._restarts.on_fault(now - world.times.served, now)
                if back_off_s:
                    self._log.warning("worlds die soon", epoch=world.epoch, next_start_s=back_off_s)
            self._replace_world(now)
        elif world is self._reloads.world:
            self._log.error("planned change failed", epoch=world.epoch, rank=fault.rank, detail=fault.detail)
            self._reloads.fail(fault)
            self._growth.on_failed(now)
        elif world is self._spares.world:
            self._faults.record(world, fault, "spare fault", 0.0)
            self._log.warning("spare lost", epoch=world.epoch, next_start_s=self._spares.lose(now))

    def _is_over_for(self, world: World) -> bool:
        """Whether nobody asks any more how this world ended. A Ctrl-C may reach a spare's mpirun as well, before
        that has left the terminal's process group."""
        return self._stopping or (self._draining and world.is_spare)

    def _on_world_dead(self, world: World, now: float) -> None:
        self._worlds.remove(world)
        if self._is_over_for(world):
            return
        assert world.times.aborted is not None
        self._log.info("world dead", epoch=world.epoch, abort_s=now - world.times.aborted)
        self._faults.on_dead(world.epoch, now - world.times.aborted)
        if world.is_spare or world.is_change or world.plan.version != self._plan.version:
            return  # nobody waits for it
        self._starts.on_dead(world, self._plan, now)

    # ----------------------------------------------------------------- the front

    def _tell_fronts(self, now: float) -> None:
        if any(world.is_being_adopted for world in self._worlds):
            return  # the front serves from it all the while, and must not be told that it is not active
        order = {self._current: 0, self._spares.world: 1}
        worlds = sorted(self._worlds, key=lambda world: order.get(world, 2))
        notice = self._starts.notice(now)
        if self._current is not None and (
            smaller := self._starts.sizes.notice(self._plan, self._current.plan)
        ):
            notice = f"{smaller}; {notice}" if notice else smaller
        self._table.tell(
            self._fronts, self._starts.epoch, worlds, self._faults, notice, self._plan, self._hosts.pool, now
        )

    # ----------------------------------------------------------------- the end

    def _drain(self) -> None:
        """The front takes nothing new and ends when what runs has finished, or its time is over. A second signal
        cuts that short."""
        self._draining = True
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
        for world in self._worlds:
            world.abort(time.monotonic())
        give_up_at = time.monotonic() + DEATH_TIMEOUT_S
        while self._worlds and time.monotonic() < give_up_at:
            self._turn()
        self._hosts.close()
        if not self._worlds:
            self._run_dir.forget()
        self._starts.close()
        self._fronts.close()
        self._reloads.close()
        self._link.close()
        self._context.term()
