"""How the supervisor's keys and addresses reach the guards of a world, and how a guard knows its rank. Used by
both; keys never stand on a command line, nor in what a rank inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq

from launcher.leases import ADOPTION_WAIT_S
from launcher.processes import ProcessId, host_id

PREFIX = "PHALANX_GUARD_"
"""Of the variables; a guard takes them out of what its rank inherits."""

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class GuardEnvironment:
    """What the supervisor hands to every guard of a world, through the environment."""

    endpoint: str
    """Where the supervisor's ROUTER listens."""
    server_key: str
    public_key: str
    secret_key: str
    """CURVE keys, Z85: the supervisor's public one, and the pair of this run's guards."""
    supervisor: ProcessId
    supervisor_host_id: str
    world_dir: Path
    """For the ranks' output."""
    shm_dir: Path
    """The world's shared-memory folder."""
    remote_endpoint: str = ""
    """The same for guards on other hosts; empty if there are none."""
    adoption_wait_s: float = ADOPTION_WAIT_S
    """How long the guard waits for the next supervisor when this one has ended."""

    def to_environment(self) -> dict[str, str]:
        """The variables; from_environment is the inverse."""
        return {
            f"{PREFIX}ENDPOINT": self.endpoint,
            f"{PREFIX}REMOTE_ENDPOINT": self.remote_endpoint,
            f"{PREFIX}SERVER_KEY": self.server_key,
            f"{PREFIX}PUBLIC_KEY": self.public_key,
            f"{PREFIX}SECRET_KEY": self.secret_key,
            f"{PREFIX}SUPERVISOR": f"{self.supervisor.pid} {self.supervisor.start} {self.supervisor_host_id}",
            f"{PREFIX}WORLD_DIR": str(self.world_dir),
            f"{PREFIX}SHM_DIR": str(self.shm_dir),
            f"{PREFIX}ADOPTION_WAIT_S": f"{self.adoption_wait_s:g}",
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> GuardEnvironment:
        """Raises KeyError or ValueError for what is missing or malformed."""
        pid, start, supervisor_host_id = environment[f"{PREFIX}SUPERVISOR"].split(" ", 2)
        return cls(
            endpoint=environment[f"{PREFIX}ENDPOINT"],
            server_key=environment[f"{PREFIX}SERVER_KEY"],
            public_key=environment[f"{PREFIX}PUBLIC_KEY"],
            secret_key=environment[f"{PREFIX}SECRET_KEY"],
            supervisor=ProcessId(int(pid), int(start)),
            supervisor_host_id=supervisor_host_id,
            world_dir=Path(environment[f"{PREFIX}WORLD_DIR"]),
            shm_dir=Path(environment[f"{PREFIX}SHM_DIR"]),
            remote_endpoint=environment.get(f"{PREFIX}REMOTE_ENDPOINT", ""),
            adoption_wait_s=float(environment[f"{PREFIX}ADOPTION_WAIT_S"]),
        )


def rank_of_environment(environment: Mapping[str, str]) -> int:
    """The rank that the MPI launcher gave this process; 0 without one."""
    for variable in _RANK_VARIABLES:
        if variable in environment:
            return int(environment[variable])
    return 0


def connect(environment: GuardEnvironment, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A guard's link to the supervisor."""
    link = context.socket(zmq.DEALER)
    link.curve_serverkey = environment.server_key.encode()
    link.curve_publickey = environment.public_key.encode()
    link.curve_secretkey = environment.secret_key.encode()
    link.linger = 500  # ms: time for the last word to leave
    link.sndhwm = 256
    link.set(zmq.RECONNECT_IVL, 20)
    link.set(zmq.IMMEDIATE, 1)  # without a supervisor nothing queues up for the next one
    here = environment.supervisor_host_id == host_id()
    link.connect(environment.endpoint if here else environment.remote_endpoint)
    return link
