"""`phalanx serve` as a user starts it, for tests: the process, its address, its processes, and streams of
it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.recovery.run_processes import end_with_parent, of_run
from tests.recovery.small_world.deployed import wait_gone

READY_TIMEOUT_S = 180.0


class Served:
    """One deployment that is ready. Leave the context to end it by SIGTERM."""

    def __init__(
        self,
        model: str,
        run_dir: Path,
        *flags: str,
        new_session: bool = False,
        python: str = sys.executable,
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        """`new_session`: without a terminal, as a daemon. `python`: of another environment."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self._errors = run_dir / "serve.stderr"
        command = [python, "-m", "launcher.cli", "serve", model]
        command += ["--port", "0", "--zmq", "tcp://127.0.0.1:*", "--run-dir", str(run_dir), *flags]
        if "--grpc-port" not in flags:
            command += ["--grpc-port", "0"]
        began = time.monotonic()
        with self._errors.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(variables),
                text=True,
                preexec_fn=end_with_parent,
                start_new_session=new_session,
            )
        assert self.process.stdout is not None
        watchdog = threading.Timer(READY_TIMEOUT_S, self.process.kill)
        watchdog.start()
        self.ready_line = self.process.stdout.readline().rstrip("\n")
        self.curl_line = self.process.stdout.readline().rstrip("\n")
        watchdog.cancel()
        self.start_s = time.monotonic() - began
        assert self.ready_line.startswith("ready  http"), self.errors()
        self.url = self.ready_line.split()[1]
        self.model = self.ready_line.split()[5]
        record = json.loads((run_dir / "processes.json").read_text())
        self.run_id: str = record["run_id"]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def kill_supervisor(self) -> None:
        self.process.kill()
        self.process.wait()

    def errors(self) -> str:
        return self._errors.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def cluster(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/cluster", timeout=10).json()
        return answer

    def active_world(self, above: int = 0, timeout_s: float = 60.0) -> dict[str, Any]:
        """The active world, as /cluster shows it, once one of a higher epoch serves and every fault is
        recovered."""
        deadline = time.monotonic() + timeout_s
        cluster: dict[str, Any] = {}
        while time.monotonic() < deadline:
            cluster = self.cluster()
            recovered = all(fault["recover_s"] is not None for fault in cluster["faults"])
            for world in cluster["worlds"]:
                if world["state"] == "active" and world["epoch"] > above and recovered:
                    assert isinstance(world, dict)
                    return world
            time.sleep(0.05)
        raise AssertionError(f"no active world above {above}: {cluster}\n{self.errors()}")

    def parked_spare(self, above: int = 0, timeout_s: float = 60.0) -> dict[str, Any]:
        """The spare, as /cluster shows it, once there is one of a higher epoch all of whose ranks are parked."""
        deadline = time.monotonic() + timeout_s
        cluster: dict[str, Any] = {}
        while time.monotonic() < deadline:
            cluster = self.cluster()
            for world in cluster["worlds"]:
                states = {rank["state"] for rank in world["ranks"]}
                complete = len(world["ranks"]) == world["tp"] * world["pp"]
                if world["state"] == "spare" and world["epoch"] > above and complete and states == {"parked"}:
                    assert isinstance(world, dict)
                    return world
            time.sleep(0.05)
        raise AssertionError(f"no spare above {above}: {cluster}\n{self.errors()}")

    def processes(self) -> list[psutil.Process]:
        """Everything that the supervisor has started, or taken over."""
        return of_run(self.run_id)

    def front(self) -> psutil.Process:
        return next(p for p in self.processes() if "gateway.front" in p.cmdline())

    def shm_folders(self) -> list[str]:
        return [path.name for path in Path("/dev/shm").glob(f"phalanx-{self.run_id}-*")]


def processes_of(world: dict[str, Any]) -> list[psutil.Process]:
    """mpirun, guards and ranks of a world in /cluster."""
    pids = [rank[key] for rank in world["ranks"] for key in ("pid", "guard_pid")]
    mpirun = psutil.Process(world["ranks"][0]["guard_pid"]).ppid()
    return [psutil.Process(pid) for pid in [mpirun, *pids]]


def still_there(processes: Sequence[psutil.Process], timeout_s: float = 5.0) -> list[psutil.Process]:
    """Those that have not vanished within this time; zombies of ours count as there."""
    return wait_gone(list(processes), timeout_s)


@dataclass
class Stream:
    """One streamed completion, read by a thread of its own."""

    prompt: str
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False
    error: str | None = None
    usage: dict[str, Any] | None = None
    call_id: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Streams:
    """Streams of all prompts at once."""

    def __init__(self, served: Served, prompts: Sequence[str], max_tokens: int) -> None:
        self._served = served
        self._max_tokens = max_tokens
        self.all = [Stream(prompt) for prompt in prompts]
        self._threads = [threading.Thread(target=self._read, args=(s,), daemon=True) for s in self.all]
        for thread in self._threads:
            thread.start()

    def wait_begun(self, pieces: int, timeout_s: float = 60.0) -> None:
        """Until every stream has brought this many pieces."""
        deadline = time.monotonic() + timeout_s
        while any(len(stream.pieces) < pieces and not stream.done for stream in self.all):
            assert time.monotonic() < deadline, [len(stream.pieces) for stream in self.all]
            time.sleep(0.01)

    def finish(self, timeout_s: float = 120.0) -> list[Stream]:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.all

    def _read(self, stream: Stream) -> None:
        body = {
            "model": self._served.model,
            "prompt": stream.prompt,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream(
                "POST", f"{self._served.url}/v1/completions", json=body, timeout=120
            ) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        stream.done = True
                    elif line.startswith("data:"):
                        self._take(stream, json.loads(line[5:]))
        except (httpx.HTTPError, ValueError) as error:
            stream.error = repr(error)

    @staticmethod
    def _take(stream: Stream, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            stream.error = str(chunk["error"])
        stream.call_id = chunk.get("id", stream.call_id)
        if chunk.get("usage") is not None:
            stream.usage = chunk["usage"]
        for choice in chunk.get("choices", []):
            stream.pieces.append(choice["text"])
            stream.finish_reason = choice["finish_reason"] or stream.finish_reason


@dataclass
class Health:
    """Answers of the health pages over a time, one after the other, without repetitions."""

    ready: list[int] = field(default_factory=list)
    live: list[int] = field(default_factory=list)


@contextmanager
def watch_health(served: Served) -> Iterator[Health]:
    """Asks again and again while the context lasts."""
    health = Health()
    ended = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=10) as client:
            while not ended.wait(0.02):
                for page, seen in (("ready", health.ready), ("live", health.live)):
                    code = client.get(f"{served.url}/health/{page}").status_code
                    if seen[-1:] != [code]:
                        seen.append(code)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield health
    finally:
        ended.set()
        thread.join()
