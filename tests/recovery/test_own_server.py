"""`phalanx batch run --model`: a server of its own, which ends with the batch, however that ends. The echo model is
enough for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.recovery.run_processes import of_run
from tests.recovery.terminals import MARK, marked

COMMAND = [sys.executable, "-m", "launcher.cli", "batch", "run"]


def write_batch(path: Path, count: int, max_tokens: int) -> Path:
    body = {"prompt": "hello ", "max_tokens": max_tokens, "ignore_eos": True}
    lines = [{"custom_id": str(n), "url": "/v1/completions", "body": body} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_with_a_server_of_its_own(tmp_path: Path) -> None:
    file = write_batch(tmp_path / "in.jsonl", 3, 12)
    flags = ["--model", "echo", "--", "--spare", "none"]
    answer = subprocess.run([*COMMAND, str(file), *flags], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "3 of 3 requests answered" in answer.stdout
    entries = [json.loads(text) for text in (tmp_path / "in.out.jsonl").read_text().splitlines()]
    assert {entry["response"]["body"]["choices"][0]["text"] for entry in entries} == {"hello hello "}
    wrong = [
        *COMMAND,
        str(file),
        "--output",
        str(tmp_path / "new.jsonl"),
        "--model",
        "echo",
        "--",
        "--tp",
        "0",
    ]
    answer = subprocess.run(wrong, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1 and "--tp 0: must be 1 or more" in answer.stderr
    no_model = subprocess.run(
        [*COMMAND, str(file), "--", "--tp", "2"], capture_output=True, text=True, timeout=60
    )
    assert no_model.returncode == 2 and "name its model with --model" in no_model.stderr


def test_a_batch_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    file = write_batch(tmp_path / "in.jsonl", 2000, 2000)
    flags = [
        "--concurrency",
        "1",
        "--model",
        "echo",
        "--",
        "--spare",
        "none",
        "--run-dir",
        str(tmp_path / "own"),
    ]
    said = tmp_path / "said"
    with said.open("w") as file_of_said:
        batch = subprocess.Popen(
            [*COMMAND, str(file), *flags],
            env={**os.environ, "PHALANX_ADOPTION_WAIT_S": "1", "TMPDIR": str(tmp_path)},
            stdout=file_of_said,
            stderr=file_of_said,
        )
    deadline = time.monotonic() + 60
    while not re.search(r"batch: \d+ of 2000", said.read_text()):
        assert time.monotonic() < deadline and batch.poll() is None, said.read_text()
        time.sleep(0.05)
    run_id = json.loads((tmp_path / "own" / "processes.json").read_text())["run_id"]
    assert of_run(run_id)
    batch.kill()
    batch.wait()
    deadline = time.monotonic() + 30
    while left := of_run(run_id):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_server_of_a_script_ends_with_the_script(number: int) -> None:
    """It had no time to close it. The thread that had started the server ended long before."""
    script = """
import threading, time, phalanx
def start():
    global server
    server = phalanx.serve("echo", spare="none")
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(server.url, flush=True)
time.sleep(600)
"""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("http://")
        time.sleep(0.3)  # for an end of the thread that somebody might take for the script's
        assert len(marked(mark)) >= 4
        process.send_signal(number)
        assert process.wait(10) == -number
        deadline = time.monotonic() + 20
        while left := marked(mark):
            assert time.monotonic() < deadline, [found.cmdline() for found in left]
            time.sleep(0.05)
    finally:
        for found in marked(mark):
            found.kill()
