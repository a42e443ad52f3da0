"""What operators see of a served model: health, metrics, cluster; and that cancelled requests leave nothing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.conftest import MODEL
from tests.docs_pages import PAGES, Command, commands
from tests.recovery.served import Served

CURLS = [command for page in PAGES for command in commands(page) if command.program == "curl"]


def metric(served: Served, name: str) -> float:
    for line in httpx.get(f"{served.url}/metrics", timeout=10).text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name}")


def wait_for(served: Served, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while metric(served, name) != value:
        assert time.monotonic() < deadline, f"{name} is {metric(served, name)}, not {value}"
        time.sleep(0.05)


def test_health(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/health/live").json() == {"live": True}
    assert httpx.get(f"{served.url}/health/ready").json()["ready"] is True


def test_cluster(served: Served) -> None:
    cluster = served.cluster()
    [world] = [world for world in cluster["worlds"] if world["state"] == "active"]
    assert (world["model"], world["tp"], world["pp"]) == (MODEL, 2, 1)
    assert [(rank["rank"], rank["tp"], rank["pp"]) for rank in world["ranks"]] == [(0, 0, 0), (1, 1, 0)]
    assert len({rank["pid"] for rank in world["ranks"]} | {r["guard_pid"] for r in world["ranks"]}) == 4
    assert all(rank["heartbeat_age_s"] < 2 for rank in world["ranks"])
    assert cluster["faults"] == [] and cluster["serving_epoch"] == world["epoch"]


@pytest.mark.parametrize("command", CURLS, ids=lambda command: command.place[:60])
def test_requests_of_the_docs_are_answered(served: Served, command: Command) -> None:
    words = [re.sub(r"^http://[^/]+", served.url, word) for word in command.words]
    answer = subprocess.run([*words, "--fail-with-body", "-sS"], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0 and answer.stdout.strip(), answer


def test_tokens_are_counted(served: Served) -> None:
    before = metric(served, "vllm:generation_tokens_total"), metric(served, "vllm:prompt_tokens_total")
    body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).raise_for_status()
    after = metric(served, "vllm:generation_tokens_total"), metric(served, "vllm:prompt_tokens_total")
    assert (after[0] - before[0], after[1] - before[1]) == (9, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(served: Served, stream: bool) -> None:
    wait_for(served, "vllm:num_requests_running", 0)
    before = metric(served, "phalanx_kv_blocks_used")
    body = json.dumps(
        {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "n": 4, "stream": stream}
    ).encode()
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_for(served, "vllm:num_requests_running", 4)
        assert metric(served, "vllm:kv_cache_usage_perc") > 0
    wait_for(served, "vllm:num_requests_running", 0)
    wait_for(served, "phalanx_requests_live", 0)
    assert metric(served, "phalanx_kv_blocks_used") == before
