"""The program by which mpirun reaches other hosts, and how it is asked whether one answers: argv, nothing else. Used
where hosts are waited for, and for mpirun's environment; it starts nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

CONNECT_TIMEOUT_S = 10
"""ssh alone waits two minutes for an address that nobody has any more, as that of a pod that was replaced."""

_AGENTS = (
    "PRTE_MCA_plm_ssh_agent",
    "PRTE_MCA_plm_rsh_agent",
    "HYDRA_LAUNCHER_EXEC",
    "I_MPI_HYDRA_BOOTSTRAP_EXEC",
)
_OPERATORS_ARGUMENTS = "OMPI_MCA_plm_rsh_args"
"""What the MPI Operator sets for Open MPI 4, and Open MPI 5 does not read."""


def agent(environment: Mapping[str, str]) -> list[str]:
    """The program that was named in place of ssh; else ssh."""
    named = next((environment[name] for name in _AGENTS if environment.get(name)), "ssh")
    return shlex.split(named)


def probe(environment: Mapping[str, str], host: str, user: str = "", port: int | None = None) -> list[str]:
    """A command that ends with 0 where commands can be started on that host. `user` and `port` are for ssh."""
    command = agent(environment)
    if command == ["ssh"]:
        command += ["-n", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=3", "-o", "LogLevel=ERROR"]
        command += ["-l", user] if user else []
        command += ["-p", str(port)] if port is not None else []
    return [*command, host, "true"]


def open_mpi_arguments(environment: Mapping[str, str]) -> str | None:
    """For Open MPI's ssh (PRTE_MCA_plm_ssh_args); None where another program takes its place."""
    if agent(environment) != ["ssh"]:
        return None
    given = environment.get(_OPERATORS_ARGUMENTS, "")
    return f"{given} -o BatchMode=yes -o ConnectTimeout={CONNECT_TIMEOUT_S}".strip()
