"""`--hosts` in the dialects of Open MPI, MPICH and Intel MPI, read and written."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import LauncherError, SettingsError
from launcher.host_list import Host, parse_hosts
from launcher.launchers.host_file import host_file
from launcher.launchers.mpirun import Flavor

OPEN_MPI = """\
# rack 1
node-1.cluster slots=4 max_slots=8   // the one with the disk
node-2.cluster   slots = 2 username=serve port=2222
/* not yet
node-9 slots=4
*/
serve@10.0.0.3 max-slots=2

node-4
node-4
"""
HYDRA = """\
# rack 1
node-1.cluster:4   binding=user:0,1,4,5

node-2.cluster:2 user=serve
10.0.0.3:2 # the old one
node-4
node-4:1
"""


def read(text: str, folder: Path) -> tuple[Host, ...]:
    path = folder / "hosts"
    path.write_text(text)
    return parse_hosts(str(path))


def test_open_mpis_dialect(tmp_path: Path) -> None:
    assert read(OPEN_MPI, tmp_path) == (
        Host("node-1.cluster", 4),
        Host("node-2.cluster", 2, user="serve", port=2222),
        Host("10.0.0.3", 2, user="serve"),
        Host("node-4", 2),
    )


def test_the_dialect_of_mpich_and_intel_mpi(tmp_path: Path) -> None:
    assert read(HYDRA, tmp_path) == (
        Host("node-1.cluster", 4, binding="user:0,1,4,5"),
        Host("node-2.cluster", 2, user="serve"),
        Host("10.0.0.3", 2),
        Host("node-4", 2),
    )


@pytest.mark.parametrize("text", ["[fd00::5]:2,b:1", "[fd00::5] slots=2\nb\n", "fd00::5 slots=2\nb:1\n"])
def test_ipv6(text: str, tmp_path: Path) -> None:
    hosts = read(text, tmp_path) if "\n" in text else parse_hosts(text)
    assert hosts == (Host("fd00::5", 2), Host("b", 1))


def test_each_mpi_gets_its_own_dialect() -> None:
    hosts = (Host("a", 4), Host("b.cluster", 1, user="serve"))
    assert host_file(Flavor.OPEN_MPI, hosts) == "a slots=4\nb.cluster slots=1 username=serve\n"
    assert host_file(Flavor.MPICH, hosts) == "a:4\nb.cluster:1 user=serve\n"
    assert host_file(Flavor.INTEL, hosts) == "a:4\nb.cluster:1 user=serve\n"
    bound = (Host("a", 2, binding="user:0,1"),)
    assert host_file(Flavor.MPICH, bound) == "a:2 binding=user:0,1\n"
    assert host_file(Flavor.INTEL, bound) == "a:2\n", "it has no such word"
    assert host_file(Flavor.OPEN_MPI, (Host("fd00::5", 2, port=2222),)) == "fd00::5 slots=2 port=2222\n"


@pytest.mark.parametrize("flavor", [Flavor.OPEN_MPI, Flavor.MPICH, Flavor.INTEL])
def test_what_is_written_is_read_as_it_was(flavor: Flavor, tmp_path: Path) -> None:
    hosts = (Host("a", 4), Host("10.0.0.2", 1, user="serve"))
    assert read(host_file(flavor, hosts), tmp_path) == hosts


@pytest.mark.parametrize(
    ("host", "remedy"), [(Host("fd00::5", 1), "/etc/hosts"), (Host("a", 1, port=22), r"~/\.ssh/config")]
)
def test_what_hydra_cannot_name(host: Host, remedy: str) -> None:
    for flavor in (Flavor.MPICH, Flavor.INTEL):
        with pytest.raises(LauncherError, match=remedy):
            host_file(flavor, (host,))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("a slots=two", "slots=two must be a whole number"),
        ("a slots=4 max_slots=2", "more slots than max_slots"),
        ("a slots=1 slots=2", "given twice"),
        ("a:2 slots=2", "number of slots already"),
        ("a slots=0", "no slot"),
        ("a boards=2", "cannot read 'boards=2'"),
        ("^a", "names no host by itself"),
        ("+n1", "names no host by itself"),
        ("[fd00::zz]:2", "IPv6 address in brackets"),
        ("a:1:2", "cannot read 'a:1:2'"),
        ("a user=x\na user=y", "line 2: a has user=x and user=y"),
        ("# nothing", "names no host"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(line: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--hosts") as caught:
        read(line + "\n", tmp_path)
    assert what in str(caught.value)


@pytest.mark.parametrize("text", ["no/such/file", "hosts.txt", "/etc/hostfile"])
def test_a_file_that_is_missing_is_no_host(text: str) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        parse_hosts(text)
