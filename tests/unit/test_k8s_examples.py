"""The examples in k8s/examples and the commands of docs/kubernetes.md: what can be said of them without a cluster."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import build_parser, main
from launcher.k8s_render import FOLDER, render
from tests.docs_pages import ROOT, Command, commands
from tests.strict_schemas import check

EXAMPLES = sorted((FOLDER / "examples").glob("*.yaml"))
PAGE = ROOT / "docs" / "kubernetes.md"
Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def launcher(kind: str = "mpijob") -> Manifest:
    """The template of its pod."""
    words = ["k8s", "render", "smollm2-135m-instruct", "--pp", "2", "--kind", kind]
    for manifest in render(build_parser().parse_args(words)):
        if manifest["kind"] == "MPIJob":
            return dict(manifest["spec"]["mpiReplicaSpecs"]["Launcher"]["template"])
        if manifest["kind"] == "TrainingRuntime":
            return dict(
                manifest["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
            )
    raise AssertionError(kind)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_schemas_allow_the_examples(path: Path) -> None:
    for manifest in documents(path):
        check(manifest)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_field_that_nobody_knows_is_refused(path: Path) -> None:
    for manifest in documents(path):
        if "spec" in manifest:
            manifest["spec"]["scaleTargetReff"] = {}
            with pytest.raises(Exception, match="scaleTargetReff"):
                check(manifest)


def test_the_metrics_are_ours() -> None:
    described = (ROOT / "docs" / "operations.md").read_text()
    text = "".join((FOLDER / "examples" / name).read_text() for name in ("keda.yaml", "hpa.yaml"))
    named = set(re.findall(r"phalanx_(\w+)", text))
    assert named == {"num_requests_waiting", "kv_cache_usage_perc"}
    source = "".join(path.read_text() for path in (ROOT / "gateway").glob("*metrics*.py"))
    for name in named:
        assert f"`{name}`" in described and name in source


def test_what_is_scaled_is_there() -> None:
    named = {(m["kind"], m["metadata"]["name"]) for m in documents(FOLDER / "examples" / "jobs.yaml")}
    for name in ("keda.yaml", "hpa.yaml"):
        (scaler,) = documents(FOLDER / "examples" / name)
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in named


@pytest.mark.parametrize("kind", ["mpijob", "trainjob"])
def test_the_pool_finds_launchers(kind: str) -> None:
    (pool,) = documents(FOLDER / "examples" / "llm-d.yaml")
    pod = launcher(kind)
    assert pool["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    ports = {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {port["number"] for port in pool["spec"]["targetPorts"]} <= ports


def test_serve_understands_the_inference_service() -> None:
    (service,) = documents(FOLDER / "examples" / "kserve.yaml")
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    options = build_parser().parse_args(container["args"])
    assert int(options.port) == container["ports"][0]["containerPort"]
    assert predictor["terminationGracePeriodSeconds"] > float(options.drain_timeout)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in predictor["volumes"]}


def test_a_job_runs_as_long_as_its_pod_is_there(tmp_path: Path) -> None:
    """The script of the StatefulSet, with a kubectl that writes down what it is asked."""
    (holder,) = (m for m in documents(FOLDER / "examples" / "jobs.yaml") if m["kind"] == "StatefulSet")
    (container,) = holder["spec"]["template"]["spec"]["containers"]
    asked = tmp_path / "asked"
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    (tmp_path / "kubectl").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "POD_NAME": "phalanx-jobs-2"}
    process = subprocess.Popen(
        [*container["command"], *container["args"]], env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not asked.exists() or not asked.read_text().endswith("\n"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # its sleep, which a kubelet ends with the container
            os.killpg(process.pid, signal.SIGKILL)
    patches = re.findall(r"patch mpijob (\S+) --type merge -p (\{.*\})", asked.read_text())
    assert patches == [
        ("phalanx-2", '{"spec":{"runPolicy":{"suspend":false}}}'),
        ("phalanx-2", '{"spec":{"runPolicy":{"suspend":true}}}'),
    ]


# ----------------------------------------------------------------- the page


def run(command: Command, folder: Path) -> str:
    """One command of the page; kubectl makes what it would send, and sends nothing."""
    if command.program == "phalanx":
        assert main(command.words[1:]) == 0, command.place
        return ""
    words = [*command.words, "--dry-run=client", "-o", "yaml"]
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command.place}: {done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs `kubectl`, which makes Secrets from files")
def test_the_pages_secrets_are_what_the_launcher_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands of the page in their order, but those that need a cluster."""
    monkeypatch.chdir(tmp_path)
    made = {}
    for command in commands(PAGE):
        if command.program == "phalanx" or command.words[:3] == ("kubectl", "create", "secret"):
            for manifest in yaml.safe_load_all(run(command, tmp_path)):
                check(manifest)
                made[manifest["metadata"]["name"]] = set(manifest["data"])
    capsys.readouterr()
    for volume in launcher()["spec"]["volumes"]:
        if "secret" in volume:
            needed = {item["key"] for item in volume["secret"].get("items", [{"key": "keys.json"}])}
            assert needed <= made[volume["secret"]["secretName"]], volume
    (service,) = documents(FOLDER / "examples" / "kserve.yaml")
    (variable,) = service["spec"]["predictor"]["containers"][0]["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    assert reference["key"] in made[reference["name"]]


def test_what_the_page_applies_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of this repository, or such as a command before it has written."""
    monkeypatch.chdir(tmp_path)
    applied = 0
    for command in commands(PAGE):
        if command.words[:3] == ("phalanx", "k8s", "render"):
            assert main(command.words[1:]) == 0
        if command.words[:2] == ("kubectl", "apply"):
            applied += 1
            flag, place = command.words[2:4]
            written = any((folder / place).exists() for folder in (tmp_path, ROOT))
            assert flag in ("-f", "-k") and written, command.place
    capsys.readouterr()
    assert applied >= 3
