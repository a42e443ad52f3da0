"""SIGTERM and Ctrl-C: what runs is finished, what is new is refused, and a second signal ends it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.recovery.served import Served, Streams
from tests.tiny_models import make_tiny_llama

NUM_TOKENS = 900


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def serve(model: Path, run_dir: Path, *flags: str) -> Served:
    return Served(str(model), run_dir, "--tp", "2", "--kv-cache-memory", "16MiB", *flags)


def begun(served: Served, max_tokens: int = NUM_TOKENS) -> Streams:
    streams = Streams(served, ["Once", "upon", "a time"], max_tokens)
    streams.wait_begun(3)
    return streams


def ask(served: Served) -> httpx.Response:
    body: dict[str, Any] = {"model": served.model, "prompt": "new", "max_tokens": 2}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_runs_is_finished_and_what_is_new_is_refused(
    tiny_model: Path, tmp_path: Path, number: int
) -> None:
    with serve(tiny_model, tmp_path, "--drain-timeout", "600") as served:
        streams = begun(served)
        served.process.send_signal(number)
        deadline = time.monotonic() + 10
        while (refused := ask(served)).status_code != 503:
            assert time.monotonic() < deadline, refused.text
        assert refused.json()["error"]["code"] == "unavailable" and "retry-after" in refused.headers
        assert "shutting down" in refused.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").status_code == 503
        ready = httpx.get(f"{served.url}/health/ready")
        assert ready.status_code == 503 and "shutting down" in ready.json()["reason"]
        assert httpx.get(f"{served.url}/health/live").status_code == 200
        for stream in streams.finish():
            assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
            assert stream.usage is not None and stream.usage["completion_tokens"] == NUM_TOKENS
        assert served.process.wait(30) == 0
    assert served.shm_folders() == []


def test_what_does_not_finish_in_time_is_told_so(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path, "--drain-timeout", "0.5", "--spare", "none") as served:
        streams = begun(served, 2000)
        assert served.stop() == 0
        for stream in streams.finish(10):
            assert stream.error is not None and "shut down before" in stream.error, stream


def test_a_second_signal_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path, "--drain-timeout", "600", "--spare", "none") as served:
        streams = begun(served, 2000)
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert served.process.poll() is None
        assert served.stop(signal.SIGINT) == 0
        assert all(stream.error is not None for stream in streams.finish(10))
    assert served.shm_folders() == []


@pytest.mark.slow
def test_a_rank_may_die_meanwhile(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path, "--drain-timeout", "600") as served:
        streams = begun(served)
        world = served.active_world()
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
        for stream in streams.finish():
            assert (stream.error, stream.done, stream.finish_reason) == (None, True, "length")
        assert served.process.wait(30) == 0


@pytest.mark.slow
def test_an_idle_server_leaves_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path, "--drain-timeout", "600") as served:
        assert served.stop() == 0
