"""How a world is started inside a Slurm allocation: each one is a step of the job, begun by `srun`. Argv and
environment for the supervisor, the allocation for `serve`; must start nothing except questions to Slurm."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError
from launcher.host_list import Host
from launcher.launchers import mpirun
from launcher.launchers.mpirun import Flavor, Mpirun
from launcher.network import Interface

_ANSWER_S = 30.0
"""How long Slurm may take to answer; a busy controller takes seconds."""

_PLUGINS = {Flavor.OPEN_MPI: "pmix", Flavor.MPICH: "pmi2", Flavor.INTEL: "pmi2"}
"""How each MPI learns of its world from srun; the other pairs fail, or start worlds of one rank each."""

_OF_THE_STEP_AROUND = re.compile(
    r"PMI_|PMI2_|PMIX_|OMPI_COMM_|SLURM_(STEP|STEPID|SRUN|PROCID|LOCALID|GTIDS|NTASKS|NPROCS|TASK|DISTRIBUTION|"
    r"HOSTFILE|CPU_BIND|CPUS_PER_TASK|TRES_PER_TASK|MEM_|HINT|MPI_TYPE|EXACT|EXCLUSIVE|OVERLAP|KILL_BAD_EXIT|"
    r"THREADS_PER_CORE|NO_KILL|WAIT|UMASK|GPU_BIND|EXPORT_ENV|LABELIO)"
)
"""Beginnings of variables that describe the supervisor's own step, or that srun takes for options: what a world's
step is to be stands on its command line alone."""


@dataclass(frozen=True)
class Allocation:
    """What the job has."""

    job_id: str
    hosts: tuple[Host, ...]
    """The supervisor's own first; slots: the job's tasks on each."""
    cpus: Mapping[str, int]
    """By the host's name."""
    addresses: Mapping[str, str]
    """By the host's name: where Slurm reaches it. What it calls a node need not be a name elsewhere."""
    may_be_requeued: bool
    comment: str
    """That of the job; anybody may have set it."""


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """From the variables of a batch script, and what `scontrol` says. Raises LauncherError, which says what to do."""
    job_id = environment.get("SLURM_JOB_ID")
    if not job_id:
        raise LauncherError(
            "--launcher slurm: this is no Slurm job (SLURM_JOB_ID is not set); submit what `phalanx slurm render` "
            "prints with sbatch"
        )
    own = environment.get("SLURMD_NODENAME", "")
    node_list = environment.get("SLURM_JOB_NODELIST", "")
    names = ask("scontrol", "show", "hostnames", node_list).split()
    if not names or own != names[0]:
        first = names[0] if names else "unknown"
        raise LauncherError(
            f"--launcher slurm: the supervisor has to run on the job's first node ({first}), not on "
            f"{own or 'a machine outside of the job'}; start it from the batch script"
        )
    tasks = expand(environment.get("SLURM_TASKS_PER_NODE", ""))
    cpus = expand(environment.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if len(tasks) != len(names) or len(cpus) != len(names):
        raise LauncherError(
            "--launcher slurm: SLURM_TASKS_PER_NODE and SLURM_JOB_CPUS_PER_NODE do not say how many tasks and CPUs "
            f"each of the {len(names)} nodes has; start it from the batch script, not from a step of the job"
        )
    job = fields_of(ask("scontrol", "--oneliner", "show", "job", job_id))
    nodes = map(fields_of, ask("scontrol", "--oneliner", "show", "node", node_list).splitlines())
    addresses = {
        node["NodeName"]: node.get("NodeAddr", node["NodeName"]) for node in nodes if "NodeName" in node
    }
    return Allocation(
        job_id,
        tuple(Host(name, count) for name, count in zip(names, tasks, strict=True)),
        dict(zip(names, cpus, strict=True)),
        addresses,
        job.get("Requeue") == "1",
        job.get("Comment", ""),
    )


def expand(counts: str) -> list[int]:
    """`2(x3),1` as Slurm writes it: 2, 2, 2, 1. Empty for what cannot be read."""
    numbers = []
    for part in filter(None, counts.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


def fields_of(line: str) -> dict[str, str]:
    """`Name=value Name=value`, as `scontrol --oneliner` prints."""
    starts = list(re.finditer(r"(?:^|\s)([A-Z][\w:/]*)=", line))
    ends = [*(start.start() for start in starts[1:]), len(line)]
    return {start[1]: line[start.end() : end].strip() for start, end in zip(starts, ends, strict=True)}


def ask(*command: str) -> str:
    """What a command of Slurm prints. Raises LauncherError."""
    if shutil.which(command[0]) is None:
        raise LauncherError(
            f"--launcher slurm: there is no {command[0]} on PATH; it belongs to Slurm's client commands"
        )
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_S, check=True
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or f"exit code {error.returncode}").splitlines()[
            -1
        ]
        raise LauncherError(f"`{' '.join(command)}` failed: {said}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(
            f"`{' '.join(command)}` does not answer ({error}); is the controller up?"
        ) from None
    return done.stdout + done.stderr  # srun lists its plugins on standard error


def check_plugin(flavor: Flavor) -> str:
    """The plugin of srun for this MPI. Raises LauncherError if this Slurm has it not."""
    wanted = _PLUGINS[flavor]
    known = set(re.findall(r"\w+", ask("srun", "--mpi=list")))
    if wanted in known:
        return wanted
    listed = ", ".join(sorted(known & {"pmi2", "pmix", "cray_shasta"})) or "none"
    other = "--mpi mpich" if wanted == "pmix" else "--mpi openmpi"
    raise LauncherError(
        f"{flavor.value} needs srun's plugin {wanted}, and this Slurm has: {listed} (`srun --mpi=list`); have it "
        f"installed (Slurm built with PMIx, libpmix), or start worlds with another MPI ({other})"
    )


@dataclass(frozen=True)
class SlurmLauncher:
    """Worlds started by `srun` (see launcher.launchers.Launcher)."""

    mpirun: Mpirun
    plugin: str
    cpus: Mapping[str, int]
    """Of the job, by host."""
    has_gpus: bool = False
    interface: Interface | None = None
    program: str = "srun"
    end_signal: signal.Signals = signal.SIGTERM
    """srun then ends its step; of one that is killed, slurmd has to find that out."""
    end_grace_s: float = 1.0
    has_ranks_in_session: bool = False

    def host_file(self, hosts: Sequence[Host]) -> str:
        """A line a rank: rank N runs on the host in line N."""
        return "".join(f"{host.name}\n" * host.slots for host in hosts)

    def environment(
        self,
        ranks: int,
        cores: int,
        shm_dir: Path,
        session_dir: Path,
        base: Mapping[str, str],
        several_hosts: bool,
    ) -> dict[str, str]:
        variables = mpirun.environment(
            self.mpirun, ranks, cores, shm_dir, session_dir, base, several_hosts, self.interface
        )
        if several_hosts:  # the folder of one host is nothing for the others
            variables.pop("TMPDIR")
            if "TMPDIR" in base:
                variables["TMPDIR"] = base["TMPDIR"]
        if self.mpirun.flavor is Flavor.MPICH:
            # Slurm's plugin reads lines of 1023 characters at most, and MPICH writes an address of UCX into one.
            variables.setdefault("UCX_ADDRESS_VERSION", "v2")
        return {name: value for name, value in variables.items() if not _OF_THE_STEP_AROUND.match(name)}

    def probe(self, environment: Mapping[str, str], host: Host) -> list[str]:
        step = (self.program, "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", "--mem=0")
        return [*step, "--mpi=none", "--input=none", "--quiet", "true"]

    def argv(
        self,
        hosts: Sequence[Host],
        ranks: int,
        command: Sequence[str],
        host_file: Path | None,
        names: Mapping[str, str],
    ) -> list[str]:
        assert host_file is not None  # an allocation always has hosts
        cpus_per_rank = min((self.cpus.get(host.name, 1) // max(1, host.slots) for host in hosts), default=1)
        return [
            *(self.program, f"--mpi={self.plugin}", f"--ntasks={ranks}"),
            *("--distribution=arbitrary", f"--nodelist={host_file}"),
            # Worlds share the job's resources with each other and with the front: a spare is a step beside the one
            # that serves, and the next world starts while the last one is still being cleaned up.
            *("--overlap", "--exact", f"--cpus-per-task={max(1, cpus_per_rank)}", "--mem=0"),
            "--cpu-bind=none",
            *(["--gpu-bind=none"] if self.has_gpus else []),
            *("--kill-on-bad-exit=1", "--export=ALL", "--input=none", "--quiet", "--job-name=world"),
            *command,
        ]
