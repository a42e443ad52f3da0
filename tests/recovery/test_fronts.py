"""Several fronts on one port: each is killed and started again by itself, and whoever comes to the wrong one is
passed on."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from gateway.key_file import make_key, save
from tests.recovery.served import Served

FLAGS = ("--fronts", "2", "--spare", "none")
TEXT = "".join(f"number {number}, " for number in range(40))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("fronts")
    with Served("echo", folder / "run", *FLAGS) as served:
        yield served


class Reader:
    """A stream on a connection of its own, read by a thread to its end or until it breaks."""

    def __init__(self, served: Served, path: str = "/v1/completions", last_event_id: str = "") -> None:
        at = urlsplit(served.url)
        assert at.hostname is not None
        self._connection = http.client.HTTPConnection(at.hostname, at.port, timeout=60)
        if last_event_id:
            self._connection.request("GET", path, headers={"Last-Event-ID": last_event_id})
        else:
            body = {"model": "echo", "prompt": TEXT, "max_tokens": len(TEXT), "stream": True}
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            self._connection.request("POST", path, json.dumps(body), headers)
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()
        self.id = self.response.getheader("x-phalanx-request-id") or ""
        self.front = int(self.id.rpartition("-")[2][:2], 16)
        self.text = ""
        self.last_event_id = ""
        self.done = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        event_id = ""
        try:
            for line in self.response:
                field, _, value = line.decode().rstrip("\n").partition(": ")
                if field == "id":
                    event_id = value
                elif value == "[DONE]":
                    self.done = True
                elif field == "data":
                    self.text += "".join(choice["text"] for choice in json.loads(value)["choices"])
                    self.last_event_id = event_id
        except (http.client.HTTPException, OSError):
            pass

    def wait(self) -> Reader:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def fronts(served: Served) -> dict[int, psutil.Process]:
    """By their numbers."""
    found = {}
    for process in served.processes():
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:  # ended just now
            continue
        if "gateway.front" in command:
            found[int(command[command.index("--front") + 1])] = process
    return found


def readers_of_both(served: Served) -> list[Reader]:
    """Streams, some at each front: the kernel deals connections out."""
    readers: list[Reader] = []
    while len({reader.front for reader in readers}) < 2 or len(readers) < 6:
        assert len(readers) < 60, "all connections came to one front"
        readers.append(Reader(served))
    return readers


def test_whoever_comes_to_the_wrong_front_is_passed_on(served: Served) -> None:
    ids = [reader.wait().id for reader in readers_of_both(served)]
    for call_id in ids:
        for _ in range(4):
            shown = httpx.get(f"{served.url}/v1/requests/{call_id}").json()
            assert shown["response"]["choices"][0]["text"] == TEXT
    assert httpx.get(f"{served.url}/v1/requests/cmpl-01{'0' * 30}").status_code == 404


def test_a_key_finds_its_call_from_everywhere(served: Served) -> None:
    body = {"model": "echo", "prompt": "abc", "max_tokens": 5}
    for key in ("one", "two", "three"):
        answers = [
            httpx.post(f"{served.url}/v1/completions", json=body, headers={"Idempotency-Key": key})
            for _ in range(6)
        ]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_stream_is_cancelled_through_the_other_front(served: Served) -> None:
    for reader in readers_of_both(served):
        for _ in range(3):
            httpx.delete(f"{served.url}/v1/requests/{reader.id}").raise_for_status()
        assert reader.wait().done and len(reader.text) < len(TEXT)


def test_what_is_stored_is_found_from_everywhere(served: Served) -> None:
    body = {"model": "echo", "input": "say this"}
    response_id = httpx.post(f"{served.url}/v1/responses", json=body).json()["id"]
    for _ in range(6):
        assert httpx.get(f"{served.url}/v1/responses/{response_id}").status_code == 200


def test_one_front_is_killed_and_the_streams_of_the_other_go_on(served: Served) -> None:
    readers = readers_of_both(served)
    wait_for(lambda: all(len(reader.text) > 20 for reader in readers))
    before = fronts(served)
    before[1].kill()
    killed = [reader for reader in readers if reader.front == 1]
    for reader in readers:
        reader.wait()
    assert all(reader.done and reader.text == TEXT for reader in readers if reader.front == 0)
    for reader in killed:
        assert not reader.done
        again = Reader(served, f"/v1/requests/{reader.id}/stream", reader.last_event_id).wait()
        assert again.done and reader.text + again.text == TEXT
    after = fronts(served)
    assert after[0].pid == before[0].pid and after[1].pid != before[1].pid


def test_metrics_are_those_of_all_fronts(served: Served) -> None:
    def accepted() -> set[float]:
        found = set()
        for _ in range(8):
            lines = httpx.get(f"{served.url}/metrics").text.splitlines()
            found.add(
                sum(float(x.split()[-1]) for x in lines if x.startswith("phalanx_requests_accepted_total"))
            )
        return found

    before = accepted()
    assert len(before) == 1
    for _ in range(10):
        httpx.post(f"{served.url}/v1/completions", json={"model": "echo", "prompt": "a", "max_tokens": 1})
    assert accepted() == {before.pop() + 10}


def test_a_planned_change_takes_all_fronts_along(served: Served) -> None:
    readers = readers_of_both(served)
    epoch = served.active_world()["epoch"]
    command = [sys.executable, "-m", "launcher.cli", "reload", "--run-dir", str(served.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert served.active_world(above=epoch)
    assert all(reader.wait().text == TEXT for reader in readers)


def test_limits_are_those_of_all_fronts(tmp_path: Path) -> None:
    key, record = make_key("alice", requests_per_minute=6)
    save(tmp_path / "keys.json", [record])
    flags = (*FLAGS, "--api-key-file", str(tmp_path / "keys.json"), "--max-waiting", "4")
    body = {"model": "echo", "prompt": "abc", "max_tokens": 1}
    with Served("echo", tmp_path / "run", *flags) as served:
        headers = {"Authorization": f"Bearer {key}"}
        answers = [
            httpx.post(
                f"{served.url}/v1/completions", json=body, headers=headers
            )  # each on a connection of its own
            for _ in range(24)
        ]
        fronts_that_answered = {
            int(answer.headers["x-phalanx-request-id"].rpartition("-")[2][:2], 16)
            for answer in answers
            if answer.status_code == 200
        }
        let_through = [answer.status_code for answer in answers].count(200)
        assert let_through in (6, 7)  # one more has flowed in where this took ten seconds
        assert {answer.status_code for answer in answers} == {200, 429}
        left = {
            answer.headers["x-ratelimit-remaining-requests"]
            for answer in answers
            if answer.status_code == 429
        }
        assert left == {"0"}
        assert fronts_that_answered == {0, 1}


def test_the_next_supervisor_takes_over_all_fronts(tmp_path: Path) -> None:
    first = Served("echo", tmp_path / "run", *FLAGS)
    readers = readers_of_both(first)
    before = {number: front.pid for number, front in fronts(first).items()}
    first.kill_supervisor()
    with Served("echo", tmp_path / "run", *FLAGS) as second:
        assert {number: front.pid for number, front in fronts(second).items()} == before
        assert second.url == first.url
        assert all(reader.wait().text == TEXT for reader in readers)
        fronts(second)[0].kill()  # its listener is the new supervisor's, too
        wait_for(lambda: (new := fronts(second).get(0)) is not None and new.pid != before[0])
        readers = readers_of_both(second)
        second.process.send_signal(15)  # what runs is finished
        assert all(reader.wait().text == TEXT for reader in readers)
        assert second.process.wait(30) == 0
    assert not list((tmp_path / "run").glob("*.sock"))
    assert os.path.exists(tmp_path / "run" / "journal-1.sqlite")
