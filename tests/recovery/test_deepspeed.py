"""`phalanx serve --backend deepspeed` as a user starts it: streams, deaths in mid-stream, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import other_architectures
from tests.recovery.run_processes import left_of
from tests.recovery.served import Served, Streams
from tests.recovery.test_refusals import refusal

PROMPTS = ["abc", "The phalanx stands. " * 5, "1, 2, 3,"]
NUM_TOKENS = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 query and 3 KV heads, which two ranks share unevenly, and a sliding window."""
    return other_architectures.make(tmp_path_factory.mktemp("model") / "starcoder2", "starcoder2")


@pytest.mark.slow
@pytest.mark.long
def test_streams_outlive_ranks(model: Path, tmp_path: Path) -> None:
    flags = ["--backend", "deepspeed", "--tp", "2", "--dtype", "float32", "--kv-cache-memory", "16MiB"]
    with Served(str(model), tmp_path, *flags) as served:
        undisturbed = [stream.text for stream in Streams(served, PROMPTS, NUM_TOKENS).finish()]
        for rank, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
            world = served.active_world()
            served.parked_spare(above=world["epoch"])
            streams = Streams(served, PROMPTS, NUM_TOKENS)
            streams.wait_begun(8)
            os.kill(world["ranks"][rank]["pid"], number)
            finished = streams.finish()
            assert served.active_world(above=world["epoch"])["epoch"] == world["epoch"] + 1
            for stream, text in zip(finished, undisturbed, strict=True):
                assert stream.error is None and stream.done and stream.finish_reason == "length"
                assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
                assert stream.text == text
        everything = served.processes()
        assert served.stop() == 0
        assert left_of(everything) == []
        assert served.shm_folders() == []


def test_what_it_says_of_models(model: Path, tmp_path: Path) -> None:
    common = ("--port", "0", "--zmq", "tcp://127.0.0.1:*", "--run-dir", str(tmp_path / "run"))
    line = refusal(str(model), *common)
    assert "Starcoder2ForCausalLM is not supported" in line
    assert "--backend deepspeed may run it (pip install 'phalanx-serve[deepspeed]')" in line
    line = refusal(str(model), "--backend", "deepspeed", "--pp", "2", *common)
    assert "--pp 2" in line
    line = refusal(str(model), "--backend", "deepspeed", "--tp", "4", *common)
    assert "--tp 4" in line and "1 to 3" in line


def test_without_the_packages(model: Path, tmp_path: Path) -> None:
    """As on a machine where only the base is installed: the names lead nowhere."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    paths = [str(tmp_path), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    common = ("--port", "0", "--zmq", "tcp://127.0.0.1:*", "--run-dir", str(tmp_path / "run"))
    line = refusal(str(model), "--backend", "deepspeed", *common, environment=environment)
    assert "needs deepspeed" in line and "pip install 'phalanx-serve[deepspeed]'" in line
    # A rank that is started by hand says the same, and that trying again is useless.
    rank = [sys.executable, "-m", "engine.rank", "--model", str(model), "--backend", "deepspeed"]
    done = subprocess.run(rank, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 78
    assert "needs deepspeed" in done.stderr and "Traceback" not in done.stderr


def test_needs_no_compiler(model: Path, tmp_path: Path) -> None:
    """DeepSpeed compiles what it is asked for when it is first used; nothing of that kind is asked for here."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "extensions").mkdir()
    (tmp_path / "bin" / "mpirun").symlink_to(Path(sys.executable).with_name("mpirun"))
    variables = {
        "PATH": str(tmp_path / "bin"),
        "CC": "/nowhere",
        "CXX": "/nowhere",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    flags = ["--backend", "deepspeed", "--tp", "2", "--kv-cache-memory", "16MiB", "--spare", "none"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with Served(str(model), tmp_path / "run", *flags) as served:
            (stream,) = Streams(served, PROMPTS[:1], 8).finish()
            assert stream.done and stream.error is None
    assert list((tmp_path / "extensions").iterdir()) == []
