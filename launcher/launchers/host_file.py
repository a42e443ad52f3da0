"""The host file of a world, in the dialect of the MPI that reads it. Called where a world is started; every number of
slots is that of the ranks that are to run there, so that no MPI has a choice."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from launcher.errors import LauncherError
from launcher.host_list import Host
from launcher.launchers.flavors import Flavor


def host_file(flavor: Flavor, hosts: Sequence[Host]) -> str:
    """Its content. Raises LauncherError for a host that this MPI cannot name."""
    line = _open_mpi if flavor is Flavor.OPEN_MPI else _mpich if flavor is Flavor.MPICH else _intel
    return "".join(f"{line(host)}\n" for host in hosts)


def _open_mpi(host: Host) -> str:
    words = [host.name, f"slots={host.slots}"]
    if host.user:
        words.append(f"username={host.user}")
    if host.port is not None:
        words.append(f"port={host.port}")
    return " ".join(words)


def _mpich(host: Host) -> str:
    words = [_hydra(host, "MPICH")]
    if host.user:
        words.append(f"user={host.user}")
    if host.binding:
        words.append(f"binding={host.binding}")
    return " ".join(words)


def _intel(host: Host) -> str:
    words = [_hydra(host, "Intel MPI")]
    if host.user:
        words.append(f"user={host.user}")
    return " ".join(words)


def _hydra(host: Host, mpi: str) -> str:
    """Hydra cuts a name at its first colon, and leaves the port to ssh."""
    if ":" in host.name and ipaddress.ip_address(host.name).version == 6:
        raise LauncherError(
            f"--hosts: {mpi} reads no IPv6 addresses ({host.name}); give this host a name in /etc/hosts or DNS"
        )
    if host.port is not None:
        raise LauncherError(
            f"--hosts: {mpi} takes no port (port={host.port} of {host.name}); write it into ~/.ssh/config"
        )
    return f"{host.name}:{host.slots}"
