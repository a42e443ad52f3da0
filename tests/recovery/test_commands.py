"""`phalanx status`, `chat`, `pull` and `doctor` against a deployment that runs, and the bars on a terminal."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recovery.served import Served
from tests.terminal import Terminal
from tests.tiny_models import make_tiny_llama

COMMAND = [sys.executable, "-m", "launcher.cli"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=4096)


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ["--tp", "2", "--kv-cache-memory", "16MiB"]
    with Served(str(tiny_model), tmp_path_factory.mktemp("run"), *flags) as deployment:
        yield deployment


def phalanx(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


def test_status_finds_the_deployment_by_its_run_folder_or_port(served: Served) -> None:
    for where in (
        ["--run-dir", str(served.run_dir)],
        ["--url", served.url],
        ["--port", served.url.rsplit(":")[-1]],
    ):
        shown = phalanx("status", *where)
        assert shown.returncode == 0 and "world 1  active" in shown.stdout, shown
    missing = phalanx("status", "--run-dir", str(served.run_dir / "elsewhere"))
    assert missing.returncode == 1 and "nothing is served from" in missing.stderr


def test_status(served: Served) -> None:
    answer = phalanx("status", "--url", served.url)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("world 1  active  tiny  (tp 2, pp 1)")
    assert [line.split()[0] for line in lines[1:4]] == ["rank", "0", "1"]
    cluster = json.loads(phalanx("status", "--json", "--url", served.url).stdout)
    assert len(cluster["worlds"][0]["ranks"]) == 2


def test_status_shows_the_spare_and_its_memory(served: Served) -> None:
    served.parked_spare()
    deadline = time.monotonic() + 10
    pattern = r"^world \d+  spare \(warm, (\d+) MB\)  tiny  \(tp 2, pp 1\)$"
    while not (found := re.search(pattern, phalanx("status", "--url", served.url).stdout, re.MULTILINE)):
        assert time.monotonic() < deadline
    assert 20 < int(found[1]) < 2000


def test_commands_say_it_when_nothing_is_served() -> None:
    for command in (["status"], ["chat"]):
        answer = phalanx(*command, "--url", "http://127.0.0.1:1")
        assert answer.returncode == 1 and answer.stdout == ""
        assert answer.stderr.startswith("phalanx: error: http://127.0.0.1:1 does not answer")
        assert len(answer.stderr.splitlines()) == 1
    assert "not a URL" in phalanx("status", "--url", "nowhere").stderr


def test_chat_through_a_pipe(served: Served) -> None:
    answer = phalanx("chat", "--url", served.url, "--max-tokens", "8", stdin="hello\n\nand you?\n")
    assert answer.returncode == 0 and answer.stderr == ""
    assert answer.stdout.count("\n") >= 2


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(served: Served) -> None:
    terminal = Terminal([*COMMAND, "chat", "--url", served.url, "--max-tokens", "4000", "--temperature", "0"])
    terminal.read_until(r"\n> ")
    terminal.type("hello\n")
    terminal.read_until(r"hello\r\n[\s\S]{20}")  # whatever a random model says, lines included
    terminal.type("\x03")
    terminal.read_until(r"\n> ", timeout_s=10)
    deadline = time.monotonic() + 10
    while served.cluster()["worlds"][0]["ranks"][0]["state"] != "idle":
        assert time.monotonic() < deadline, "the engine still works for an answer that nobody reads"
        time.sleep(0.1)
    terminal.type("\x03")
    terminal.read_until(r"> ")
    terminal.type("\x04")
    assert terminal.wait() == 0


def test_pull(tiny_model: Path) -> None:
    answer = phalanx("pull", str(tiny_model))
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()) == tiny_model
    missing = phalanx("pull", str(tiny_model / "nothing-here"))
    assert missing.returncode != 0 and missing.stderr.startswith("phalanx: error: ")


def test_doctor() -> None:
    answer = phalanx("doctor", "--port", "1")
    assert answer.returncode == 0, answer.stdout
    for part in ("python", "mpirun", "mpi world", "cores", "memory", "/dev/shm", "model cache", "torch"):
        assert re.search(rf"^\w+ +{part} ", answer.stdout, re.MULTILINE), part
    assert re.search(r"^ok +mpi world +2 ranks", answer.stdout, re.MULTILINE)


def test_doctor_without_mpirun() -> None:
    answer = phalanx("doctor", "--mpirun", "/nowhere")
    assert answer.returncode == 1
    assert re.search(r"^missing +mpirun .*\n +-> install Open MPI", answer.stdout, re.MULTILINE)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_bars_on_a_terminal(tiny_model: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    flags = ["--port", "0", "--zmq", "tcp://127.0.0.1:*", "--run-dir", str(tmp_path)]
    terminal = Terminal(
        [*COMMAND, "serve", str(tiny_model), "--kv-cache-memory", "16MiB", *flags], **environment
    )
    shown = terminal.read_until(r"ready  http://.*\n.*curl .*\n")
    assert "load" in shown and "world 1: 1 rank" in shown
    assert ("━" in shown) == (environment.get("TERM") != "dumb")
    assert ("\x1b[3" in shown) == (environment == {})
    assert terminal.output == ""
    time.sleep(0.5)
    terminal.type("\x03")
    assert terminal.wait() == 0
    # Where the end takes more than a second, a line says what it waits for.
    lines = [line for line in terminal.output.replace("^C", "").splitlines() if line.strip()]
    others = [line for line in lines if "finishing what runs" not in line]
    assert [line.strip() for line in others] == ["stopped"] and len(lines) <= 2, terminal.output
