"""`phalanx serve ... --dry-run`: a script that shows everything and starts nothing, and runs as it stands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_llama

ROOT = Path(__file__).parents[2]


def dry_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "serve", *arguments, "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def test_it_runs_as_it_stands(model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    answer = dry_run(
        str(model), "--tp", "2", "--run-dir", str(run_dir), PHALANX_API_KEY="sk-hidden", HF_TOKEN="hf-x"
    )
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    assert not run_dir.exists(), "it wrote something"
    assert "hidden" not in answer.stdout and "hf-x" not in answer.stdout
    assert "PHALANX_GUARD_SECRET_KEY: a secret" in answer.stdout
    table = [line for line in answer.stdout.splitlines() if line.startswith("#  ")]
    assert table[0].split() == ["#", "rank", "tp", "pp", "host", "cores", "GPU"] and len(table) > 3
    assert " launcher.guard --epoch 1 --spare none -- " in answer.stdout
    shm = next(word for word in answer.stdout.split() if word.startswith("/dev/shm/phalanx-dry-run"))
    process = subprocess.Popen(
        ["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(answer.stdout)
        process.stdin.close()
        lines = iter(process.stdout.readline, "")
        ready = next(line for line in lines if line.startswith("ready"))
        assert ready.endswith("world 1 (tp 2, pp 1)\n")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        subprocess.run(["rm", "-rf", shm], check=True)


def test_over_hosts_it_shows_the_file_and_what_is_torn(model: Path, tmp_path: Path) -> None:
    shape = ["--tp", "2", "--pp", "2", "--hosts", "127.0.0.1:1,localhost:3", "--bind", "core"]
    answer = dry_run(str(model), *shape, "--run-dir", str(tmp_path / "run"))
    assert answer.returncode == 0
    assert "<<'END'\n127.0.0.1 slots=1\nlocalhost slots=3\nEND\n" in answer.stdout
    assert "# stage 0 is torn over 127.0.0.1, localhost" in answer.stdout
    assert "part 3 of 3 of its cores" in answer.stdout
    assert "launcher.guard --bind core --epoch" in answer.stdout
    assert "export OMPI_MCA_btl=self,sm,tcp\n" in answer.stdout


def test_a_model_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    answer = dry_run("smollm2-135m-instruct", PHALANX_CACHE=str(tmp_path / "cache"))
    assert answer.returncode == 0 and "is not here yet" in answer.stderr
    assert '--model "$(phalanx pull smollm2-135m-instruct)"' in answer.stdout
    assert not (tmp_path / "cache").exists()


def test_what_serve_refuses_is_refused(model: Path) -> None:
    answer = dry_run(str(model), "--tp", "99")
    assert answer.returncode == 2 and answer.stdout == "" and "--tp 99" in answer.stderr
