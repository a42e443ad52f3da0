"""`phalanx slurm render`: prints the batch script of a deployment, for sbatch. Called by `cli`; asks no Slurm, so
that it runs anywhere."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.children import python_module
from launcher.errors import SettingsError
from launcher.settings import Settings

DRAIN_MARGIN_S = 20
"""What is left of the notice, after the drain, for worlds to end and the job to be requeued."""
_IN_ALLOCATION = ("hosts", "launcher", "mpirun", "api_key", "drain_timeout")
"""Settings that the script does not take over as they are."""

_OPTIONS: dict[str, tuple[str, str]] = {
    "nodes": ("N", "nodes of the job; more than the ranks need: spares for nodes that die"),
    "ntasks-per-node": ("N", "ranks that a node may have"),
    "cpus-per-task": ("N", "CPUs of a rank; it computes with as many threads"),
    "gpus": ("N", "GPUs of the job"),
    "gpus-per-node": ("N", "GPUs of each node"),
    "mem": ("SIZE", "memory of each node"),
    "time": ("TIME", "how long the job may run, as 12:00:00; default: the partition's"),
    "partition": ("NAME", "where it runs"),
    "account": ("NAME", "who pays"),
    "qos": ("NAME", "quality of service"),
    "constraint": ("FEATURES", "features that its nodes have"),
    "reservation": ("NAME", "reservation that it runs in"),
    "job-name": ("NAME", "default: phalanx"),
    "output": ("FILE", "where its output goes; default: phalanx-%%j.out"),
}
"""Of sbatch, as they are."""

_SCRIPT = """\
#!/bin/bash
{directives}

# Supervisor and front run here, on the first node; each world is a step that srun starts on all of them.
# Slurm sends USR1 {notice} s before the end: what runs may finish, what is new gets a 503, and the job is requeued.
serve=({command})

pid=
trap '[ -z "$pid" ] || kill -s USR1 "$pid"' USR1
trap '[ -z "$pid" ] || kill -s TERM "$pid"' TERM INT
trap : HUP
while true; do
    "${{serve[@]}}" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    code=$?
    # A supervisor that was killed: its worlds and its front go on for a minute, and the next one takes them over.
    [ "$code" -eq 137 ] || exit "$code"
done
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of sbatch, and all of `serve`."""
    slurm = parser.add_argument_group("the job")
    for name, (metavar, text) in _OPTIONS.items():
        slurm.add_argument(f"--{name}", metavar=metavar, help=text)
    slurm.add_argument(
        "--notice",
        metavar="SECONDS",
        type=int,
        default=120,
        help="how long before the end of its time, or before it is preempted, the job is told (default: 120)",
    )
    slurm.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="back into the queue then, and when its first node dies (default: yes)",
    )
    slurm.add_argument(
        "--sbatch",
        metavar="OPTION",
        action="append",
        default=[],
        help="any other option of sbatch, as --sbatch=--exclusive; may be given more than once",
    )
    Settings.add_arguments(parser)


def render(options: argparse.Namespace) -> str:
    """The batch script. Raises SettingsError."""
    settings = Settings.from_arguments(options)
    for name, why in (
        ("hosts", "the hosts of a Slurm job are its nodes; give --nodes and --ntasks-per-node"),
        ("mpirun", "worlds of a Slurm job are started by srun; --mpi says which MPI the ranks load"),
        (
            "api_key",
            "it would stand in the script; set PHALANX_API_KEY where sbatch is called, or --api-key-file",
        ),
    ):
        if getattr(settings, name):
            raise SettingsError(f"--{name.replace('_', '-')}: {why}")
    if options.notice < 5:
        raise SettingsError(f"--notice {options.notice}: must be 5 or more")
    given = {name: getattr(options, name.replace("-", "_")) for name in _OPTIONS}
    nodes, tasks = _shape(settings, given["nodes"], given["ntasks-per-node"])
    given |= {"nodes": nodes, "ntasks-per-node": tasks}
    given["job-name"] = given["job-name"] or "phalanx"
    given["output"] = given["output"] or "phalanx-%j.out"
    directives = [f"--{name}={value}" for name, value in given.items() if value is not None]
    directives += [f"--signal=B:USR1@{options.notice}", "--requeue" if options.requeue else "--no-requeue"]
    # The journal and the clients are on the first node: the end of another one is a fault like any other.
    directives += ["--no-kill", "--open-mode=append", *options.sbatch]
    for directive in directives:
        if not directive.startswith("-") or "\n" in directive:
            raise SettingsError(f"--sbatch {directive}: must be one option, as --sbatch=--exclusive")
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        notice=options.notice,
        command=_folded(_command(settings, options)),
    )


def _shape(settings: Settings, nodes: str | None, tasks: str | None) -> tuple[int, int]:
    """Nodes and tasks on each. Where only the nodes are given, tensor-parallel groups stay together if they can."""
    try:
        num_nodes, num_tasks = (None if text is None else int(text) for text in (nodes, tasks))
    except ValueError:
        raise SettingsError("--nodes and --ntasks-per-node: must be whole numbers") from None
    if min(num_nodes or 1, num_tasks or 1) < 1 or 0 in (num_nodes, num_tasks):
        raise SettingsError("--nodes and --ntasks-per-node: must be 1 or more")
    if num_nodes is None:
        num_nodes = 1 if num_tasks is None else -(-settings.ranks // num_tasks)
    if num_tasks is None:
        stages = -(-settings.pp // num_nodes)
        num_tasks = stages * settings.tp if settings.pp >= num_nodes else -(-settings.ranks // num_nodes)
    if num_nodes * num_tasks < settings.ranks:
        raise SettingsError(
            f"--nodes {num_nodes} --ntasks-per-node {num_tasks}: tp * pp are {settings.ranks} ranks; give more"
        )
    return num_nodes, num_tasks


def _command(settings: Settings, options: argparse.Namespace) -> list[str]:
    beside = Path(sys.executable).with_name("phalanx")
    program = [str(beside)] if beside.exists() else python_module("launcher.cli")
    command = [*program, "serve", settings.model, "--launcher", "slurm"]
    for setting in fields(Settings):
        value = getattr(options, setting.name, None)
        if value is not None and setting.name != "model" and setting.name not in _IN_ALLOCATION:
            command += _flag(setting.name, value)
    if options.config is not None:
        command += ["--config", str(options.config.absolute())]
    given = vars(options)
    if "drain_timeout" not in given:
        command += [
            "--drain-timeout",
            str(max(1, options.notice - max(2, min(DRAIN_MARGIN_S, options.notice // 4)))),
        ]
    elif settings.drain_timeout >= options.notice:
        raise SettingsError(
            f"--drain-timeout {settings.drain_timeout:g}: Slurm gives notice {options.notice} s before the end; give "
            "less, or more --notice"
        )
    else:
        command += _flag("drain_timeout", given["drain_timeout"])
    if "port" not in given:  # the node may be that of other jobs, too
        command += ["--port", "0"]
    if "zmq" not in given:
        command += ["--zmq", "tcp://127.0.0.1:*"]
    return command


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, str(value)]


def _folded(command: list[str]) -> str:
    """Quoted for the shell, an option a line."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return "\n    ".join(" ".join(line) for line in lines) + "\n"
