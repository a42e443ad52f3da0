"""How worlds are started: their epochs, their hosts, when the next try may be, and when none helps any more. Used by
the supervisor alone, which decides which world is to start; it must never block."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence

from launcher.diagnosis import Machine, describe_failed_starts, diagnose
from launcher.errors import LauncherError
from launcher.guard_link import GuardLink
from launcher.host_wait import HostWait
from launcher.hosts import Host, HostPool, host_of
from launcher.logs import EventLog
from launcher.obstacles import full_disk, may_pass
from launcher.placing import split_groups
from launcher.restarts import Restarts
from launcher.run_dir import RunDir
from launcher.watch import EXIT_CONFIG, SpareKind
from launcher.world_proof import MISMATCH, SHORTAGE
from launcher.world_records import WorldFault, WorldPlan
from launcher.world_sizes import HostsMissing, WorldSizes
from launcher.worlds import World


class GaveUp(LauncherError):
    """No relaunch can help; the message is the diagnosis."""


class NotStarted(LauncherError):
    """A world could not be started. `may_pass`: the reason may go by itself."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class WorldStarts:
    """Starts worlds, and judges starts that came to nothing."""

    def __init__(
        self,
        run_dir: RunDir,
        link: GuardLink,
        hosts: HostPool,
        environment: dict[str, str],
        log: EventLog,
        waits_for_hosts: bool,
    ) -> None:
        """`waits_for_hosts`: as for Restarts."""
        self.epoch = 0
        """The highest one handed out."""
        self.restarts = Restarts(waits_for_hosts)
        self.sizes = WorldSizes(hosts)
        self.has_served = False
        """A world of this deployment has served: what it has accepted waits."""
        self._epoch_is_free = False
        """Whether it was handed out ahead, to the world that comes next."""
        self._run_dir = run_dir
        self._link = link
        self._hosts = hosts
        self._environment = environment
        self._log = log
        self._machine = Machine.now()
        self._told_split = ""
        self._host_wait = HostWait(lambda name: hosts.probe(environment, name), log)
        self._missing: str | None = None
        """Who is waited for, where no smaller world may serve meanwhile."""
        self._told = ""
        """Why no world could be started, as it was last logged."""

    def raise_epoch_ahead(self) -> None:
        """A world was aborted: whatever still carries its epoch is old from now on. Where it cannot be written, it is
        raised before the next start, which waits for that."""
        with contextlib.suppress(NotStarted):
            self._raise_epoch()
            self._epoch_is_free = True

    def start(self, spare: SpareKind, plan: WorldPlan, is_change: bool = False) -> World:
        """`plan`: what was asked for; the world may be smaller, see WorldSizes. `is_change`: it is to take over from
        one that serves. Raises NotStarted."""
        now = time.monotonic()
        try:
            fitting = self.sizes.fit(plan, now)
        except HostsMissing as missing:
            if is_change or spare is not SpareKind.NONE:
                raise NotStarted(str(missing), may_pass=True) from None
            fitting = plan  # they have just answered, or nobody can be asked
        if not self._epoch_is_free:
            self._raise_epoch()
        self._epoch_is_free = False
        hosts = self._hosts.choose(fitting.size, now, fitting.tp)
        self._tell_split(hosts, fitting)
        world = World(self.epoch, fitting, self._run_dir, self._link, spare, hosts)
        world.is_change = is_change
        kv_blocks = self.sizes.blocks(fitting)
        try:
            world.start(self._environment, kv_blocks)
        except OSError as error:
            self._run_dir.remove_world_files(self.epoch)
            cause = diagnose([WorldFault("start", None, None, str(error))], self._machine, Machine.now())
            text = f"cannot start a world: {error}{f' ({cause})' if cause else ''}"
            raise NotStarted(text, may_pass(error)) from None
        return world

    def hosts_answer(self, plan: WorldPlan, now: float) -> bool:
        """Whether a world may be started as far as its hosts go. Those that do not answer, before the first world or
        after one that was lost with its host, are asked until they do. The first world waits for all of them as long
        as the plan says, one that has served as long as it takes; if it is elastic, it goes on with those that are
        there. Raises GaveUp."""
        if plan.wait_for_hosts_s is None:
            return True
        waited_s = self._host_wait.waited_s(now)
        has_waited = self.has_served or waited_s > plan.wait_for_hosts_s
        fitting = self._fit(plan, now) if has_waited else plan
        names = [host.name for host in self._hosts.choose(fitting.size, now, fitting.tp)[1:]]
        if self._host_wait.all_answer(names, now):
            for name in names:
                self._hosts.on_back(name, now)
            self._missing = None
            return True
        if silent := self._host_wait.silent():
            # It is no fault of what runs there that a world did not start.
            self.restarts.on_hosts_away()
            for name, words in silent.items():
                self._hosts.on_lost(name, words, now)
        if not self.has_served and has_waited and fitting.size == plan.size:
            raise GaveUp(
                f"not all hosts answered within --wait-for-hosts {plan.wait_for_hosts_s:g}: "
                f"{self._host_wait.notice()}; check that commands can be started there "
                "(`ssh HOST true`), or give them more time"
            )
        return False

    def _fit(self, plan: WorldPlan, now: float) -> WorldPlan:
        """What there is room for; the whole plan where it has to be waited for."""
        try:
            fitting, self._missing = self.sizes.fit(plan, now), None
        except HostsMissing as missing:
            fitting, self._missing = plan, str(missing)
        return fitting

    @property
    def is_waiting_for_hosts(self) -> bool:
        return self._host_wait.notice() is not None

    def notice(self, now: float) -> str | None:
        """For people who ask why nothing serves, or what is wrong; None if nothing is."""
        return self._missing or self._host_wait.notice() or self.restarts.notice(now)

    def close(self) -> None:
        self._host_wait.close()

    def on_served(self, world: World) -> None:
        self.has_served = True
        self._told = ""
        self.sizes.note_blocks(world.plan, world.kv_blocks)
        self.restarts.on_served()

    def put_off(self, error: NotStarted, now: float) -> None:
        """The world that was to serve could not be started; a deployment that has served tries again. Raises
        GaveUp."""
        if not self.has_served:
            raise GaveUp(str(error)) from None
        if error.may_pass:
            back_off_s: float | None = self.restarts.on_obstacle(str(error), now)
        else:
            back_off_s = self.restarts.on_failed_start(now)
        if back_off_s is None:
            raise GaveUp(str(error)) from None
        if str(error) != self._told:  # it may be tried for hours
            self._told = str(error)
            self._log.warning("world cannot be started", detail=str(error), next_start_s=back_off_s)

    def on_dead(self, world: World, asked: WorldPlan, now: float) -> None:
        """The world that was to serve, or did, is dead; `asked`: as large as it should have been. Raises GaveUp if
        another one would not fare better."""
        if final := _final_fault(world.faults):
            reason = _last_error(final.last_lines) or final.detail
            if final.kind in (MISMATCH, SHORTAGE) and self._refuse(world, final, asked):
                return
            if final.kind == SHORTAGE and self.has_served:
                self.put_off(NotStarted(final.detail, may_pass=True), now)
                return
            if world.size >= asked.size or not self.has_served:
                raise GaveUp(reason)
            self.sizes.rule_out(world.plan, reason)
        if world.may_have_lost_hosts:
            self._host_wait.doubt()
        if world.times.served is not None or world.is_adopted:
            return
        if self.has_served and (obstacle := full_disk(self._run_dir.path)) is not None:
            self.put_off(NotStarted(obstacle, may_pass=True), now)
            return
        back_off_s = self.restarts.on_failed_start(now)
        failed = self.restarts.failed_starts
        if back_off_s is None:
            folder = self._run_dir.world_dir(world.epoch)
            cause = diagnose(world.faults, self._machine, Machine.now()) or self._hosts.describe_lost()
            raise GaveUp(describe_failed_starts(failed, cause, world.faults, folder))
        self._log.warning(
            "world failed to start", epoch=world.epoch, failed_starts=failed, next_start_s=back_off_s
        )

    def _refuse(self, world: World, mismatch: WorldFault, asked: WorldPlan) -> bool:
        """Whether the next world can do without the host of the rank that the fault names."""
        name = host_of(world.hosts, mismatch.rank or 0)
        if not self._hosts.refuse(name, asked.size, mismatch.detail):
            return False
        self.restarts.on_hosts_away()  # it says nothing about worlds on other hosts
        return True

    def _tell_split(self, hosts: Sequence[Host], plan: WorldPlan) -> None:
        """Once for each choice of hosts: the tensor-parallel groups that they tear apart."""
        split = split_groups(hosts, plan.tp, plan.pp)
        told = "; ".join(f"stage {stage} over {', '.join(names)}" for stage, names in split.items())
        if told and told != self._told_split:
            self._log.warning(
                "tensor-parallel ranks are not on one host, and meet over the network twice in every layer",
                split=told,
                remedy=f"hosts with {plan.tp} slots or a multiple of that, or a smaller --tp and more --pp",
            )
        self._told_split = told

    def _raise_epoch(self) -> None:
        try:
            self.epoch = self._run_dir.raise_epoch()
        except OSError as error:
            text = f"the epoch cannot be written to {self._run_dir.path}: {error.strerror}"
            raise NotStarted(text, may_pass(error)) from None


def _last_error(lines: str) -> str:
    prefix = "phalanx: error: "
    for line in reversed(lines.splitlines()):
        if line.startswith(prefix):
            return line.removeprefix(prefix)
    return ""


def _final_fault(faults: Iterable[WorldFault]) -> WorldFault | None:
    """The report of a rank that says no relaunch can help, if there is one among the faults of a world."""
    return next((fault for fault in faults if fault.exit_code == EXIT_CONFIG), None)
