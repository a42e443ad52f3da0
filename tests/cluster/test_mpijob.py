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
from tests.recovery.test_other_mpis import environment_with
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

USER = "phalanx:x:1000:1000::/home/phalanx:/bin/bash\n"


def image(python: Path) -> Image:
    """What the Dockerfile makes, with the packages of this interpreter in place of /opt/phalanx."""
    return Image(
        entrypoint=[str(python), "-m", "launcher.cli"],
        variables={
            "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/home/phalanx",
            "PYTHONPATH": str(ROOT),
            "PHALANX_CACHE": "/var/cache/phalanx",
            # Pods here share their cores, which no rank can know: one that spins holds up the one that it waits for.
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
        },
        files={
            "/etc/passwd": f"root:x:0:0:root:/root:/bin/bash\n{USER}",
            "/etc/group": "root:x:0:\nphalanx:x:1000:\n",
            "/etc/nsswitch.conf": "hosts: files\npasswd: files\ngroup: files\n",
            "/etc/ssh/ssh_config": (ROOT / "docker/ssh_config").read_text(),
            "/etc/phalanx/sshd_config": (ROOT / "docker/sshd_config").read_text(),
        },
    )


def phalanx(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "launcher.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


PROMPTS = ["one two three", "a b c d e f g", "Once upon a time"]
NUM_TOKENS = 150


class Job:
    """One MPIJob whose pods are started and ended by the tests, as operator and cluster would."""

    def __init__(self, folder: Path, model: Path, mpi: str = "OpenMPI", python: str = sys.executable) -> None:
        self._folder = folder
        rendered = phalanx(
            *("k8s", "render", "/var/cache/phalanx/tiny", "--tp", "1", "--pp", "2"),
            *("--dtype", "float32", "--max-wait-s", "120"),
        )
        self.manifest = next(each for each in yaml.safe_load_all(rendered) if each["kind"] == "MPIJob")
        self.manifest["spec"]["mpiImplementation"] = mpi
        self.name = operator.name_of(self.manifest)
        self._cluster = node(folder, image(Path(python)))
        self.node: Node = self._cluster.__enter__()
        for claim in ("phalanx-run", "phalanx-models"):
            self.node.claims[claim] = folder / f"claim-{claim}"
            self.node.claims[claim].mkdir()
        shutil.copytree(model, self.node.claims["phalanx-models"] / model.name)
        subprocess.run(["chmod", "-R", "a+rX", self.node.claims["phalanx-models"]], check=True)
        self._put_texts(folder)
        self.url = ""
        """As through the Service of the launcher: wherever it is."""

    def _put_texts(self, folder: Path) -> None:
        """What the operator makes, and the Secrets that docs/kubernetes.md asks for."""
        keys, curve, api_keys = folder / "keys", folder / "curve", folder / "keys.json"
        keys.mkdir()
        self.node.put(f"{self.name}-ssh", operator.make_keys(keys))
        hosts, script = operator.host_file(self.manifest), operator.discover_hosts(self.manifest)
        self.node.put(f"{self.name}-config", {"hostfile": hosts, "discover_hosts.sh": script})
        phalanx("curve-keygen", str(curve), "--client", "client")
        files = {"server.key_secret": "server.key_secret", "client.key": "authorized_clients/client.key"}
        self.node.put("phalanx-curve", {key: (curve / file).read_text() for key, file in files.items()})
        shown = phalanx("keys", "add", "test", "--file", str(api_keys))
        self.node.put("phalanx-api-keys", {"keys.json": api_keys.read_text()})
        self.headers = {"authorization": f"Bearer {shown.split()[0]}"}

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
            return self.node.ask(lambda: httpx.get(self.url + path, headers=self.headers, timeout=10))
        except httpx.HTTPError:
            return None

    def probe(self, name: str) -> int:
        """What the kubelet gets, which has no key, for the probe of this name in the manifest."""
        path = self.launcher.manifest["spec"]["containers"][0][name]["httpGet"]["path"]
        try:
            return self.node.ask(lambda: httpx.get(self.url + path, timeout=10)).status_code
        except httpx.HTTPError:
            return 0

    def status(self, path: str) -> int:
        answer = self.get(path)
        return answer.status_code if answer is not None else 0

    def why_not_ready(self) -> str:
        """Empty where nobody answers, or a world serves."""
        answer = self.get("/health/ready")
        return "" if answer is None else str(answer.json().get("reason", ""))

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
        files = sorted(self.node.claims["phalanx-run"].rglob("*.log"))
        return "\n".join(f"== {file}\n{file.read_text(errors='replace')[-2000:]}" for file in files)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slow enough for streams to be under way when something is killed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_llama(
        folder, num_layers=16, hidden=288, head_dim=32, intermediate=768, max_model_len=2048
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Job]:
    """The launcher comes before its worker: `phalanx serve` waits, alive and not ready."""
    job = Job(tmp_path_factory.mktemp("job"), model)
    job.start_launcher()
    try:
        wait_until(lambda: job.probe("startupProbe") == 200, 60.0, job.launcher.log)
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
        return lambda: follow(job, "/v1/completions", body, followed, job.headers)

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
    wait_until(lambda: "phalanx-worker-0" in served.why_not_ready(), 30.0, lambda: served.why_not_ready())
    assert served.status("/health/ready") == 503
    assert served.probe("livenessProbe") == 200 and served.launcher.exit_code is None
    assert served.probe("readinessProbe") == 503
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


@pytest.mark.parametrize("silently", [False, True], ids=["killed", "cut off"])
def test_a_worker_pod_is_lost_and_comes_back(served: Job, texts: list[str], silently: bool) -> None:
    """With a new address, and for a while without any, or with one that nobody has: in the same launcher pod, in the
    same connections."""
    world = served.world()
    first = served.worker.address
    streams = Streams(served)
    streams.wait_begun(5)
    if silently:  # the node is gone; its pod is deleted, and known, until the cluster gives it up
        served.node.unplug(served.worker.name)
    served.node.kill(served.worker.name, forget=not silently)
    wait_until(lambda: "phalanx-worker-0" in served.why_not_ready(), 60.0, lambda: served.why_not_ready())
    time.sleep(3.0)  # as long as it takes until a pod is scheduled again, and longer than a few attempts
    assert served.status("/health/ready") == 503
    assert served.probe("livenessProbe") == 200 and served.launcher.exit_code is None
    assert served.probe("readinessProbe") == 200, "requests are held, and no Service should turn them away"
    if silently:
        served.node.remove(served.worker.name)
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
    served.start_launcher()
    served.world(above=world["epoch"])
    assert streams.finish() == texts
    assert min(streams.connections) >= 2
    assert served.worker is worker and worker.exit_code is None


def test_sigterm_drains(served: Job, texts: list[str]) -> None:
    """As the kubelet ends a pod: what runs is finished in its time of grace, and the Job is not done with that."""
    served.world()
    streams = Streams(served)
    streams.wait_begun(5)
    served.launcher.send(signal.SIGTERM)
    assert streams.finish() == texts and streams.connections == [1, 1, 1]
    assert served.launcher.wait(30.0) == 143, served.launcher.log()
    wait_until(
        lambda: alive(served.worker, "engine.rank") == [], 10.0, lambda: alive(served.worker, "engine")
    )
    assert list(served.node.claims["phalanx-run"].glob("*.sock")) == []


@pytest.mark.parametrize("mpi", ["MPICH", "Intel"])
def test_other_implementations(mpi: str, model: Path, tmp_path: Path) -> None:
    """`mpiImplementation`: the operator's other dialects and variables, with the worker killed and back."""
    python = environment_with(mpi.lower())
    job = Job(tmp_path, model, mpi, str(python))
    try:
        job.start_worker()
        job.start_launcher("--mpi", mpi.lower(), "--spare", "none")
        world = job.world()
        assert [rank["host"] for rank in world["ranks"]] == ["phalanx-launcher", "phalanx-worker-0"]
        undisturbed = Streams(job).finish()
        streams = Streams(job)
        streams.wait_begun(5)
        job.node.kill(job.worker.name)
        wait_until(lambda: job.status("/health/ready") == 503, 30.0, job.logs)
        job.start_worker()
        job.world(above=world["epoch"])
        assert streams.finish() == undisturbed and streams.connections == [1, 1, 1]
        job.launcher.send(signal.SIGTERM)
        assert job.launcher.wait(30.0) == 143, job.launcher.log()
    finally:
        job.close()
