"""`phalanx serve ... --dry-run`: which rank would run where, and the command and the environment of the first world,
as a shell script on standard output. Called by `cli`; it starts nothing, fetches nothing and writes nothing."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.access_settings import KEY_VARIABLE
from launcher.binding import cpus_for, describe, usable_cpus
from launcher.children import child_environment
from launcher.errors import LauncherError
from launcher.gpus import visible_gpus
from launcher.host_list import Host, parse_hosts
from launcher.launchers import mpijob
from launcher.launchers.host_file import host_file
from launcher.launchers.mpirun import find_mpirun, flavor_named
from launcher.logs import EventLog
from launcher.network import find_interface
from launcher.placing import RankPlace, place, places, split_groups
from launcher.preparation import ModelNotHere, PreparedModel, prepare
from launcher.processes import host_name
from launcher.rank_table import RankRow, format_table
from launcher.serve import make_plan
from launcher.settings import Settings, default_cache_dir, default_run_dir
from launcher.slurm_job import SlurmJob
from launcher.world_command import WorldCommand, world_command
from launcher.world_records import WorldPlan

_AT_START = {
    "ENDPOINT": "where the supervisor listens",
    "REMOTE_ENDPOINT": "the same for other hosts",
    "SERVER_KEY": "a public key, made for the run",
    "PUBLIC_KEY": "a public key, made for the run",
    "SECRET_KEY": "a secret, made for the run",
    "SUPERVISOR": "its process id and start time",
}
"""What guards are told and nobody can know before there is a supervisor."""


def dry_run(settings: Settings) -> int:
    """Prints it; returns 0. Raises LauncherError for what `phalanx serve` would refuse."""
    job = SlurmJob.find(settings)
    mpirun = find_mpirun(settings.mpirun, flavor_named(settings.mpi)) if job is None else job.mpirun
    settings = mpijob.complete(settings, os.environ, EventLog()) if job is None else job.complete(settings)
    hosts = parse_hosts(settings.hosts)
    if job is None:
        host_file(mpirun.flavor, hosts)
    interface = find_interface(settings.interface) if settings.interface else None
    prepared = _prepared(settings)
    try:
        plan = make_plan(settings, prepared, mpirun, hosts, interface, job)
    except LauncherError as error:  # its name is not known yet, or not from here
        print(f"phalanx: warning: {error}", file=sys.stderr)
        plan = make_plan(settings, prepared, mpirun, hosts[:1], interface)
        plan = replace(plan, hosts=hosts)
    for line in _script(settings, plan):
        print(line)
    return 0


def _prepared(settings: Settings) -> PreparedModel:
    """The model as it lies here; one that has to be fetched by the command that does."""
    try:
        return prepare(
            settings.model,
            settings.tp,
            settings.pp,
            settings.dtype,
            default_cache_dir(),
            lambda progress: None,
            backend=settings.backend,
            expert_parallel=settings.expert_parallel,
            fetch=False,
        )
    except ModelNotHere as error:
        print(f"phalanx: warning: {error}", file=sys.stderr)
        pull = f"$(phalanx pull {shlex.quote(settings.model)})"
        return PreparedModel(Path(pull), settings.model, settings.dtype, settings.max_model_len)


def _script(settings: Settings, plan: WorldPlan) -> Iterator[str]:
    run_dir = (settings.run_dir or default_run_dir(settings.port)).absolute()
    epoch = _next_epoch(run_dir)
    world_dir = run_dir / "worlds" / str(epoch)
    shm_dir = Path("/dev/shm") / f"phalanx-dry-run-{epoch}"
    hosts = place(plan.hosts, plan.tp * plan.pp, plan.tp) if plan.hosts else ()
    base = child_environment()
    base.pop(KEY_VARIABLE, None)
    guard = {f"PHALANX_GUARD_{name}": "" for name in _AT_START}
    guard |= {"PHALANX_GUARD_WORLD_DIR": str(world_dir), "PHALANX_GUARD_SHM_DIR": str(shm_dir)}
    guarded = world_command(plan, epoch, hosts, world_dir, shm_dir, base, guard)
    bare = world_command(plan, epoch, hosts, world_dir, shm_dir, base, {})

    yield f"# world {epoch}: tp {plan.tp}, pp {plan.pp}, started by {plan.mpirun.version} ({plan.mpirun.path})"
    for line in format_table(_rows(settings.bind, hosts, plan)):
        yield f"#   {line}"
    for stage, names in split_groups(hosts, plan.tp, plan.pp).items():
        yield f"# stage {stage} is torn over {', '.join(names)}: its ranks meet over the network twice in every layer"
    yield ""
    yield f"mkdir -p -m 700 {shlex.quote(str(world_dir / 'tmp'))} {shlex.quote(str(shm_dir))}"
    if guarded.host_file is not None:
        yield f"cat > {shlex.quote(str(guarded.host_file))} <<'END'"
        yield guarded.hosts + "END"
    for name, value in sorted(_changes(bare).items()):
        yield f"export {name}={shlex.quote(value)}"
    yield ""
    yield "# Under the supervisor every rank has a guard as its parent, which is told what only the run knows:"
    for name, meaning in _AT_START.items():
        if name != "REMOTE_ENDPOINT" or len(hosts) > 1:
            yield f"#   PHALANX_GUARD_{name}: {meaning}"
    for name in ("WORLD_DIR", "SHM_DIR"):
        yield f"#   PHALANX_GUARD_{name}={shlex.quote(guard[f'PHALANX_GUARD_{name}'])}"
    yield f"# {_line(guarded.argv)}"
    yield ""
    yield "# The same world without guards and supervisor, for a ZeroMQ client; nothing mends it:"
    yield _line(bare.argv)


def _rows(binding: str, hosts: Sequence[Host], plan: WorldPlan) -> Iterator[RankRow]:
    here = hosts[0].name if hosts else ""
    for one in places(hosts, plan.tp, plan.pp):
        cores, gpu = _share(binding, one), f"{one.local_rank} of that host, if it has any"
        if one.host == here:  # the first host is this one
            cores = describe(cpus_for(binding, one.local_rank, one.local_size, usable_cpus()))
            gpus = visible_gpus()
            gpu = gpus[one.local_rank] if one.local_rank < len(gpus) else ""
        yield RankRow(one.rank, one.tp_rank, one.pp_rank, one.host or host_name(), cores, gpu)


def _share(binding: str, one: RankPlace) -> str:
    if binding == "none":
        return "all of that host"
    what = {"core": "cores", "numa": "NUMA nodes", "socket": "sockets"}[binding]
    return f"part {one.local_rank + 1} of {one.local_size} of its {what}"


def _changes(command: WorldCommand) -> Mapping[str, str]:
    """What differs from the environment that this was called in."""
    return {name: value for name, value in command.environment.items() if os.environ.get(name) != value}


def _next_epoch(run_dir: Path) -> int:
    try:
        return int((run_dir / "epoch").read_text()) + 1
    except (OSError, ValueError):
        return 1


def _line(argv: Sequence[str]) -> str:
    """For a shell; a command in place of the model's folder stays one."""
    return " ".join(
        f'"{word}"' if re.fullmatch(r"\$\(phalanx pull .*\)", word) else shlex.quote(word) for word in argv
    )
