"""However a deployment ends, it leaves no process, no port and no shared memory behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.recovery.run_processes import left_of
from tests.recovery.served import Served, Streams
from tests.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


def serve(model: Path, run_dir: Path, *flags: str) -> Served:
    return Served(str(model), run_dir, "--tp", "2", "--kv-cache-memory", "16MiB", *flags)


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            probe.listen()
        except OSError:
            return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_mid_stream_leaves_nothing(tiny_model: Path, tmp_path: Path, number: int) -> None:
    segments = set(os.listdir("/dev/shm"))
    with serve(tiny_model, tmp_path, "--spare", "none", "--drain-timeout", "0.2") as served:
        everything = served.processes()
        assert len(everything) == 1 + 1 + 2 + 2
        assert len(served.shm_folders()) == 1
        streams = Streams(served, ["Once", "upon"], 1500)
        streams.wait_begun(3)
        began = time.monotonic()
        assert served.stop(number) == 0
        assert time.monotonic() - began < 10
        streams.finish(10)
    assert left_of(everything) == []
    assert served.shm_folders() == []
    assert not [name for name in set(os.listdir("/dev/shm")) - segments if served.run_id in name]
    assert port_is_free(served.url)
    assert not (tmp_path / "control.sock").exists()
    assert "Traceback" not in served.errors()


def test_ready_lines(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path, "--served-model-name", "mine") as served:
        words = served.ready_line.split("  ")
        assert words[0] == "ready" and words[1] == served.url
        assert words[2].startswith("zmq tcp://127.0.0.1:") and not words[2].endswith("*")
        assert words[3:5] == ["model mine", "world 1 (tp 2, pp 1)"]
        assert words[5].startswith("grpc 127.0.0.1:") and not words[5].endswith(":0")
        assert served.stop() == 0
    for part in ("load", "world 1: 2 ranks"):
        assert part in served.errors()
    log = (tmp_path / "supervisor.log").read_text()
    assert re.search(r"world serves epoch=1 processes_s=\d.* imports_s=\d.* load_s=\d.* front_s=\d", log), log


def test_curl_line_works_when_pasted(tiny_model: Path, tmp_path: Path) -> None:
    with serve(tiny_model, tmp_path) as served:
        pasted = subprocess.run(["bash", "-c", served.curl_line], capture_output=True, text=True, timeout=60)
        answer = json.loads(pasted.stdout)
        assert answer["object"] == "chat.completion", answer
