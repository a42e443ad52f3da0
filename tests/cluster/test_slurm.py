"""Phalanx as a job of Slurm: a real controller and two nodes (see slurm_site), srun with Open MPI and with MPICH. A
rank is killed, the supervisor is killed, the job is told to leave, preempted and cancelled."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from launcher.processes import environment_of
from tests.cluster.slurm_site import NODES, Site, slurm_site, why_not
from tests.recovery.run_processes import of_run
from tests.recovery.small_world.deployed import wait_gone
from tests.recovery.test_other_mpis import environment_with
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

ROOT = Path(__file__).resolve().parents[2]
NUM_TOKENS = 300
SLOWLY = "sleep=0.03 rank=0"
"""Every step of rank 0 takes so long: what is under way is still under way when something happens to it."""
_LIBC = ctypes.CDLL(None, use_errno=True)


def enter_network_of(pid: int | str) -> None:
    """The calling thread, and whatever it starts, from now on."""
    with open(f"/proc/{pid}/ns/net") as network:
        assert _LIBC.setns(network.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open("/proc/thread-self/ns/net") as own, slurm_site(tmp_path_factory.mktemp("slurm")) as site:
        enter_network_of(site.hosts.first_pid)
        yield site
        assert _LIBC.setns(own.fileno(), 0x40000000) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_model_len=2048)


class Job:
    """A deployment that was rendered and submitted."""

    def __init__(
        self, site: Site, model: Path, folder: Path, *flags: str, python: str = sys.executable
    ) -> None:
        self._site = site
        self._python = python
        self.pace = folder / "pace"
        self.pace.write_text("")
        path = f"{Path(python).parent}:{os.environ['PATH']}"
        self.variables = {**site.environment, "PATH": path, "PYTHONPATH": str(ROOT)}
        self.variables |= {"XDG_STATE_HOME": str(folder / "state"), "PHALANX_CACHE": str(folder / "cache")}
        self.variables |= {"PHALANX_FAULTS": f"@{self.pace}"}
        script = folder / "job.sbatch"
        script.write_text(
            self.phalanx(
                *("slurm", "render", str(model), "--nodes", "2", "--time", "30", "--host", "0.0.0.0"),
                *("--grpc-port", "0", "--kv-cache-memory", "16MiB", "--dtype", "float32"),
                *("--output", str(folder / "job.out"), *flags),
            )
        )
        self.output = folder / "job.out"
        submitted = site.run("sbatch", "--parsable", str(script), environment=self.variables)
        self.id = submitted.strip()
        self.run_dir = folder / "state" / "phalanx" / f"slurm-{self.id}"

    def phalanx(self, *arguments: str) -> str:
        command = [self._python, "-m", "launcher.cli", *arguments]
        done = subprocess.run(command, env=self.variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def endpoint(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_dir / f"slurm-{self.id}.json").read_text())
        return content

    @property
    def url(self) -> str:
        return str(self.endpoint["url"])

    @property
    def run_id(self) -> str:
        return str(json.loads((self.run_dir / "processes.json").read_text())["run_id"])

    def logs(self) -> str:
        files = [self.output, *sorted(self.run_dir.glob("worlds/*/*.log"))]
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def wait(self, is_so: Callable[[], Any], what: str, timeout_s: float = 90.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := is_so():
                    return value
            except (OSError, KeyError, ValueError, httpx.HTTPError, psutil.Error):
                pass  # it is being written, or not there yet
            assert time.monotonic() < deadline, f"no {what}: {self.state()}\n{self.logs()}"
            time.sleep(0.05)

    def state(self) -> str:
        return self._site.run("squeue", "--noheader", "--format=%T", f"--job={self.id}", check=False).strip()

    def worlds(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/cluster", timeout=10).json()["worlds"]
        return found

    def wait_active(self, above: int = 0) -> dict[str, Any]:
        def active() -> Any:
            found = [world for world in self.worlds() if world["state"] == "active"]
            return found and found[0]["epoch"] > above and found[0]

        world: dict[str, Any] = self.wait(active, f"active world above {above}")
        return world

    def processes(self, node: str, what: str) -> list[psutil.Process]:
        """Of this deployment on a node, whose command line has this in it."""
        found = []
        for process in of_run(self.run_id):
            try:
                of = environment_of(process.pid).get("SLURMD_NODENAME")
                if of == node and any(what in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def rank(self, node: str, epoch: int) -> psutil.Process:
        """The process of the engine, which is the child of its guard."""
        for process in self.processes(node, "engine.rank"):
            line = process.cmdline()
            if "launcher.guard" not in line and "srun" not in line[0] and str(epoch) in line:
                return process
        raise AssertionError(f"no rank of world {epoch} on {node}")

    def steps(self) -> list[str]:
        """Worlds that Slurm knows of."""
        lines = self._site.run(
            "squeue", "--steps", "--noheader", "--format=%i %j", f"--job={self.id}"
        ).splitlines()
        return [line for line in lines if line.endswith(" world")]

    def check_gone(self, run_id: str) -> None:
        assert wait_gone(of_run(run_id), 20.0) == [], self.logs()
        shm = Path("/dev/shm")
        self.wait(lambda: not list(shm.glob(f"phalanx-{run_id}-*")), "removal of shared memory", 20.0)


class Follower:
    """A stream that is taken up again wherever the job serves by then."""

    def __init__(self, job: Job, prompt: str, max_tokens: int = NUM_TOKENS) -> None:
        self._job = job
        self._body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        self._last = ""
        self.request_id = ""
        self.text = ""
        self.pieces = 0
        self.connections = 0
        self.told: list[str] = []
        """Errors, while the job was away."""
        self.done = False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def wait_begun(self, pieces: int = 3) -> None:
        self._job.wait(lambda: self.pieces >= pieces, f"{pieces} pieces of a stream")

    def finish(self, timeout_s: float = 120.0) -> str:
        self._thread.join(timeout_s)
        assert self.done, f"{self.pieces} pieces, {self.told}\n{self._job.logs()}"
        return self.text

    def _follow(self) -> None:
        deadline = time.monotonic() + 150.0
        while not self.done and time.monotonic() < deadline:
            try:
                self._read()
            except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
                self.told.append(repr(error)[:200])
                time.sleep(0.1)

    def _read(self) -> None:
        if self.request_id:
            path = f"/v1/requests/{self.request_id}/stream"
            headers = {"last-event-id": self._last} if self._last else {}
            asked = httpx.stream("GET", self._job.url + path, headers=headers, timeout=60)
        else:
            headers = {"accept": "text/event-stream"}
            asked = httpx.stream(
                "POST", f"{self._job.url}/v1/completions", json=self._body, headers=headers, timeout=60
            )
        with asked as answer:
            answer.raise_for_status()
            self.connections += 1
            self.request_id = answer.headers["x-phalanx-request-id"]
            event_id = ""
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    event_id = line[4:]
                elif line == "data: [DONE]":
                    self.done = True
                    return
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        self.told.append(str(chunk["error"]))
                        return
                    self._last = event_id
                    self.pieces += 1
                    self.text += "".join(choice["text"] for choice in chunk["choices"])


@pytest.fixture(scope="module")
def job(site: Site, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The one that the tests of Open MPI do things to, in their order."""
    flags = ("--tp", "2", "--spare", "warm", "--notice", "60", "--drain-timeout", "4")
    return Job(site, model, tmp_path_factory.mktemp("job"), *flags)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> str:
    """What the model says to PROMPT."""
    job.wait_active()
    return Follower(job, PROMPT).finish()


PROMPT = "Once upon a time"


def test_serves_on_all_nodes_and_says_where(site: Site, job: Job, undisturbed: str) -> None:
    world = job.wait_active()
    assert [rank["host"] for rank in world["ranks"]] == list(NODES)
    assert len(undisturbed) > 10
    assert job.endpoint["node"] == NODES[0] and job.endpoint["job_id"] == job.id
    assert f"world {world['epoch']}  active" in job.phalanx("status", "--job", job.id)
    job.wait(lambda: f"phalanx {job.url}" in site.run("squeue", "--format=%k", f"--job={job.id}"), "comment")
    (job.run_dir / f"slurm-{job.id}.json").rename(job.run_dir / "aside")  # as where no file system is shared
    assert f"world {world['epoch']}  active" in job.phalanx("status", "--job", job.id)
    (job.run_dir / "aside").rename(job.run_dir / f"slurm-{job.id}.json")


def test_streams_go_on_when_a_rank_is_killed(job: Job, undisturbed: str) -> None:
    job.wait(lambda: len(job.steps()) == 2, "step of the spare beside the one that serves")
    world = job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    old = job.rank(NODES[1], world["epoch"])
    old.kill()
    after = job.wait_active(above=world["epoch"])
    job.pace.write_text("")
    assert stream.finish() == undisturbed and stream.connections == 1 and not stream.told
    assert [rank["host"] for rank in after["ranks"]] == list(NODES)
    assert wait_gone([old]) == []
    job.wait(lambda: len(job.steps()) == 2, "two steps: the next spare, and none of the world that died")


def test_a_killed_supervisor_is_followed_by_another(job: Job, undisturbed: str) -> None:
    world = job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    record = json.loads((job.run_dir / "processes.json").read_text())["supervisor"]
    psutil.Process(record["pid"]).kill()
    job.wait(
        lambda: json.loads((job.run_dir / "processes.json").read_text())["supervisor"] != record,
        "next supervisor",
    )
    job.pace.write_text("")
    assert stream.finish() == undisturbed and stream.connections == 1 and not stream.told
    assert job.wait_active()["epoch"] == world["epoch"]
    assert job.state() == "RUNNING"


def test_a_node_that_is_cut_off_and_comes_back(site: Site, job: Job, undisturbed: str) -> None:
    """Slurm takes minutes to notice; the job goes on all the while, and has its next world when the node answers."""
    world = job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    behind = job.rank(NODES[1], world["epoch"])
    site.hosts.cut(2)
    try:
        assert wait_gone([behind], 20.0) == []
    finally:
        site.hosts.heal(2)
    after = job.wait_active(above=world["epoch"])
    job.pace.write_text("")
    assert stream.finish() == undisturbed and stream.connections == 1 and not stream.told
    assert [rank["host"] for rank in after["ranks"]] == list(NODES)
    assert job.state() == "RUNNING"


def test_leaves_before_its_time_ends_and_takes_up_what_was_left(
    site: Site, job: Job, undisturbed: str
) -> None:
    """USR1 as --signal has it sent: what can finish does, what is new is refused, and the next run does the rest."""
    run_id, before = job.run_id, job.wait_active()
    job.pace.write_text(SLOWLY)
    long, short = Follower(job, PROMPT), Follower(job, "a", 20)
    long.wait_begun()
    short.wait_begun()
    url = job.url
    site.run("scancel", "--signal=USR1", "--batch", job.id)

    def is_refused() -> bool:
        return httpx.post(f"{url}/v1/completions", json={"prompt": "new", "max_tokens": 1}).status_code == 503

    job.wait(is_refused, "503 for new work")
    short.finish()
    assert short.connections == 1 and not short.told
    job.wait(lambda: job.state() in ("PENDING", "COMPLETING"), "requeue")
    job.pace.write_text("")
    job.check_gone(run_id)
    assert long.finish() == undisturbed and long.connections > 1
    assert any("shut down" in told for told in long.told)
    assert job.run_id != run_id and job.wait_active()["epoch"] > before["epoch"]


def test_preempted_by_a_job_that_is_more_urgent(site: Site, job: Job, undisturbed: str) -> None:
    run_id = job.run_id
    job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    options = ("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    site.run("sbatch", *options)
    job.wait(lambda: job.state() in ("PENDING", "COMPLETING"), "preemption")
    job.check_gone(run_id)
    job.pace.write_text("")
    assert stream.finish() == undisturbed and stream.connections > 1


def test_cancelled(site: Site, job: Job) -> None:
    job.wait_active()
    run_id, endpoint = job.run_id, job.run_dir / f"slurm-{job.id}.json"
    site.run("scancel", job.id)
    job.wait(lambda: not job.state(), "end of the job")
    job.check_gone(run_id)
    assert not endpoint.exists()
    with pytest.raises(AssertionError, match="serves nothing now: it is CANCELLED"):
        job.phalanx("status", "--job", job.id)


def test_mpich(site: Site, model: Path, tmp_path: Path) -> None:
    python = str(environment_with("mpich"))
    job = Job(site, model, tmp_path, "--tp", "2", "--spare", "none", "--interface", "up0", python=python)
    world = job.wait_active()
    assert [rank["host"] for rank in world["ranks"]] == list(NODES)
    libraries = Path(f"/proc/{job.rank(NODES[1], world['epoch']).pid}/maps").read_text()
    assert "mpis/mpich/lib/libmpi" in libraries
    expected = Follower(job, PROMPT).finish()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    job.rank(NODES[1], world["epoch"]).kill()
    job.wait_active(above=world["epoch"])
    job.pace.write_text("")
    assert stream.finish() == expected and stream.connections == 1 and not stream.told
    run_id = job.run_id
    site.run("scancel", job.id)
    job.wait(lambda: not job.state(), "end of the job")
    job.check_gone(run_id)
