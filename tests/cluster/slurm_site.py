"""A Slurm site on one machine: one slurmctld, one slurmd on each host of namespaces, munge with a key of its own. All
of it lives in a folder and in the hosts' namespaces; the machine's own Slurm, if there is one, is never touched."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.namespaces import Cluster, cluster
from tests.cluster.namespaces import why_not as no_namespaces
from tests.recovery.run_processes import end_with_parent

NODES = ("n1", "n2")
CPUS = 8
"""That each node says it has: more ranks than the machine has cores are to fit."""
_CONTROLLER_PORT, _NODE_PORT = 6817, 6818  # of networks that only the test has
_PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib")
_PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge libpmix2"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why this machine cannot have a Slurm site; None if it can."""
    missing = [name for name in ("slurmctld", "slurmd", "srun", "munged") if not _program(name)]
    if missing:
        return f"needs {', '.join(missing)} ({_PACKAGES})"
    if not list(_PMIX.glob("libpmix.so.*")):
        return f"needs libpmix2 ({_PACKAGES})"
    return no_namespaces()


def _program(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


class Site:
    """A controller and NODES, each on a host of its own; commands run on the first host."""

    def __init__(self, hosts: Cluster, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._make_folders()
        self._write_config()
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        """For every command of Slurm."""

    def start(self) -> None:
        """Returns when both nodes take jobs."""
        folder = self.folder
        munged = [
            "--foreground",
            "--force",
            "--key-file",
            folder / "munge.key",
            "--socket",
            folder / "munge.socket",
        ]
        munged += ["--pid-file", folder / "munged.pid", "--seed-file", folder / "munged.seed"]
        self._start("munged", munged, [])
        self._wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", [], self._on_first(f"exec {_program('slurmctld')} -D -c"))
        for number, node in enumerate(NODES, 1):
            self.start_node(number, node)
        self._wait(self._is_up, "the nodes")

    def _make_folders(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        library = self.folder / "pmix"
        shutil.copytree(_PMIX, library, symlinks=True)
        with_name = library / "libpmix.so"  # under which the plugin opens it
        if not with_name.exists():
            with_name.symlink_to("libpmix.so.2")
        for name in ("state", "tmp", *(f"{what}-{node}" for node in NODES for what in ("spool", "tmp"))):
            (self.folder / name).mkdir()

    def _write_config(self) -> None:
        folder = self.folder
        lines = [
            "ClusterName=phalanx",
            f"SlurmctldHost=n1({self.hosts.names[0]})",
            f"SlurmctldPort={_CONTROLLER_PORT}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            "CredType=cred/munge",
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"TmpFS={folder}/tmp",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "MpiDefault=none",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=10",
            "MinJobAge=300",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "DebugFlags=NO_CONF_HASH",
        ]
        for node, address in zip(NODES, self.hosts.names, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={_NODE_PORT} CPUs={CPUS} State=UNKNOWN"
            )
        names = ",".join(NODES)
        lines.append(f"PartitionName=work Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1")
        lines.append(f"PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=9")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def start_node(self, number: int, node: str) -> None:
        """slurmd of a node, with the library that PMIx wants and a folder for temporary files of its own."""
        folder = self.folder
        # MPI looks networks up in /sys, which shows those of whoever has mounted it.
        mounts = f"mount -t sysfs sysfs /sys && mount --bind {folder}/pmix {_PMIX}"
        mounts += f" && mount --bind {folder}/tmp-{node} {folder}/tmp"
        script = f"{mounts} && exec {_program('slurmd')} -D -N {node}"
        if number == 1:
            command = self._on_first(script)
        else:
            command = [
                "nsenter",
                "--target",
                str(self.hosts.pid(number)),
                "--all",
                "unshare",
                "--mount",
                "--uts",
            ]
            command += ["sh", "-c", f"hostname {node} && {script}"]
        self._start(f"slurmd-{node}", [], command)

    def _on_first(self, script: str) -> list[str]:
        return [
            *self.hosts.prefix,
            "unshare",
            "--mount",
            "--uts",
            "sh",
            "-c",
            f"hostname {NODES[0]} && {script}",
        ]

    def _start(self, name: str, arguments: Sequence[str | Path], prefix: Sequence[str]) -> None:
        program = _program(name)
        command = [*prefix, *([program] if program else []), *map(str, arguments)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=end_with_parent,
                )
            )

    def _wait(self, is_so: Any, what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            ended = any(process.poll() is not None for process in self._started)
            assert not ended and time.monotonic() < deadline, f"{what} did not come up: {self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(
            f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    def _is_up(self) -> bool:
        answer = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return sorted(set(answer.split("\n"))) == ["", *(f"{node} idle" for node in NODES)]

    def run(
        self,
        *command: str,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> str:
        """A command of Slurm on the first host; what it printed."""
        done = subprocess.run(
            [*self.hosts.prefix, *command],
            env=self.environment if environment is None else environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def close(self) -> None:
        """Ends all jobs, then the daemons."""
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 30.0
        while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def slurm_site(folder: Path) -> Iterator[Site]:
    with cluster(len(NODES), folder) as hosts:
        site = Site(hosts, folder)
        try:
            site.start()
            yield site
        finally:
            site.close()
