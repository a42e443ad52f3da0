"""One world, from its mpirun to the proof that none of its processes is left. Owned by the supervisor; every
method returns at once, and a world that is dying never comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.freezer import CgroupFreezer
from launcher.guard_link import GuardLink
from launcher.guard_messages import Beat, FaultReport, Go, GuardHello, Kill, Killed, Lease, Message, RankFacts
from launcher.hosts import Host
from launcher.leases import FENCE_MARGIN, FENCE_MARGIN_S, adoption_wait_s
from launcher.placement import find_misplaced
from launcher.post_mortem import last_lines
from launcher.processes import ProcessId, host_id, is_alive, kill, read_stat
from launcher.run_dir import RunDir
from launcher.segments import note_before_kill
from launcher.stalls import find_stall
from launcher.start_times import StartTimes
from launcher.watch import Phase, SpareKind
from launcher.world_command import world_command
from launcher.world_processes import WorldProcesses
from launcher.world_proof import find_mismatch
from launcher.world_records import Doing, RankWatch, WorldFault, WorldPlan, WorldState, WorldTimes, phase_of

BEATS_LOST_AFTER_S = 1.0
BEATS_STARVED_AFTER_S = 5.0
"""The same for a guard of this host whose process runs or sleeps as it should; what it waited for a processor on a
crowded machine comes on top."""
ACKNOWLEDGE_S = 0.15
"""How long guards get to acknowledge a kill order before they are killed too."""
DEATH_TIMEOUT_S = 30.0
"""How long killed processes may take to vanish; only a fault of the kernel or a device takes so long."""


class World:
    """See the module's first lines. Messages, checks and time come from the supervisor's loop."""

    def __init__(
        self,
        epoch: int,
        plan: WorldPlan,
        run_dir: RunDir,
        link: GuardLink,
        spare: SpareKind = SpareKind.NONE,
        hosts: Sequence[Host] = (),
    ) -> None:
        """`spare`: what kind of spare it is until `promote`; NONE for a world that is to serve at once. `hosts`:
        where its ranks run, with the slots that they fill; empty: here."""
        self.hosts = hosts
        self.epoch = epoch
        self.plan = plan
        self.spare = spare
        self.is_spare = spare is not SpareKind.NONE
        self.state = WorldState.STARTING
        self.ranks: dict[int, RankWatch] = {}
        self.faults: list[WorldFault] = []
        """What guards and checks reported, first one first: the cause, and then its consequences."""
        self.times = WorldTimes()
        self.start_times = StartTimes(self.times.started)
        self._run_dir = run_dir
        self._link = link
        self._processes = WorldProcesses(epoch, plan, run_dir, self.ranks, len(hosts))
        self.is_change = False
        """Whether it is to take over from one that serves, as planned."""
        self.is_adopted = False
        """Whether an earlier supervisor started it."""
        self._last_sweep = 0.0
        self._adoption_wait_s = 0.0

    @property
    def size(self) -> int:
        return self.plan.size

    @property
    def mpirun(self) -> ProcessId | None:
        """Its mpirun, once started."""
        return self._processes.mpirun

    @property
    def is_whole(self) -> bool:
        """Whether a new supervisor may take it over: it has served, or is a spare that is parked."""
        if self.is_adopted and self.state in (WorldState.STARTING, WorldState.ACTIVE):
            return True
        return self.state is WorldState.PARKED or (
            self.state is WorldState.ACTIVE and self.times.served is not None
        )

    @property
    def is_being_adopted(self) -> bool:
        """Whether it serves, but its guards have not all reported to this supervisor yet."""
        return self.is_adopted and self.spare is SpareKind.NONE and self.state is WorldState.STARTING

    @property
    def may_have_lost_hosts(self) -> bool:
        """Of one that is dead: whether a guard of another host did not say that it has killed its rank, or never came
        up."""
        if len(self.hosts) < 2:
            return False
        heard = [watch for watch in self.ranks.values() if watch.acknowledged or not watch.is_remote]
        return len(heard) < self.size

    @property
    def gateway(self) -> str | None:
        """Endpoint of rank 0's gateway, once it listens."""
        rank0 = self.ranks.get(0)
        return rank0.beat.endpoint if rank0 is not None and rank0.beat is not None else None

    @property
    def kv_blocks(self) -> int:
        """KV blocks that its ranks have agreed on; 0 before."""
        return max((watch.beat.kv_blocks for watch in self.ranks.values() if watch.beat), default=0)

    @property
    def load_progress(self) -> tuple[int, int]:
        """Bytes of weights in place and in all, over the ranks that have begun to load."""
        beats = [watch.beat for watch in self.ranks.values() if watch.beat is not None]
        return sum(beat.load_done for beat in beats), sum(beat.load_total for beat in beats)

    def start(self, base: dict[str, str], kv_blocks: int = 0) -> None:
        """Starts mpirun. `kv_blocks`: what earlier worlds had, so that what they had accepted fits; 0 before the
        first. Raises OSError."""
        plan = self.plan
        self._run_dir.make_world_dirs(self.epoch)
        world_dir, shm_dir = self._run_dir.world_dir(self.epoch), self._run_dir.shm_dir(self.epoch)
        guard = self._link.guard_environment(world_dir, shm_dir, adoption_wait_s(base))
        command = world_command(
            plan,
            self.epoch,
            self.hosts,
            world_dir,
            shm_dir,
            base,
            guard.to_environment(),
            self.spare,
            kv_blocks,
        )
        if command.host_file is not None:
            command.host_file.write_text(command.hosts)
        self._processes.start(command.argv, command.environment)

    def adopt(self, mpirun: ProcessId) -> None:
        """Takes over what an earlier supervisor started; its guards report by themselves. Raises
        ProcessLookupError if its mpirun is gone."""
        self._processes.adopt(mpirun)
        self.is_adopted = True
        self._adoption_wait_s = adoption_wait_s()

    def promote(self, now: float) -> None:
        """The spare's turn has come: every rank, parked or still on its way there, goes on and serves."""
        self.is_spare = False
        self.times.started = now
        if self.state is WorldState.PARKED:
            self.state = WorldState.STARTING
        for watch in self.ranks.values():
            self._link.send(watch.identity, Go(epoch=self.epoch))

    # ----------------------------------------------------------------- what comes in

    def on_message(self, identity: bytes, message: Message, now: float) -> None:
        """A message of a guard of this epoch. Whose rank is none of this world's is ignored."""
        rank = getattr(message, "rank", -1)
        if not 0 <= rank < self.size:
            return
        if isinstance(message, GuardHello):
            self.ranks[rank] = RankWatch(message, identity, now)
            if message.unix_s:
                self.ranks[rank].clock_ahead_s = message.unix_s - time.time()
            self._processes.note_guard(self.ranks[rank])
            if self.state is WorldState.DYING:  # it came up while its world was going down
                self._link.send(identity, Kill(epoch=self.epoch))
            elif self.spare is not SpareKind.NONE and not self.is_spare:  # promoted before it had come up
                self._link.send(identity, Go(epoch=self.epoch))
            return
        watch = self.ranks.get(rank)
        if watch is None:  # of the earlier supervisor's guards
            self._link.introduce(identity, self.epoch)
            return
        watch.identity = identity  # another one after each new connection
        watch.hear(now)
        if watch.is_remote and self.state is WorldState.DYING:  # the order was lost on its way
            self._link.send(identity, Kill(epoch=self.epoch))
        if isinstance(message, RankFacts):
            watch.facts = message
        if isinstance(message, Beat):
            watch.beat = message
            if watch.is_remote and self.state is not WorldState.DYING:
                lease_s = watch.lease(message.delay_s)
                self._link.send(identity, Lease(self.epoch, message.sent_s, lease_s))
        elif isinstance(message, FaultReport):
            self.faults.append(
                WorldFault(
                    kind=message.kind,
                    rank=rank,
                    host=watch.hello.host,
                    detail=message.detail,
                    detect_s=message.detect_s,
                    exit_code=message.exit_code,
                    last_lines=message.last_lines,
                    doing=Doing(
                        phase_of(message.phase).name.lower(), message.step, message.collective, message.age_s
                    ),
                    stacks=message.stacks,
                )
            )
        elif isinstance(message, Killed):
            watch.acknowledged = True
            if self.state is not WorldState.DYING:
                detail = f"the guard of rank {rank} was told to end, though not by the supervisor"
                self.faults.append(WorldFault("killed", rank, watch.hello.host, detail, 0.0))

    def extend_deadlines(self, late_s: float, now: float) -> None:
        """The supervisor itself was late: silence of the guards in that time says nothing. Call it after what came in
        was heard: a beat that waited meanwhile is no older than now, and no younger."""
        for watch in self.ranks.values():
            watch.last_beat_at = min(now, watch.last_beat_at + late_s)
        self.times.started += late_s

    def check(self, now: float, may_serve: bool = True) -> WorldFault | None:
        """Moves the state on, and returns why the world has to die, if it has to. Call it after all messages
        that had come in were handed over. It becomes active only if it `may_serve`: when no earlier world
        is left."""
        if self.state in (WorldState.DYING, WorldState.DEAD):
            return None
        # What does not fit explains what comes of it, as an MPI_Init that fails.
        proven = self.times.active is not None or self.is_adopted
        if (
            not proven
            and (fault := find_mismatch(self.hosts, self.ranks, self.plan.mpirun.flavor)) is not None
        ):
            self.faults.insert(0, fault)
            return fault
        if fault := self._find_fault(now):
            if fault not in self.faults:
                self.faults.append(fault)
            return fault
        if len(self.ranks) == self.size and (fault := find_misplaced(self.hosts, self.ranks)) is not None:
            self.faults.append(fault)
            return fault
        phases = [watch.phase for watch in self.ranks.values()]
        self.start_times.note(phases, self.size, now)
        ready = len(phases) == self.size and all(phase in (Phase.IDLE, Phase.STEPPING) for phase in phases)
        parked = len(phases) == self.size and all(phase is Phase.PARKED for phase in phases)
        if ready and may_serve and self.gateway is not None and self.state is not WorldState.ACTIVE:
            self.state = WorldState.ACTIVE
            self.times.active = now
        elif parked and self.is_spare and self.state is not WorldState.PARKED:
            self.state = WorldState.PARKED
            self.times.parked = now
        elif self.state is WorldState.STARTING and Phase.LOADING in phases:
            self.state = WorldState.LOADING
        return None

    def _find_fault(self, now: float) -> WorldFault | None:
        if self.faults:
            return self.faults[0]
        for rank, watch in self.ranks.items():
            silent_s = now - watch.last_beat_at
            if silent_s <= max(BEATS_LOST_AFTER_S, (1 + FENCE_MARGIN) * watch.lease_s):
                continue
            if not _runs_here(watch) or watch.blocked_s(now) > BEATS_STARVED_AFTER_S:
                detail = f"the guard of rank {rank} has been silent for {silent_s:.2f} s"
                return WorldFault("lost", rank, watch.hello.host, detail, silent_s)
        if (mpirun_end := self._processes.mpirun_end) is not None:
            lines = last_lines(self._processes.mpirun_log)
            if not self.ranks:
                detail = f"{mpirun_end} before a rank reported"
                return WorldFault("start", None, None, detail, last_lines=lines)
            return WorldFault("mpirun", None, None, mpirun_end, 0.0, last_lines=lines)
        if self.state not in (WorldState.ACTIVE, WorldState.PARKED):
            waited_s = now - self.times.started
            return find_stall(self.ranks, self.size, waited_s, self.is_adopted, self._processes.mpirun_log)
        return None

    # ----------------------------------------------------------------- its end

    def abort(self, now: float) -> None:
        """Orders every guard to kill its rank, and kills the ranks of this host directly as well; their guards
        and mpirun too, if the world has served."""
        if self.state in (WorldState.DYING, WorldState.DEAD):
            return
        self.state = WorldState.DYING
        self.times.aborted = now
        here = host_id()
        local = [watch for watch in self.ranks.values() if watch.hello.host_id == here]
        for watch in local:
            if watch.phase in (Phase.JOINING, Phase.LOADING):
                note_before_kill(self._run_dir.shm_dir(self.epoch), watch.hello.rank, watch.process.pid)
            kill(watch.process)
        self._processes.note_shells()
        ends_at_once = self.plan.launcher.has_ranks_in_session
        if ends_at_once and (self.times.served is not None or self.is_adopted):
            # The next world waits for the end of this one. Of one that never served, the guards' last words
            # may say more than the first fault did; so those are given time.
            for watch in local:
                kill(watch.guard)
            self._processes.end_mpirun(now)
        for watch in self.ranks.values():
            self._link.send(watch.identity, Kill(epoch=self.epoch))

    def check_death(self, now: float) -> bool:
        """Call it while DYING: ends what is left, first when the guards have had their time. True once no
        process of the world is there, zombies included, and its files are removed."""
        assert self.times.aborted is not None
        # Whoever ends a step of Slurm ends the guards of other hosts before they can say that their ranks are dead.
        asks_remote = not self.plan.launcher.has_ranks_in_session
        unheard_guards = (watch for watch in self.ranks.values() if not watch.acknowledged)
        waiting = [w for w in unheard_guards if is_alive(w.guard) or (asks_remote and w.is_remote)]
        if waiting and now - self.times.aborted < ACKNOWLEDGE_S:
            return False
        if now - self._last_sweep < 0.01:  # a look at all of /proc costs a millisecond or more
            return False
        self._last_sweep = now
        if not self._processes.end_rest(now):
            return False
        if not all(watch.is_fenced(now) for watch in self.ranks.values()):
            return False
        # A guard that nobody has heard of since its supervisor ended waits for the next one, and no longer.
        unheard = self.hosts and self.is_adopted and len(self.ranks) < self.size
        if unheard and now < self.times.started + self._adoption_wait_s + FENCE_MARGIN_S:
            return False
        self._run_dir.remove_world_files(self.epoch)
        self.state = WorldState.DEAD
        self.times.dead = now
        return True

    def processes_left(self) -> list[ProcessId]:
        """Processes of this world on this host, zombies included."""
        return self._processes.left()


def _runs_here(watch: RankWatch) -> bool:
    """Whether the guard is a process of this host that is neither dead nor stopped nor frozen."""
    if watch.hello.host_id != host_id():
        return False
    stat = read_stat(watch.guard.pid)
    if stat is None or stat.start != watch.guard.start or stat.state not in "RSD":
        return False
    return not CgroupFreezer(stat.pid).is_frozen()
