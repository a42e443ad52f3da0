"""The manifests under k8s/ and what `phalanx k8s render` makes of them: valid by the operators' own definitions, the
same as kubectl makes, and with flags that `phalanx serve` understands."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launcher.cli import build_parser, main
from launcher.k8s_render import FOLDER, KINDS, OVERLAYS, render
from launcher.kustomize import build
from launcher.settings import Settings
from tests.strict_schemas import check

ALL = [(kind, overlay) for kind in KINDS for overlay in OVERLAYS]
every = pytest.mark.parametrize(("kind", "overlay"), ALL)
Manifest = dict[str, Any]
ROOT = Path(__file__).parents[2]


def rendered(*arguments: str) -> list[Manifest]:
    words = ["k8s", "render", "smollm2-135m-instruct", *arguments]
    return render(build_parser().parse_args(words))


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def roles(manifests: list[Manifest]) -> Manifest:
    return dict(one(manifests, "MPIJob")["spec"]["mpiReplicaSpecs"])


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """Launcher and workers."""
    for manifest in manifests:
        if manifest["kind"] == "MPIJob":
            return [role["template"]["spec"] for role in manifest["spec"]["mpiReplicaSpecs"].values()]
        if manifest["kind"] == "TrainingRuntime":
            jobs = manifest["spec"]["template"]["spec"]["replicatedJobs"]
            return [job["template"]["spec"]["template"]["spec"] for job in jobs]
    raise AssertionError("no job")


@pytest.mark.slow
@every
def test_every_field_is_one_that_the_definitions_have(kind: str, overlay: str) -> None:
    for manifest in build(FOLDER / kind / "overlays" / overlay):
        check(manifest)
    for arguments in (
        ("--pp", "2"),
        ("--tp", "2", "--pp", "3"),
        ("--pp", "2", "--no-secrets", "--no-monitoring", "--namespace", "serving"),
    ):
        for manifest in rendered("--kind", kind, "--overlay", overlay, *arguments):
            check(manifest)


@pytest.mark.parametrize("place", ["top", "job", "pod", "service"])
def test_a_field_that_is_not_there_is_an_error(place: str) -> None:
    manifests = rendered()
    manifest = copy.deepcopy(one(manifests, "MPIJob") if place != "service" else manifests[-1])
    at = {
        "top": manifest,
        "job": manifest["spec"],
        "pod": pods([manifest])[0] if place == "pod" else {},
        "service": manifest["spec"],
    }[place]
    at["slotPerWorker"] = 2
    with pytest.raises(
        (jsonschema.ValidationError, kubernetes_validate.ValidationError), match="slotPerWorker"
    ):
        check(manifest)


@every
@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="needs `kubectl` 1.21 or newer, for its kustomize"
)
def test_kubectl_makes_the_same(kind: str, overlay: str) -> None:
    folder = FOLDER / kind / "overlays" / overlay
    text = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout
    theirs = list(yaml.safe_load_all(text))
    ours = build(folder)

    def key(manifest: Manifest) -> tuple[str, str]:
        return manifest["kind"], manifest["metadata"]["name"]

    assert sorted(ours, key=key) == sorted(theirs, key=key)


@every
def test_serve_understands_the_launcher(kind: str, overlay: str, tmp_path: Path) -> None:
    launcher = pods(rendered("--kind", kind, "--overlay", overlay, "--tp", "3", "--pp", "2", "--no-secrets"))[
        0
    ]
    host_file = tmp_path / "hostfile"
    host_file.write_text("phalanx-launcher-0-0.phalanx slots=3\nphalanx-node-0-0.phalanx slots=3\n")
    arguments = [
        argument.replace("/etc/mpi/hostfile", str(host_file))
        for argument in launcher["containers"][0]["args"]
    ]
    settings = Settings.from_arguments(build_parser().parse_args(arguments))
    assert (settings.model, settings.tp, settings.pp) == ("smollm2-135m-instruct", 3, 2)
    assert settings.host == "0.0.0.0" and settings.zmq == "tcp://0.0.0.0:5555"
    ports = {port["name"]: port["containerPort"] for port in launcher["containers"][0]["ports"]}
    assert ports == {"http": settings.port, "grpc": settings.grpc_port, "zmq": 5555}
    assert launcher["terminationGracePeriodSeconds"] > settings.drain_timeout


@every
def test_the_page_says_what_is_probed(kind: str, overlay: str) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    container = pods(rendered("--kind", kind, "--overlay", overlay, "--pp", "2"))[0]["containers"][0]
    for name in ("startup", "readiness", "liveness"):
        assert f"| {name} probe: `{container[f'{name}Probe']['httpGet']['path']}` |" in page
    pod = pods(rendered("--kind", kind, "--overlay", overlay, "--pp", "2"))[0]
    assert f"Pods have {pod['terminationGracePeriodSeconds']} s" in page
    for flag in ("--drain-timeout=120", "--stopped-exit-code=143", "--open-metrics"):
        assert flag in container["args"] and flag.replace("=", " ") in page


@every
def test_pods_have_no_more_than_they_need(kind: str, overlay: str) -> None:
    for pod in pods(rendered("--kind", kind, "--overlay", overlay, "--tp", "2", "--pp", "2")):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        (memory,) = (volume for volume in pod["volumes"] if volume["name"] == "shared-memory")
        assert memory["emptyDir"]["medium"] == "Memory"
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_stays_until_its_ranks_have_ended(kind: str) -> None:
    """Its preStop hook, run by a shell while a process looks like a rank."""
    launcher, worker = pods(rendered("--kind", kind, "--pp", "2"))
    assert worker["terminationGracePeriodSeconds"] >= launcher["terminationGracePeriodSeconds"]
    name = f"k8s.{kind}.engine.rank"
    command = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    command = [word.replace(r"engine\.rank", name.replace(".", r"\.")) for word in command]
    assert r"engine\.rank" in command[-1], "others' ranks on this machine are not meant"
    rank = subprocess.Popen([sys.executable, "-c", "input()", name], stdin=subprocess.PIPE)
    try:
        hook = subprocess.Popen(command)
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(0.3)
    finally:
        rank.kill()
        rank.wait()
    assert hook.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "slots", "workers", "available"),
    [
        (("--tp", "2", "--pp", "3"), 2, 2, 2),
        (("--tp", "4"), 4, 0, 1),
        (("--tp", "4", "--ranks-per-pod", "1"), 1, 3, 3),
        (("--tp", "3", "--pp", "2", "--ranks-per-pod", "4"), 4, 1, 1),
    ],
)
def test_pods_hold_the_ranks(arguments: tuple[str, ...], slots: int, workers: int, available: int) -> None:
    manifests = rendered("--overlay", "gpu", *arguments)
    spec = one(manifests, "MPIJob")["spec"]
    assert spec["slotsPerWorker"] == slots and spec["runLauncherAsWorker"]
    # The operator refuses a role of no pods.
    assert ("Worker" in spec["mpiReplicaSpecs"]) == bool(workers)
    if workers:
        assert spec["mpiReplicaSpecs"]["Worker"]["replicas"] == workers
    assert one(manifests, "PodDisruptionBudget")["spec"]["minAvailable"] == available
    for pod in pods(manifests):
        resources = pod["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == slots and resources["requests"]["cpu"] == str(slots)
    if workers:
        manifests = rendered("--kind", "trainjob", *arguments)
        policy = one(manifests, "TrainingRuntime")["spec"]["mlPolicy"]
        # The Trainer makes this many launchers; the nodes are what the TrainJob says, less one.
        assert policy["numNodes"] == 1 and policy["mpi"]["numProcPerNode"] == slots
        assert one(manifests, "TrainJob")["spec"]["trainer"]["numNodes"] == workers + 1


def test_names_and_flags() -> None:
    manifests = rendered(
        *("--name", "chat", "--namespace", "serving", "--image", "here/phalanx:1"),
        *("--dtype", "float32", "--drain-timeout", "30", "--deterministic"),
    )
    assert all(re.match(r"chat(-|$)", manifest["metadata"]["name"]) for manifest in manifests)
    assert all(manifest["metadata"]["namespace"] == "serving" for manifest in manifests)
    service = next(m for m in manifests if m["metadata"]["name"] == "chat-http")
    assert service["spec"]["selector"]["training.kubeflow.org/job-name"] == "chat"
    launcher = pods(manifests)[0]
    claims = {
        v["persistentVolumeClaim"]["claimName"] for v in launcher["volumes"] if "persistentVolumeClaim" in v
    }
    assert claims == {"chat-models", "chat-run"}
    container = launcher["containers"][0]
    assert container["image"] == "here/phalanx:1"
    assert {"--dtype=float32", "--drain-timeout=30", "--deterministic"} < set(container["args"])
    assert "--drain-timeout=120" not in container["args"]
    assert "phalanx-" not in yaml.safe_dump_all(manifests)


def test_files_for_kubectl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "render", "smollm2-135m-instruct", "--tp", "2", "-o", str(tmp_path / "out")]) == 0
    kustomization = yaml.safe_load((tmp_path / "out/kustomization.yaml").read_text())
    written = [yaml.safe_load((tmp_path / "out" / name).read_text()) for name in kustomization["resources"]]
    assert written == rendered("--tp", "2")
    capsys.readouterr()
    assert main(["k8s", "render", "smollm2-135m-instruct", "--tp", "2"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == written


@pytest.mark.slow
def test_a_wheel_has_them(tmp_path: Path) -> None:
    """And what was installed from it renders. No compiler: the kernels are not what is looked at."""
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in names.splitlines():
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*pip, str(source)], check=True, env={**os.environ, "CXX": "/bin/false"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("k8s/")}
        archive.extractall(tmp_path / "installed")
    assert packed == {str(path.relative_to(ROOT)) for path in FOLDER.rglob("*.yaml")}
    words = ["-m", "launcher.cli", "k8s", "render", "smollm2-135m-instruct", "--tp", "2"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert list(yaml.safe_load_all(done.stdout)) == rendered("--tp", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hosts", "a,b"), "--hosts: the operator makes the host file"),
        (("--api-key", "secret"), "--api-key: it would stand in the manifest"),
        (("--kind", "trainjob"), "--kind trainjob has a launcher and at least one node"),
        (("--ranks-per-pod", "3"), "--ranks-per-pod 3: must be from 1 to 2"),
        (("--name", "Chat"), "--name Chat: must be small letters"),
        (("--tp", "0"), "--tp 0"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["k8s", "render", "smollm2-135m-instruct", "--tp", "2", *arguments]) == 2
    assert message in capsys.readouterr().err
