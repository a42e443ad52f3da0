"""`phalanx reload`: a new world takes over with every open stream, or the old one goes on and the reason is said."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.recovery.served import Served, Streams, processes_of, still_there
from tests.tiny_models import make_tiny_llama

NUM_TOKENS = 1500


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / "first", max_model_len=2048)
    make_tiny_llama(folder / "second", max_model_len=2048, seed=1)
    shutil.copytree(folder / "second", folder / "foreign")
    tokenizer = folder / "foreign" / "tokenizer.json"
    content: dict[str, Any] = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = "a", "b"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    tokenizer.write_text(json.dumps(content))
    return folder


def reload(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", "reload", *arguments, "--run-dir", str(served.run_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Background:
    """A reload in a thread, while streams run."""

    def __init__(self, served: Served, *arguments: str) -> None:
        self.result: subprocess.CompletedProcess[str] | None = None
        self._thread = threading.Thread(target=self._run, args=(served, arguments))
        self._thread.start()

    def _run(self, served: Served, arguments: tuple[str, ...]) -> None:
        self.result = reload(served, *arguments)

    def wait(self) -> subprocess.CompletedProcess[str]:
        self._thread.join(120)
        assert self.result is not None
        return self.result


def test_streams_move_to_the_new_world(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHALANX_FAULTS", "sleep=0.01")  # so that the streams are still there when it changes
    flags = ("--tp", "2", "--kv-cache-memory", "16MiB", "--served-model-name", "mine")
    with Served(str(models / "first"), tmp_path, *flags) as served:
        old = served.active_world()
        spare = served.parked_spare()
        ended = [*processes_of(old), *processes_of(spare)]
        streams = Streams(served, ["Once", "upon"], NUM_TOKENS)
        streams.wait_begun(3)
        done = Background(served, str(models / "second"), "--tp", "1", "--pp", "2").wait()
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("reloaded  world ")
        for stream in streams.finish():
            assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
            assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
        assert 'phalanx_replays_total{model="mine"} 2.0' in httpx.get(f"{served.url}/metrics").text
        new = served.active_world(above=spare["epoch"])
        assert (new["tp"], new["pp"], new["version"], new["model"]) == (1, 2, "2", "mine")
        assert not still_there(ended)
        spare = served.parked_spare(above=new["epoch"])
        assert (spare["tp"], spare["pp"], spare["version"]) == (1, 2, "2")
        cluster = served.cluster()
        assert cluster["faults"] == []
        # The change counts against nobody, and the next fault is met with the new plan.
        processes_of(new)[1].kill()
        after = served.active_world(above=new["epoch"])
        assert (after["tp"], after["pp"]) == (1, 2)
        assert served.stop() == 0
    assert served.shm_folders() == [] and not (tmp_path / "commands.sock").exists()


def test_a_change_that_cannot_be_changes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faults"
    monkeypatch.setenv("PHALANX_FAULTS", f"@{file}")
    flags = ("--tp", "2", "--kv-cache-memory", "16MiB", "--spare", "none")
    with Served(str(models / "first"), tmp_path / "run", *flags) as served:
        world = served.active_world()
        streams = Streams(served, ["Once", "upon"], NUM_TOKENS)
        streams.wait_begun(3)
        for arguments, reason, code in (
            ([str(models / "foreign")], "another tokenizer", 1),
            (["--tp", "99"], "--tp 99", 2),
            (["--max-model-len", "100"], "requests of up to 2048 tokens", 1),
            (["--kv-cache-memory", "1"], "--kv-cache-memory 1", 1),
            (["--kv-cache-memory", "256KiB"], "KV cache holds", 1),
        ):
            refused = reload(served, *arguments)
            assert refused.returncode == code and reason in refused.stderr, refused
        file.write_text("raise=no-such-luck phase=loading rank=1")
        failed = reload(served, str(models / "second"))
        assert failed.returncode == 1 and "no-such-luck" in failed.stderr, failed
        assert "nothing was changed" in failed.stderr
        file.unlink()
        for stream in streams.finish():
            assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
        assert served.active_world()["epoch"] == world["epoch"]
        assert served.cluster()["faults"] == []
        assert reload(served, str(models / "second")).returncode == 0
        assert served.active_world(above=world["epoch"])["version"] == "2"


def test_the_world_that_serves_is_replaced_meanwhile(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "faults"
    file.write_text("sleep=0.01")
    monkeypatch.setenv("PHALANX_FAULTS", f"@{file}")
    flags = ("--tp", "2", "--kv-cache-memory", "16MiB", "--spare", "none")
    with Served(str(models / "first"), tmp_path / "run", *flags) as served:
        world = served.active_world()
        streams = Streams(served, ["Once", "upon"], 600)
        streams.wait_begun(3)
        file.write_text(f"sleep=0.01; sleep=60 phase=loaded epoch={world['epoch'] + 1}")
        reloading = Background(served, str(models / "second"))
        while len(served.cluster()["worlds"]) < 2:
            time.sleep(0.05)
        processes_of(world)[-1].kill()
        assert served.active_world(above=world["epoch"] + 1)["version"] == "1"
        done = reloading.wait()
        assert done.returncode == 1 and "has taken its place; ask again" in done.stderr, done
        for stream in streams.finish():
            assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")


def test_no_spare_is_started_while_a_world_is_to_take_over(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a supervisor that is killed meanwhile is noticed at once by whoever waits for the change."""
    file = tmp_path / "faults"
    file.write_text("")
    monkeypatch.setenv("PHALANX_FAULTS", f"@{file}")
    flags = ("--tp", "2", "--kv-cache-memory", "16MiB", "--spare", "warm")
    with Served(str(models / "first"), tmp_path / "run", *flags) as served:
        world = served.active_world()
        spare = served.parked_spare()
        file.write_text(f"sleep=60 phase=loaded epoch={spare['epoch'] + 1}")
        reloading = Background(served, str(models / "second"))
        while len(served.cluster()["worlds"]) < 3:
            time.sleep(0.05)
        for process in processes_of(spare):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        log = tmp_path / "run" / "supervisor.log"
        while "spare lost" not in log.read_text():
            time.sleep(0.05)
        until = time.monotonic() + 3  # its back-off is 1 s
        while time.monotonic() < until:
            assert [one["state"] for one in served.cluster()["worlds"]].count("spare") == 0
            time.sleep(0.1)
        assert served.active_world()["epoch"] == world["epoch"]
        served.kill_supervisor()
        began = time.monotonic()
        done = reloading.wait()
        assert done.returncode == 1 and "the supervisor has ended meanwhile" in done.stderr, done
        assert time.monotonic() - began < 10
        command = [sys.executable, "-m", "launcher.cli", "stop", "--run-dir", str(tmp_path / "run")]
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_without_a_deployment_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.cli", "reload", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "nothing is served from" in done.stderr
