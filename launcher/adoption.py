"""How a supervisor takes over what an earlier one, killed in mid-run, left serving: the record on disk, what of it is
still there, and the listening socket that the front hands over. Called by `serve` and the supervisor, always under
the run folder's lock; must never let two worlds of one deployment live that both could serve."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gateway.control_messages import of_front
from launcher.errors import LauncherError
from launcher.guard_link import GuardLink, LinkKeys
from launcher.hosts import Host
from launcher.processes import ProcessId, host_id, is_alive
from launcher.run_dir import RunDir
from launcher.watch import SpareKind
from launcher.world_records import WorldPlan
from launcher.worlds import World

RECORD = "deployment.json"
FORMAT = 2
"""Of the record and of the messages between guards and supervisor; raised with every change that an earlier version
would misread."""

HAND_OVER_TIMEOUT_S = 10.0
"""How long a front may take to hand over its listening socket."""


class SettingsDiffer(LauncherError):
    """What serves was started with other flags."""

    exit_code = 2


@dataclass(frozen=True)
class FoundWorld:
    """A world that is whole as far as the record and its mpirun tell."""

    epoch: int
    mpirun: ProcessId
    spare: SpareKind
    """NONE: the one that serves."""
    hosts: tuple[Host, ...]
    tp: int | None = None
    pp: int | None = None
    """None: as asked for; fewer while hosts are lost."""


@dataclass(frozen=True)
class Found:
    """What an earlier supervisor left, and what is still there of it."""

    keys: LinkKeys
    remote_endpoint: str
    """Where the guards of other hosts look for a supervisor; empty if there are none."""
    kv_blocks: int
    prepared: Mapping[str, Any]
    """The model as it was prepared then."""
    fronts: tuple[ProcessId | None, ...]
    """None for one that is not there."""
    worlds: list[FoundWorld]

    @property
    def front(self) -> ProcessId | None:
        """The first one that is there."""
        return next((front for front in self.fronts if front is not None), None)

    @property
    def front_pids(self) -> list[int]:
        return [front.pid for front in self.fronts if front is not None]

    @property
    def world(self) -> FoundWorld | None:
        """The one that serves."""
        return next((world for world in self.worlds if world.spare is SpareKind.NONE), None)


def find(run_dir: RunDir, settings: Mapping[str, Any]) -> Found | None:
    """What can be taken over in this folder; all else that the earlier run left is ended. None if there is nothing,
    in which case everything is. The run goes on under its old id. Raises SettingsDiffer, and leaves all as it is,
    if something serves there that was started with other settings; LauncherError if leftovers do not die."""
    found = _read(run_dir)
    if found is None:
        run_dir.remove_leftovers()
        return None
    record = run_dir.read_json(RECORD)
    if differences := _differences(record["settings"], settings):
        raise SettingsDiffer(
            f"--run-dir {run_dir.path}: the supervisor was killed, but what it served goes on, started with "
            f"{differences}. Give the same flags to take it over, or end it with "
            f"`phalanx stop --run-dir {run_dir.path}` first"
        )
    run_dir.remove_leftovers(
        keep_epochs=[world.epoch for world in found.worlds],
        keep_pids=found.front_pids,
    )
    run_dir.run_id = record["run_id"]
    return found


def _read(run_dir: RunDir) -> Found | None:
    record = run_dir.read_json(RECORD)
    try:
        if record.get("format") != FORMAT or record["host_id"] != host_id():
            return None
        recorded = [ProcessId(**front) if front else None for front in record["fronts"]]
        worlds = [
            FoundWorld(
                int(entry["epoch"]),
                ProcessId(**entry["mpirun"]),
                SpareKind(entry["spare"]),
                tuple(Host(**host) for host in entry["hosts"]),
                entry.get("tp"),
                entry.get("pp"),
            )
            for entry in record["worlds"]
            if entry["whole"]
        ]
        found = Found(
            keys=LinkKeys(**record["keys"]),
            remote_endpoint=str(record["remote_endpoint"]),
            kv_blocks=int(record["kv_blocks"]),
            prepared=dict(record["prepared"]),
            fronts=tuple(front if front is not None and is_alive(front) else None for front in recorded),
            worlds=[world for world in worlds if is_alive(world.mpirun)],
        )
    except (KeyError, TypeError, ValueError):  # a record that no version of this program has written
        return None
    return found if found.front is not None or found.worlds else None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings of old that new has otherwise, as flags; empty if there are none."""
    return ", ".join(
        f"{name} {old.get(name)} (now {new.get(name)})"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def receive_listener(path: Path) -> socket.socket | None:
    """The listening HTTP socket, from the front that holds it (SCM_RIGHTS, unix(7)); None if it does not answer
    within HAND_OVER_TIMEOUT_S."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(HAND_OVER_TIMEOUT_S)
            link.connect(str(path))
            _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
    except OSError:
        return None
    return socket.socket(fileno=descriptors[0]) if descriptors else None


def adopt_worlds(found: Found, plan: WorldPlan, run_dir: RunDir, link: GuardLink) -> list[World]:
    """The found worlds that are still there, whose guards now report to this link."""
    worlds = []
    for entry in sorted(found.worlds, key=lambda world: world.epoch):
        own = replace(plan, tp=entry.tp or plan.tp, pp=entry.pp or plan.pp)
        world = World(entry.epoch, own, run_dir, link, entry.spare, entry.hosts)
        try:
            world.adopt(entry.mpirun)
        except ProcessLookupError:  # it ended just now; so do its guards
            continue
        worlds.append(world)
    return worlds


class RecordKeeper:
    """Keeps the record on disk true: who runs, and what the next supervisor needs to take it over."""

    def __init__(
        self, run_dir: RunDir, settings: Mapping[str, Any], prepared: Mapping[str, Any] | None = None
    ) -> None:
        """`settings`: what a supervisor that takes over must have been given, too, by flag."""
        self._run_dir = run_dir
        self._settings = dict(settings)
        self._prepared = dict(prepared or {})
        self._key: object = None

    def change(self, settings: Mapping[str, Any], prepared: Mapping[str, Any]) -> None:
        """A world of other settings serves from now on; written with the next `keep`."""
        self._settings = dict(settings)
        self._prepared = dict(prepared)
        self._key = None

    def keep(
        self,
        supervisor: ProcessId,
        link: GuardLink,
        fronts: Sequence[ProcessId | None],
        current: World | None,
        worlds: Iterable[World],
        kv_blocks: int,
    ) -> None:
        """Writes what has changed since the last call. `worlds` are those that are not dying. Raises OSError, after
        which the next call tries again."""
        worlds = list(worlds)
        key = (
            list(fronts),
            kv_blocks,
            current,
            [(world.epoch, world.is_spare, world.is_whole) for world in worlds],
        )
        if key == self._key:
            return
        spare = next((world for world in worlds if world.is_spare), None)
        self._run_dir.record(
            supervisor=supervisor,
            **{of_front("front", number): front for number, front in enumerate(fronts)},
            mpirun=current.mpirun if current is not None else None,
            spare_mpirun=spare.mpirun if spare is not None else None,
        )
        self._run_dir.write_json(
            RECORD,
            {
                "format": FORMAT,
                "run_id": self._run_dir.run_id,
                "host_id": host_id(),
                "settings": self._settings,
                "prepared": self._prepared,
                "keys": asdict(link.keys),
                "remote_endpoint": link.remote_endpoint,
                "kv_blocks": kv_blocks,
                "fronts": [asdict(front) if front is not None else None for front in fronts],
                "worlds": [
                    {
                        "epoch": world.epoch,
                        "mpirun": asdict(world.mpirun),
                        "spare": (world.spare if world.is_spare else SpareKind.NONE).value,
                        "whole": world.is_whole,
                        "hosts": [asdict(host) for host in world.hosts],
                        "tp": world.plan.tp,
                        "pp": world.plan.pp,
                    }
                    for world in worlds
                    if world.mpirun is not None
                ],
            },
        )
        self._key = key
