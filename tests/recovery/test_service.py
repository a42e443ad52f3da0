"""The files in packaging/, as docs/bare-metal.md has them installed: a served model tells systemd when it is ready
and when it stops, its logs are cut by logrotate, and the unit is installed and enabled under another root. Nothing is
installed on this machine."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.docs_pages import ROOT, commands, files
from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "bare-metal.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def rotate(folder: Path, run_dir: Path) -> None:
    """As logrotate would with our file: for this run folder, whatever the size, by this user."""
    lines = (ROOT / "packaging" / "phalanx.logrotate").read_text().splitlines()
    kept = [line for line in lines if not line.strip().startswith(("su ", "size "))]
    text = "\n".join(kept).replace("/var/lib/phalanx/*", str(run_dir)) + "\n"
    (folder / "rotate.conf").write_text(text)
    (folder / "rotate.conf").chmod(0o644)
    command = ["logrotate", "--force", "--state", str(folder / "state"), str(folder / "rotate.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr


def test_systemd_hears_of_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30.0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        with Served(str(model), tmp_path / "run", "--kv-cache-memory", "16MiB", "--spare", "none") as served:
            assert manager.recv(1000).startswith(b"READY=1\nSTATUS=serving ")
            assert {manager.recv(1000) for _ in range(2)} == {b"WATCHDOG=1"}, "it turns"
            assert served.stop() == 0
        heard = b""
        while heard != b"STOPPING=1":
            heard = manager.recv(1000)


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="needs logrotate")
def test_logs_are_cut_under_those_who_write(model: Path, tmp_path: Path) -> None:
    with Served(str(model), tmp_path / "run", "--kv-cache-memory", "16MiB", "--spare", "none") as served:
        world = served.active_world()
        log = tmp_path / "run" / "supervisor.log"
        with log.open("a") as lines:
            lines.write("x" * 4096 + "\n")
        rotate(tmp_path, tmp_path / "run")
        assert log.stat().st_size == 0
        psutil.Process(world["ranks"][0]["pid"]).kill()
        served.active_world(above=world["epoch"])
        text = log.read_bytes()
        assert b"world fault" in text and b"\0" not in text, "it goes on at the new beginning"
        assert served.stop() == 0


def test_the_unit_is_installed_and_enabled_under_another_root(tmp_path: Path) -> None:
    """What the page says, with every path below a folder; what needs a running systemd is left out."""
    for tool in ("systemctl", "install"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    for name, text in files(PAGE).items():
        (tmp_path / name).write_text(text)
    shutil.copytree(ROOT / "packaging", tmp_path / "packaging")
    root = tmp_path / "root"
    (root / "etc" / "systemd" / "system").mkdir(parents=True)
    (root / "etc" / "logrotate.d").mkdir()
    done = []
    for command in commands(PAGE):
        words = [f"{root}{word}" if word.startswith(("/etc/", "/var/")) else word for word in command.words]
        if words[:2] == ["systemctl", "enable"]:
            words = ["systemctl", f"--root={root}", "enable", words[-1]]
        elif words[0] != "install":
            continue
        ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, (words, ran.stderr)
        done.append(words[0])
    assert done.count("install") == 3 and done.count("systemctl") == 1
    assert (root / "etc" / "phalanx" / "serve.yaml").exists() and (
        root / "etc" / "phalanx" / "hosts.txt"
    ).exists()
    assert (root / "etc/systemd/system/multi-user.target.wants/phalanx.service").is_symlink()
    assert (root / "etc" / "logrotate.d" / "phalanx").exists()
