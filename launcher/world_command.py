"""The command, the environment and the host file that start a world. Used by the world itself, and by `--dry-run`,
which only shows them; it starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.host_list import Host
from launcher.run_dir import EPOCH_VARIABLE
from launcher.watch import SpareKind
from launcher.world_records import WorldPlan


@dataclass(frozen=True)
class WorldCommand:
    """What starts a world."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    host_file: Path | None
    """Where `hosts` goes; None: without other hosts."""
    hosts: str
    """Its content."""


def world_command(
    plan: WorldPlan,
    epoch: int,
    hosts: Sequence[Host],
    world_dir: Path,
    shm_dir: Path,
    base: Mapping[str, str],
    guard: Mapping[str, str],
    spare: SpareKind = SpareKind.NONE,
    kv_blocks: int = 0,
) -> WorldCommand:
    """`guard`: the variables that guards have to know; without them no guards, only ranks. `kv_blocks`: what earlier
    worlds had; 0 before the first."""
    per_host = max((host.slots for host in hosts), default=plan.tp * plan.pp)
    environment = plan.launcher.environment(
        per_host, plan.cores, shm_dir, world_dir / "tmp", base, len(hosts) > 1
    )
    environment |= {**guard, EPOCH_VARIABLE: str(epoch)}
    host_file = world_dir / "hosts" if hosts else None
    command = [*plan.rank_command, "--tp", str(plan.tp), "--pp", str(plan.pp), "--epoch", str(epoch)]
    if kv_blocks:
        command += ["--kv-cache-blocks", str(kv_blocks)]
    if guard:
        command = [*plan.guard_command, "--epoch", str(epoch), "--spare", spare.value, "--", *command]
    argv = plan.launcher.argv(hosts, plan.tp * plan.pp, command, host_file, environment)
    return WorldCommand(argv, environment, host_file, plan.launcher.host_file(hosts))
