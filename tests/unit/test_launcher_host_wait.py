"""Waiting for hosts, with programs in place of ssh."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import host_wait
from launcher.errors import SettingsError
from launcher.host_wait import HostWait
from launcher.hosts import Host, with_own_name
from launcher.launchers import mpijob, remote_shell
from launcher.logs import EventLog
from launcher.settings import Settings


class Asked:
    """Hosts that answer once a file with their name is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wait = HostWait(self.probe, EventLog("test"))

    def probe(self, name: str) -> Sequence[str]:
        path = self.folder / name
        return ["sh", "-c", f"test -e {path} || {{ echo {name}: refused >&2; echo; exit 255; }}"]

    def until(self, names: Sequence[str], answer: bool, failed: Sequence[str] = ()) -> None:
        deadline = time.monotonic() + 20
        while True:
            assert time.monotonic() < deadline, self.wait.notice()
            if self.wait.all_answer(names, time.monotonic()) is answer and set(failed) <= set(
                self.wait.silent()
            ):
                return
            time.sleep(0.005)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setattr(host_wait, "ASK_AGAIN_S", 0.01)
    return Asked(tmp_path)


def test_hosts_are_asked_until_all_answer(asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    asked.until(["a", "b"], False, failed=["b"])
    assert asked.wait.silent() == {"b": "b: refused"}
    while asked.wait.notice() != "waiting for b (b: refused)":  # a takes its time
        asked.until(["a", "b"], False)
    assert asked.wait.waited_s(time.monotonic()) > 0
    (tmp_path / "b").touch()
    asked.until(["a", "b"], True)
    assert asked.wait.notice() is None and asked.wait.waited_s(time.monotonic()) == 0
    (tmp_path / "b").unlink()
    assert asked.wait.all_answer(["a", "b"], time.monotonic()), "nobody doubts it"
    asked.wait.doubt()
    asked.until(["a", "b"], False, failed=["b"])
    asked.until(["a"], True)  # another one takes its place


def test_a_host_that_says_nothing(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_wait, "ANSWER_TIMEOUT_S", 0.05)
    monkeypatch.setattr(asked.wait, "probe", lambda name: ["sleep", "1000"])
    asked.until(["a"], False, failed=["a"])
    assert "no answer within" in str(asked.wait.notice())
    asked.wait.close()
    monkeypatch.setattr(asked.wait, "probe", lambda name: ["/no/such/program"])
    asked.until(["a"], False, failed=["a"])
    assert "/no/such/program" in str(asked.wait.notice())


def test_how_a_host_is_asked() -> None:
    assert remote_shell.probe({}, "there")[0] == "ssh" and remote_shell.probe({}, "there")[-2:] == [
        "there",
        "true",
    ]
    other = remote_shell.probe({}, "there", "phalanx", 2222)
    assert other[-6:] == ["-l", "phalanx", "-p", "2222", "there", "true"]
    given = {"PRTE_MCA_plm_ssh_agent": "/x/agent -q"}
    assert remote_shell.probe(given, "there") == ["/x/agent", "-q", "there", "true"]
    assert remote_shell.open_mpi_arguments(given) is None
    arguments = remote_shell.open_mpi_arguments({"OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10"})
    assert arguments is not None and arguments.startswith("-o ConnectionAttempts=10 -o BatchMode=yes")


def test_an_mpijob_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "job-launcher")
    path = tmp_path / "hostfile"
    log = EventLog("test")
    launcher = {"K_MPI_JOB_ROLE": "launcher"}
    settings = Settings(model="m", tp=2)
    assert mpijob.complete(settings, launcher, log, path) == settings, "no host file"
    path.write_text("job-launcher.job.space.svc slots=1\njob-worker-0.job.space.svc slots=1\n")
    assert mpijob.complete(settings, {}, log, path) == settings
    assert mpijob.complete(settings, {"K_MPI_JOB_ROLE": "worker"}, log, path) == settings
    found = mpijob.complete(settings, launcher, log, path)
    assert (found.hosts, found.wait_for_hosts) == (str(path), math.inf)
    bounded = mpijob.complete(Settings(model="m", tp=2, wait_for_hosts=5.0), launcher, log, path)
    assert bounded.wait_for_hosts == 5.0
    own = Settings(model="m", tp=2, hosts="a:2")
    assert mpijob.complete(own, launcher, log, path) == own
    with pytest.raises(SettingsError, match="slots"):
        mpijob.complete(Settings(model="m", tp=3), launcher, log, path)
    path.write_text("job-worker-0.job.space.svc:2\n")
    with pytest.raises(SettingsError, match="runLauncherAsWorker"):
        mpijob.complete(settings, launcher, log, path)


def test_the_first_host_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "one.here")
    for name in ("one", "one.here", "one.job.space.svc"):
        assert with_own_name([Host(name, 2), Host("one.other", 1)]) == (
            Host("one.here", 2),
            Host("one.other", 1),
        )
    for name in ("10.0.0.1", "two", "ones"):
        assert with_own_name([Host(name, 2)]) == (Host(name, 2),)
    assert with_own_name([]) == ()
