"""A deployment as a Slurm job: what the allocation makes of its settings, the file that says where it serves, and its
way back into the queue. Used by `serve` and `status`; what starts worlds in the job is launcher.launchers.slurm."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from gateway.control_messages import FrontState
from launcher.errors import LauncherError, SettingsError
from launcher.hosts import Host
from launcher.launchers.mpirun import Mpirun, find_mpirun, flavor_named
from launcher.launchers.slurm import Allocation, SlurmLauncher, ask, check_plugin, fields_of, read_allocation
from launcher.logs import EventLog
from launcher.network import Interface
from launcher.processes import host_name
from launcher.settings import Settings, default_run_dir

COMMENT = "phalanx"
"""First word of the job's comment, which `squeue --format "%i %k"` shows; the second is the HTTP address."""


def job_run_dir(job_id: str) -> Path:
    """Where a job keeps its run folder if nobody says otherwise: the same one when it is requeued."""
    return default_run_dir(0).with_name(f"slurm-{job_id}")


def endpoint_file(run_dir: Path, job_id: str) -> Path:
    """Where clients find a job: JSON, there while it serves."""
    return run_dir / f"slurm-{job_id}.json"


@dataclass(frozen=True)
class SlurmJob:
    """The job that this supervisor runs in."""

    allocation: Allocation
    mpirun: Mpirun
    """Stands for the MPI; worlds are started by srun."""
    plugin: str
    """Of srun, for this MPI."""
    has_gpus: bool

    @classmethod
    def find(cls, settings: Settings, environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """None unless the settings ask for it. Raises LauncherError if this is no job, or one that cannot do it."""
        if settings.launcher != "slurm":
            return None
        allocation = read_allocation(environment)
        flavor = flavor_named(settings.mpi)
        mpirun = Mpirun(Path("srun"), flavor, "") if flavor is not None else find_mpirun(settings.mpirun)
        has_gpus = any(environment.get(name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"))
        return cls(allocation, mpirun, check_plugin(mpirun.flavor), has_gpus)

    def launcher(self, interface: Interface | None) -> SlurmLauncher:
        """What starts the worlds."""
        return SlurmLauncher(self.mpirun, self.plugin, self.allocation.cpus, self.has_gpus, interface)

    def complete(self, settings: Settings) -> Settings:
        """With the job's hosts and run folder. Raises SettingsError if the world does not fit into the job."""
        if settings.hosts:
            raise SettingsError("--hosts goes with --launcher mpirun; the hosts of a Slurm job are its nodes")
        hosts = self.allocation.hosts
        tasks = sum(host.slots for host in hosts)
        if tasks < settings.ranks:
            raise SettingsError(
                f"tp * pp are {settings.ranks} ranks, and the job has {tasks} tasks on {len(hosts)} nodes; ask for "
                "more with --nodes and --ntasks-per-node of sbatch, as `phalanx slurm render` does"
            )
        names = ",".join(f"{host.name}:{host.slots}" for host in hosts)
        run_dir = settings.run_dir or job_run_dir(self.allocation.job_id)
        return replace(settings, hosts=names, run_dir=run_dir)

    def reachable_hosts(self) -> list[Host]:
        """The hosts by the addresses at which Slurm reaches them."""
        addresses = self.allocation.addresses
        return [Host(addresses.get(host.name, host.name), host.slots) for host in self.allocation.hosts]

    @property
    def node(self) -> str:
        """Where supervisor and front run."""
        return self.allocation.hosts[0].name

    @property
    def address(self) -> str:
        """The same, for clients of other machines."""
        return self.reachable_hosts()[0].name

    def publish(self, run_dir: Path, url: str, model: str, state: FrontState, log: EventLog) -> None:
        """Says where the job serves: in a file of the run folder, and in the job's comment if nobody else has one."""
        node = self.node
        path = endpoint_file(run_dir, self.allocation.job_id)
        content = {
            "job_id": self.allocation.job_id,
            "node": node,
            "url": url,
            "zmq": state.zmq,
            "grpc": state.grpc,
            "model": model,
            "run_dir": str(run_dir),
        }
        try:
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.rename(path)
        except OSError as error:
            log.warning("endpoint file not written", path=path, detail=str(error))
        if not self.allocation.comment or self.allocation.comment.split()[0] == COMMENT:
            # In a thread: the controller may be slow, and worlds are watched meanwhile.
            threading.Thread(target=self._comment, args=(f"{COMMENT} {url}",), daemon=True).start()

    def _comment(self, text: str) -> None:
        with contextlib.suppress(LauncherError):
            ask("scontrol", "update", f"JobId={self.allocation.job_id}", f"Comment={text}")

    def retire(self, run_dir: Path) -> None:
        """Nothing is served any more."""
        with contextlib.suppress(OSError):
            endpoint_file(run_dir, self.allocation.job_id).unlink()

    def requeue(self, log: EventLog) -> None:
        """Back into the queue, if the job may go there: its next run takes up what is unfinished in the journal."""
        if not self.allocation.may_be_requeued:
            log.warning(
                "the job is not requeued: it was submitted without --requeue", job=self.allocation.job_id
            )
            return
        try:
            ask("scontrol", "requeue", self.allocation.job_id)
        except LauncherError as error:
            log.error("the job could not be requeued", job=self.allocation.job_id, detail=str(error))
        else:
            log.info("requeued", job=self.allocation.job_id)


def find_endpoint(job_id: str, run_dir: Path | None) -> str:
    """HTTP address of a job. Raises LauncherError, which says what the job does instead of serving, or how to reach
    it."""
    path = endpoint_file(run_dir or job_run_dir(job_id), job_id)
    try:
        content = json.loads(path.read_text())
        url, node = str(content["url"]), str(content["node"])
    except (OSError, ValueError, KeyError):
        url, node = _of_comment(job_id)
    host = urlsplit(url).hostname or ""
    if _is_loopback(host) and node not in (host_name(), os.environ.get("SLURMD_NODENAME"), ""):
        raise LauncherError(
            f"job {job_id} serves at {url} of {node}, for clients there alone; ask there (`srun --jobid={job_id} "
            f"--overlap --nodes=1 --ntasks=1 --nodelist={node} phalanx status --job {job_id}`), or serve with "
            "--host 0.0.0.0"
        )
    return url


def _of_comment(job_id: str) -> tuple[str, str]:
    job = fields_of(ask("scontrol", "--oneliner", "show", "job", job_id))
    words = job.get("Comment", "").split()
    state = job.get("JobState", "unknown")
    if state != "RUNNING" or words[:1] != [COMMENT] or len(words) != 2:
        reason = job.get("Reason", "None")
        why = f" ({reason})" if reason != "None" else ""
        doing = "starts, or is none of phalanx" if state == "RUNNING" else f"is {state}{why}"
        raise LauncherError(f"job {job_id} serves nothing now: it {doing}; see its output file")
    return words[1], job.get("BatchHost", "")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
