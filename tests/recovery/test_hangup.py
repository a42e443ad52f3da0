"""SIGHUP: a closed terminal ends the deployment that was started from it; a daemon reads its settings again."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.recovery.served import Served, Streams
from tests.tiny_models import make_tiny_llama

FLAGS = ("--kv-cache-memory", "16MiB", "--spare", "none")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def test_a_daemon_reads_its_settings_again(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "phalanx.yaml"
    config.write_text("tp: 2\n")
    log = tmp_path / "run" / "supervisor.log"
    with Served(
        str(tiny_model), tmp_path / "run", *FLAGS, "--config", str(config), new_session=True
    ) as served:
        world = served.active_world()
        assert world["tp"] == 2
        config.write_text("tp: 1\n")
        served.process.send_signal(signal.SIGHUP)
        after = served.active_world(above=world["epoch"])
        assert (after["tp"], after["version"]) == (1, "2")
        config.write_text("tp: 1\nno-such-setting: 1\n")
        served.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while "unknown key 'no-such-setting'" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert served.active_world()["epoch"] == after["epoch"]
        assert served.stop() == 0


def test_a_hangup_of_everything_breaks_no_stream(tiny_model: Path, tmp_path: Path) -> None:
    """As `systemctl kill --signal=HUP` sends it: worlds end with it, as they may; connections do not."""
    with Served(str(tiny_model), tmp_path / "run", *FLAGS, "--tp", "2", new_session=True) as served:
        world, front = served.active_world(), served.front()
        streams = Streams(served, ["Once", "upon"], 900)
        streams.wait_begun(3)
        for process in [served.process, *served.processes()]:
            process.send_signal(signal.SIGHUP)
        for stream in streams.finish():
            assert (stream.error, stream.done) == (None, True)
        assert served.active_world(above=world["epoch"])
        assert served.front() == front
        assert served.stop() == 0


def test_a_terminal_that_is_closed_ends_what_was_started_from_it(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "serve", str(tiny_model), *FLAGS]
    command += [
        "--port",
        "0",
        "--zmq",
        "tcp://127.0.0.1:*",
        "--grpc-port",
        "0",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    shown = b""
    deadline = time.monotonic() + 120
    while b"ready  http://" not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536)
    os.close(terminal)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert not (tmp_path / "run" / "processes.json").exists(), "an orderly end"
