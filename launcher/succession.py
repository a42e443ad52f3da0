"""Which world serves, and which comes after it: the spare, a new one, or one that was planned. Driven by the
supervisor's loop, which tells it what was heard. It never lets two worlds serve at once, and it must never block."""

from __future__ import annotations

import time
from collections.abc import Callable

from launcher.adoption import Found, adopt_worlds
from launcher.fault_log import FaultLog
from launcher.growth import Growth
from launcher.guard_link import GuardLink
from launcher.host_watch import HostWatch
from launcher.logs import EventLog
from launcher.reload import Change, Reloads
from launcher.run_dir import RunDir
from launcher.spares import Spares
from launcher.watch import SpareKind
from launcher.world_records import WorldFault, WorldPlan, WorldState
from launcher.world_starts import GaveUp, NotStarted, WorldStarts
from launcher.worlds import DEATH_TIMEOUT_S, World


class Succession:
    """All worlds of a deployment. Times are on the monotonic clock, in seconds."""

    def __init__(
        self,
        plan: WorldPlan,
        spare: SpareKind,
        run_dir: RunDir,
        link: GuardLink,
        hosts: HostWatch,
        reloads: Reloads,
        environment: dict[str, str],
        log: EventLog,
    ) -> None:
        """`plan`, `spare`: what was asked for; a planned change brings others."""
        self.plan = plan
        self.living: list[World] = []
        """All that live, in the order of their epochs."""
        self.current: World | None = None
        """The one that serves, or is to serve next; all before it are dying."""
        self.spares = Spares(spare)
        self.starts = WorldStarts(
            run_dir, link, hosts.pool, environment, log, waits_for_hosts=bool(plan.hosts)
        )
        self.restarts = self.starts.restarts
        self.faults = FaultLog(log)
        self.is_draining = False
        """The front finishes what runs; worlds are watched and replaced as ever."""
        self.is_stopping = False
        """All of them are to end."""
        self._growth = Growth(hosts.pool, self.starts.sizes)
        self._recovering_since: float | None = None
        self._resumed_epoch = 0
        self._run_dir = run_dir
        self._link = link
        self._hosts = hosts
        self._reloads = reloads
        self._log = log

    # ----------------------------------------------------------------- what is there

    @property
    def adoptable(self) -> list[World]:
        """What a supervisor that comes after this one may find. A world that is to take over is no such world before
        it has: then it is ended as a leftover."""
        next_world = self._reloads.world
        return [
            world for world in self.living if world.state is not WorldState.DYING and world is not next_world
        ]

    @property
    def kv_blocks(self) -> int:
        """Of the world that serves; 0 while none does."""
        return self.starts.sizes.blocks(self.current.plan) if self.current is not None else 0

    def most_important_first(self) -> list[World]:
        """The current one, the spare, the others."""
        order = {self.current: 0, self.spares.world: 1}
        return sorted(self.living, key=lambda world: order.get(world, 2))

    def notice(self, now: float) -> str | None:
        """What people should know of it: why no world starts, or that a smaller one serves."""
        notice = self.starts.notice(now)
        if self.current is not None and (smaller := self.starts.sizes.notice(self.plan, self.current.plan)):
            notice = f"{smaller}; {notice}" if notice else smaller
        return notice

    # ----------------------------------------------------------------- what comes next

    def take_over(self, found: Found) -> None:
        """What an earlier supervisor left becomes this one's own; what it lacks is started as after a fault."""
        self.starts.epoch = self._run_dir.epoch
        self.living = adopt_worlds(found, self.plan, self._run_dir, self._link)
        self._hosts.ask_all(time.monotonic())  # whom the earlier one had lost nobody knows
        for world in self.living:
            if world.is_spare:
                self.spares.world = world
            else:
                self.current = world
                self.starts.sizes.note_blocks(world.plan, found.kv_blocks)
        epochs = " ".join(str(world.epoch) for world in self.living) or None
        self._log.warning("taken over from a supervisor that was killed", worlds=epochs, front=found.front)

    def keep_up(self, now: float) -> None:
        """Starts what is missing: a world that serves before all else."""
        if self.current is None:
            self._replace(now)
        elif not self.is_draining and self._reloads.change is None:
            if self._growth.is_due(self.plan, self.current, now):
                self._log.info("a larger world starts: hosts are back")
                self.begin_change(self._reloads.begin_own(self.plan, self.spares.kind, now))
            elif self.spares.is_due(now):
                self._start_spare(now)

    def start(self, spare: SpareKind, plan: WorldPlan | None = None, is_change: bool = False) -> World:
        """Raises NotStarted."""
        world = self.starts.start(spare, plan or self.plan, is_change)
        self.living.append(world)
        if self.faults:  # a start in good health says nothing
            event = "spare started" if world.is_spare else "world started"
            self._log.info(event, epoch=world.epoch, ranks=world.size)
        return world

    def begin_change(self, change: Change) -> None:
        """The new world starts beside the one that serves."""
        try:
            self._reloads.world = self.start(SpareKind.NONE, change.plan, is_change=True)
        except NotStarted as error:
            self._reloads.fail(WorldFault("start", None, None, str(error)))
            self._growth.on_failed(time.monotonic())

    def end_change(self, now: float) -> World:
        """The front serves from the new world: it is the current one, and what belongs to the old plan ends."""
        new = self._reloads.world
        assert new is not None
        for old in (self.current, self.spares.world):
            if old is not None:
                self._log.info("world ends as planned", epoch=old.epoch)
                old.abort(now)
        self.current, self.spares.world = new, None
        new.is_change = False
        change = self._reloads.done(now)
        self._growth.on_done()
        self.plan, self.spares.kind = change.plan, change.spare
        new.times.served = now
        return new

    def _replace(self, now: float) -> None:
        """Puts a world where none is: the spare, which may go ahead at once, since it serves only when the one
        before it is gone; else a new one, once that is so and the back-off is over."""
        if now < self.restarts.not_before:
            return
        spare = self.spares.take()
        if spare is not None and self._hosts.has_lost_host(spare):
            self._log.warning("spare lost with its host", epoch=spare.epoch)
            spare.abort(now)
        elif spare is not None:
            self._log.info("spare promoted", epoch=spare.epoch, state=spare.state.value)
            spare.promote(now)
            self.current = spare
        elif all(world is self._reloads.world for world in self.living):
            if not self.starts.hosts_answer(self.plan, now):
                return
            try:
                self.current = self.start(SpareKind.NONE)
            except NotStarted as error:
                self.starts.put_off(error, now)

    def _start_spare(self, now: float) -> None:
        """What keeps it from starting, like a full disk, is no reason to end the world that serves."""
        try:
            self.spares.world = self.start(self.spares.kind)
        except NotStarted as error:
            self._log.warning("spare not started", detail=str(error), next_start_s=self.spares.lose(now))

    # ----------------------------------------------------------------- what was heard

    def on_served(self, world: World, now: float) -> None:
        """The front serves from it."""
        self.starts.on_served(world)
        if not world.is_adopted:
            self._log.info("world serves", epoch=world.epoch, **world.start_times.parts(now))
        self.spares.on_served(now, recovered=self._recovering_since is not None)
        if self._recovering_since is not None:
            recover_s = now - self._recovering_since
            self._recovering_since = None
            self._log.info("world recovered", epoch=world.epoch, recover_s=recover_s)
            self.faults.on_served(world.epoch, recover_s)

    def on_resumed(self, world: World, resumed_at: float, now: float) -> None:
        """The first of the requests that it took over has had a token, at this Unix time."""
        if self._resumed_epoch < world.epoch:
            self._resumed_epoch = world.epoch
            self.spares.on_resumed(now)
            self.faults.on_resumed(world.epoch, resumed_at)

    def judge(
        self, world: World, now: float, find_unserved: Callable[[World, float], WorldFault | None]
    ) -> None:
        """Whether it may live, and if it must not, whether it is dead. `find_unserved`: why the front should have met
        it by now, if it should. Raises GaveUp."""
        was_parked = world.state is WorldState.PARKED
        fenced = not any(other.state is WorldState.DYING for other in self.living if not other.is_spare)
        fault = None
        if world is self._reloads.world and (problem := self._reloads.problem(self.current)):
            fault = WorldFault("start", None, None, problem)
        elif world.times.served is None and world.size < self.plan.size:
            fault = self.starts.sizes.problem(world)
        fault = fault or world.check(now, may_serve=fenced)
        # While another world is to take over, the front is asked to leave this one.
        next_world = self._reloads.world
        changing = next_world is not None and next_world.state is WorldState.ACTIVE
        expected = next_world if changing else self.current
        if fault is None and world is expected and world.state is WorldState.ACTIVE:
            fault = find_unserved(world, now)
        if fault is not None:
            self.abort(world, fault, now)
        elif world.state is WorldState.PARKED and not was_parked and self.faults:
            self._log.info("spare ready", epoch=world.epoch, start_s=now - world.times.started)
        if world.state is WorldState.DYING:
            assert world.times.aborted is not None
            if world.check_death(now):
                self._on_dead(world, now)
            elif now - world.times.aborted > DEATH_TIMEOUT_S and world.processes_left():
                pids = ", ".join(str(process.pid) for process in world.processes_left())
                raise GaveUp(
                    f"processes of world {world.epoch} do not die ({pids}); "
                    "look for a hung device or file system, and end them before the next start"
                )

    def abort(self, world: World, fault: WorldFault, now: float) -> None:
        """It has to die, and another takes its place."""
        world.abort(now)  # first of all: until it is dead it may still send tokens
        self._hosts.on_fault(world, fault, now)
        if self._is_over_for(world):
            return
        if world is self.current:
            self.current = None
            self.spares.on_unserved()
            if self.spares.world is None:  # the epoch of a spare is higher already
                self.starts.raise_epoch_ahead()
            if self._recovering_since is None:
                self._recovering_since = now
            self.faults.record(world, fault, "world fault", None)
            if world.times.served is not None:
                back_off_s = self.restarts.on_fault(now - world.times.served, now)
                if back_off_s:
                    self._log.warning("worlds die soon", epoch=world.epoch, next_start_s=back_off_s)
            self._replace(now)
        elif world is self._reloads.world:
            self._log.error("planned change failed", epoch=world.epoch, rank=fault.rank, detail=fault.detail)
            self._reloads.fail(fault)
            self._growth.on_failed(now)
        elif world is self.spares.world:
            self.faults.record(world, fault, "spare fault", 0.0)
            self._log.warning("spare lost", epoch=world.epoch, next_start_s=self.spares.lose(now))

    def _is_over_for(self, world: World) -> bool:
        """Whether nobody asks any more how this world ended. A Ctrl-C may reach a spare's mpirun as well, before
        that has left the terminal's process group."""
        return self.is_stopping or (self.is_draining and world.is_spare)

    def _on_dead(self, world: World, now: float) -> None:
        self.living.remove(world)
        if self._is_over_for(world):
            return
        assert world.times.aborted is not None
        self._log.info("world dead", epoch=world.epoch, abort_s=now - world.times.aborted)
        self.faults.on_dead(world.epoch, now - world.times.aborted)
        if world.is_spare or world.is_change or world.plan.version != self.plan.version:
            return  # nobody waits for it
        self.starts.on_dead(world, self.plan, now)
