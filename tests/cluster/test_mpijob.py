"""An MPIJob as the MPI Operator runs it: pods with addresses, processes and a read-only root of their own, the
operator's host file, keys and environment, a real sshd in the worker, all as the user of the manifest. Ranks, worker
and launcher are killed and come back; streams go on."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from launcher.processes import environment_of
from launcher.run_dir import EPOCH_VARIABLE
from tests.cluster import mpi_operator as operator
from tests.cluster.pods import ROOT, Image, Node, Pod, node, wait_until, why_not
from tests.recovery.test_front import Followed, follow
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

JOB = ROOT / "tests/cluster/mpijob.yaml"
USER = "phalanx:x:1000:1000::/home/phalanx:/bin/bash\n"
IMAGE = Image(
    entrypoint=[str(Path(sys.prefix) / "bin/phalanx")],
    variables={
        "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
        "HOME": "/home/phalanx",
        "PYTHONPATH": str(ROOT),
        "PHALANX_CACHE": "/models/cache",
        "GOMP_SPINCOUNT": "1000",
    },
    files={
        "/etc/passwd": f"root:x:0:0:root:/root:/bin/bash\n{USER}",
        "/etc/group": "root:x:0:\nphalanx:x:1000:\n",
        "/etc/nsswitch.conf": "hosts: files\npasswd: files\ngroup: files\n",
        "/etc/ssh/ssh_config": "Port 2222\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n",
        "/etc/phalanx/sshd_config": (
            "Port 2222\nHostKey /home/phalanx/.ssh/id_rsa\nPidFile /tmp/sshd.pid\nStrictModes no\n"
        ),
    },
)
PROMPTS = ["one two three", "a b c d e f g", "Once upon a time"]
NUM_TOKENS = 300


class Job:
    """One MPIJob whose pods are started and ended by the tests, as operator and cluster would."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder = folder
        self.manifest = yaml.safe_load(JOB.read_text())
        self.name = operator.name_of(self.manifest)
        self._cluster = node(folder, IMAGE)
        self.node: Node = self._cluster.__enter__()
        for claim in ("run", "models"):
            self.node.claims[claim] = folder / f"claim-{claim}"
            self.node.claims[claim].mkdir()
        shutil.copytree(model, self.node.claims["models"] / model.name)
        subprocess.run(["chmod", "-R", "a+rX", self.node.claims["models"]], check=True)
        keys = folder / "keys"
        keys.mkdir()
        self.node.put(f"{self.name}-ssh", operator.make_keys(keys))
        texts = {"hostfile": operator.host_file(self.manifest), "discover_hosts.sh": ""}
        self.node.put(
            f"{self.name}-config", texts | {"discover_hosts.sh": operator.discover_hosts(self.manifest)}
        )
        self.url = ""
        """As through the Service of the launcher: wherever it is."""

    def close(self) -> None:
        self._cluster.__exit__(None, None, None)

    @property
    def launcher(self) -> Pod:
        return self.node.pods[f"{self.name}-launcher"]

    @property
    def worker(self) -> Pod:
        return self.node.pods[f"{self.name}-worker-0"]

    def start_launcher(self, *more: str) -> None:
        manifest = operator.launcher(self.manifest)
        manifest["spec"]["containers"][0]["args"] += more
        self.node.start(manifest)
        self.url = f"http://{self.launcher.address}:8000"

    def start_worker(self) -> None:
        self.node.start(operator.worker(self.manifest, 0))

    # ----------------------------------------------------------------- what clients see

    def get(self, path: str) -> httpx.Response | None:
        """None where nobody answers."""
        try:
            return self.node.ask(lambda: httpx.get(self.url + path, timeout=10))
        except httpx.HTTPError:
            return None

    def status(self, path: str) -> int:
        answer = self.get(path)
        return answer.status_code if answer is not None else 0

    def world(self, above: int = 0, timeout_s: float = 90.0) -> dict[str, Any]:
        """The one that serves, once there is one of a higher epoch."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            assert self.launcher.exit_code is None, self.launcher.log()
            answer = self.get("/cluster")
            cluster = answer.json() if answer is not None else {"worlds": [], "serving_epoch": None}
            serving = cluster["serving_epoch"]
            found[:] = [world for world in cluster["worlds"] if world["epoch"] == serving and serving > above]
            return bool(found)

        wait_until(look, timeout_s, lambda: f"{self.launcher.log()}\n{self.logs()}")
        return found[0]

    def logs(self) -> str:
        files = sorted(self.node.claims["run"].rglob("*.log"))
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slow enough for streams to be under way when something is killed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_llama(
        folder, num_layers=12, hidden=288, head_dim=32, intermediate=768, max_model_len=2048
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Job]:
    """The launcher comes before its worker: `phalanx serve` waits, alive and not ready."""
    job = Job(tmp_path_factory.mktemp("job"), model)
    job.start_launcher("--dtype", "float32", "--max-wait-s", "120")
    try:
        wait_until(lambda: job.status("/health/live") == 200, 60.0, job.launcher.log)
        yield job
    finally:
        job.close()


def alive(pod: Pod, what: str) -> list[psutil.Process]:
    """Processes of a pod with this in their command lines, guards and mpirun aside."""
    found = []
    for process in pod.processes():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        others = "launcher.guard" in line or any(
            part.endswith(("mpirun", "prterun", "ssh")) for part in line[:1]
        )
        if what in line and not others:
            found.append(process)
    return found


def ranks(pod: Pod, epoch: int) -> list[psutil.Process]:
    return [p for p in alive(pod, "engine.rank") if environment_of(p.pid).get(EPOCH_VARIABLE) == str(epoch)]


class Streams:
    """One for each prompt, read to its end over however many connections."""

    def __init__(self, job: Job) -> None:
        body = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "model": "tiny"}
        self.all = [Followed() for _ in PROMPTS]
        self._threads = [
            job.node.thread(self._reader(job, {**body, "prompt": prompt}, followed))
            for prompt, followed in zip(PROMPTS, self.all, strict=True)
        ]

    @staticmethod
    def _reader(job: Job, body: dict[str, Any], followed: Followed) -> Callable[[], None]:
        return lambda: follow(job, "/v1/completions", body, followed)

    def wait_begun(self, pieces: int) -> None:
        wait_until(
            lambda: all(len(followed.chunks) >= pieces or followed.error for followed in self.all),
            90.0,
            lambda: [len(followed.chunks) for followed in self.all],
        )
        assert not any(followed.done for followed in self.all), "too short to be disturbed"

    def finish(self) -> list[str]:
        for thread in self._threads:
            thread.join(180.0)
        for followed in self.all:
            assert followed.error is None and followed.done, followed.error
            assert [usage["completion_tokens"] for usage in followed.usage] == [NUM_TOKENS]
        return [followed.text(0) for followed in self.all]

    @property
    def connections(self) -> list[int]:
        return [followed.connections for followed in self.all]


@pytest.fixture(scope="module")
def texts(served: Job) -> list[str]:
    """What an undisturbed world answers."""
    served.world()
    return Streams(served).finish()


# The tests share one job and go on where the one before has left it.


def test_the_launcher_waits_for_its_workers(served: Job) -> None:
    """The operator may start the launcher first: no name, then no sshd, then a world."""
    wait_until(
        lambda: "phalanx-worker-0" in (served.get("/health/ready") or httpx.Response(0)).text,
        30.0,
        lambda: served.get("/health/ready"),
    )
    answer = served.get("/health/ready")
    assert answer is not None and answer.status_code == 503 and "waiting for" in answer.text, answer
    assert served.status("/health/live") == 200 and served.launcher.exit_code is None
    assert served.status("/health/accepting") == 503
    served.start_worker()
    world = served.world()
    assert [rank["host"] for rank in world["ranks"]] == ["phalanx-launcher", "phalanx-worker-0"]
    assert served.status("/health/ready") == 200
    users = {process.uids().real for pod in served.node.pods.values() for process in pod.processes()}
    assert users == {1000}
    faults = (served.get("/cluster") or httpx.Response(0)).json()["faults"]
    assert [fault for fault in faults if fault["kind"] == "start"] == [], "tried before its hosts were there"


@pytest.mark.parametrize("pod", ["launcher", "worker"])
def test_a_rank_is_killed(served: Job, texts: list[str], pod: str) -> None:
    world = served.world()
    streams = Streams(served)
    streams.wait_begun(5)
    (rank,) = ranks(getattr(served, pod), world["epoch"])
    rank.kill()
    served.world(above=world["epoch"])
    assert streams.finish() == texts and streams.connections == [1, 1, 1]
    assert served.launcher.exit_code is None


def test_a_worker_pod_is_killed_and_comes_back(served: Job, texts: list[str]) -> None:
    """With a new address, and for a while without any: in the same launcher pod, in the same connections."""
    world = served.world()
    first = served.worker.address
    streams = Streams(served)
    streams.wait_begun(5)
    served.node.kill(served.worker.name)
    wait_until(lambda: served.status("/health/ready") == 503, 30.0, served.logs)
    wait_until(
        lambda: "waiting for phalanx-worker-0" in (served.get("/health/ready") or httpx.Response(0)).text,
        30.0,
        lambda: (served.get("/health/ready") or httpx.Response(0)).text,
    )
    time.sleep(3.0)  # as long as it takes until a pod is scheduled again, and longer than a few attempts
    assert served.status("/health/live") == 200 and served.launcher.exit_code is None
    assert served.status("/health/accepting") == 200, (
        "requests are held, and no Service should turn them away"
    )
    served.start_worker()
    assert served.worker.address != first
    served.world(above=world["epoch"])
    assert streams.finish() == texts and streams.connections == [1, 1, 1]
    assert served.status("/health/ready") == 200


def test_the_launcher_pod_is_killed_and_comes_back(served: Job, texts: list[str]) -> None:
    """Its run folder is on a volume: requests go on from the journal, and clients take their streams up again."""
    world = served.world()
    worker = served.worker
    streams = Streams(served)
    streams.wait_begun(5)
    served.node.kill(served.launcher.name)
    wait_until(lambda: alive(worker, "engine.rank") == [], 30.0, lambda: alive(worker, "engine.rank"))
    served.start_launcher("--dtype", "float32", "--max-wait-s", "120")
    served.world(above=world["epoch"])
    assert streams.finish() == texts
    assert min(streams.connections) >= 2
    assert served.worker is worker and worker.exit_code is None


def test_sigterm_drains_and_ends_with_zero(served: Job, texts: list[str]) -> None:
    """As the kubelet ends a pod: what runs is finished, within the time of grace."""
    served.world()
    streams = Streams(served)
    streams.wait_begun(5)
    served.launcher.send(signal.SIGTERM)
    assert streams.finish() == texts and streams.connections == [1, 1, 1]
    assert served.launcher.wait(30.0) == 0, served.launcher.log()
    wait_until(
        lambda: alive(served.worker, "engine.rank") == [], 10.0, lambda: alive(served.worker, "engine")
    )
    assert list(served.node.claims["run"].glob("*.sock")) == []
