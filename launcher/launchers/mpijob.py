"""What a supervisor finds around it in the launcher pod of an MPIJob (kubeflow.org/v2beta1), as the MPI Operator sets
it up. Called by `serve`; reads the environment and the operator's host file, and starts nothing."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import SettingsError
from launcher.hosts import Host, parse_hosts
from launcher.logs import EventLog
from launcher.settings import Settings

ROLE_VARIABLE = "K_MPI_JOB_ROLE"
HOST_FILE = Path("/etc/mpi/hostfile")
"""Where the operator mounts it: the launcher first, if it is to have ranks, then the workers."""


def complete(
    settings: Settings, environment: Mapping[str, str], log: EventLog, path: Path = HOST_FILE
) -> Settings:
    """In the launcher pod of an MPIJob, with the hosts that the operator names where the user names none, and a wait
    for them without end: whoever gives up there only spends the Job's back-off. Elsewhere as they are. Raises
    SettingsError."""
    if environment.get(ROLE_VARIABLE) != "launcher" or settings.hosts or not path.is_file():
        return settings
    hosts = parse_hosts(str(path))
    check_launcher_has_ranks(hosts)
    wait_s = settings.wait_for_hosts if settings.wait_for_hosts is not None else math.inf
    names = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    log.info("in an MPIJob", hosts=names, host_file=path, wait_for_hosts_s=wait_s)
    if settings.host == "127.0.0.1":
        log.warning("HTTP listens inside this pod only; Services and probes need --host 0.0.0.0")
    return replace(settings, hosts=str(path), wait_for_hosts=wait_s)


def check_launcher_has_ranks(hosts: Sequence[Host], own_name: str | None = None) -> None:
    """Raises SettingsError if the operator left this pod out of the host file: rank 0 runs beside the supervisor."""
    own_name = own_name or socket.gethostname()
    if hosts[0].name.partition(".")[0] != own_name.partition(".")[0]:
        raise SettingsError(
            f"the MPIJob's host file begins with {hosts[0].name}, not with this pod ({own_name}), where rank 0 has "
            "to run; set spec.runLauncherAsWorker: true"
        )
