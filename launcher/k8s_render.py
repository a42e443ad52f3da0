"""`phalanx k8s render`: the manifests under k8s/ for one model and shape. Called by `cli`; asks no cluster, so that
it runs anywhere."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.errors import SettingsError
from launcher.settings import Settings

Manifest = dict[str, Any]

FOLDER = Path(__file__).parents[1] / "k8s"
KINDS = ("mpijob", "trainjob")
OVERLAYS = ("cpu", "gpu", "rdma", "kind")
DEFAULT_NAME = "phalanx"
_SECRETS = {"--api-key-file": "api-keys", "--zmq-curve-dir": "curve"}
"""Flags of the launcher, and the volume that each reads from."""
_NAMING_KEYS = frozenset(
    {"name", "claimName", "secretName", "app.kubernetes.io/instance"}
    | {"training.kubeflow.org/job-name", "jobset.sigs.k8s.io/jobset-name"}
)
"""Under these stand names of the deployment; elsewhere `phalanx` is a word."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the manifests, and all of `serve`."""
    job = parser.add_argument_group("the manifests")
    job.add_argument(
        "--kind",
        choices=KINDS,
        default="mpijob",
        help="an MPIJob of the MPI Operator, or a TrainJob of the Kubeflow Trainer (default: mpijob)",
    )
    job.add_argument(
        "--overlay",
        choices=OVERLAYS,
        default="cpu",
        help="nodes without GPUs, with GPUs, with GPUs and RDMA, or a laptop's kind cluster (default: cpu)",
    )
    job.add_argument(
        "--image", metavar="IMAGE", help="built from the Dockerfile (default: phalanx-serve:0.1.0)"
    )
    job.add_argument(
        "--name", metavar="NAME", default=DEFAULT_NAME, help="of the job, and beginning of all others"
    )
    job.add_argument(
        "--namespace", metavar="NAME", help="that the manifests say (default: none, kubectl's own)"
    )
    job.add_argument(
        "--ranks-per-pod",
        metavar="N",
        type=int,
        help="default: those of a pipeline stage, so that they share memory",
    )
    job.add_argument(
        "--secrets",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="API keys and CURVE keys from Secrets; without, all who reach the Services may use them (default: yes)",
    )
    job.add_argument(
        "--monitoring",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a ServiceMonitor; needs the Prometheus Operator (default: yes, but for kind)",
    )
    job.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="write a file for each, instead of printing them"
    )
    Settings.add_arguments(parser)


def render(options: argparse.Namespace) -> list[Manifest]:
    """The manifests. Raises SettingsError."""
    from launcher.kustomize import build  # `phalanx --help` does not wait for YAML and its like

    settings = _checked(options)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", options.name):
        raise SettingsError(f"--name {options.name}: must be small letters, digits and hyphens, 42 at most")
    ranks_per_pod = settings.tp if options.ranks_per_pod is None else options.ranks_per_pod
    if not 1 <= ranks_per_pod <= settings.ranks:
        raise SettingsError(
            f"--ranks-per-pod {ranks_per_pod}: must be from 1 to {settings.ranks}, that is tp * pp"
        )
    manifests = build(FOLDER / options.kind / "overlays" / options.overlay)
    if not options.monitoring:
        manifests = [manifest for manifest in manifests if manifest["kind"] != "ServiceMonitor"]
    num_pods = -(-settings.ranks // ranks_per_pod)
    if options.kind == "trainjob" and num_pods == 1:
        raise SettingsError(
            f"--kind trainjob has a launcher and at least one node: give --pp 2 or more, or less than "
            f"{ranks_per_pod} --ranks-per-pod; --kind mpijob can be one pod"
        )
    for manifest in manifests:
        if manifest["kind"] == "PodDisruptionBudget":
            manifest["spec"]["minAvailable"] = max(1, num_pods - 1)
        elif manifest["kind"] == "MPIJob":
            _shape_mpijob(manifest["spec"], num_pods, ranks_per_pod)
        elif manifest["kind"] == "TrainingRuntime":
            manifest["spec"]["mlPolicy"]["mpi"]["numProcPerNode"] = ranks_per_pod
        elif manifest["kind"] == "TrainJob":
            manifest["spec"]["trainer"]["numNodes"] = num_pods
        for number, pod in enumerate(_pods(manifest)):
            container = pod["containers"][0]
            if options.image:
                container["image"] = options.image
            _size(container["resources"], ranks_per_pod)
            if number == 0:
                if not options.secrets:
                    _drop_secrets(pod)
                container["args"] = _arguments(container["args"], settings, options)
    return [_named(manifest, options.name, options.namespace) for manifest in manifests]


def write(manifests: list[Manifest], folder: Path | None) -> int:
    """Prints them, or writes a file for each, with a kustomization.yaml. Raises SettingsError."""
    if folder is None:
        sys.stdout.write("---\n".join(_text(manifest) for manifest in manifests))
        return 0
    files = {
        f"{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml": manifest for manifest in manifests
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*files],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, manifest in {"kustomization.yaml": kustomization, **files}.items():
            (folder / name).write_text(_text(manifest))
    except OSError as error:
        raise SettingsError(f"--output {folder}: {error.strerror}") from None
    print(f"wrote {len(files)} manifests; apply them with: kubectl apply -k {folder}")
    return 0


def _checked(options: argparse.Namespace) -> Settings:
    settings = Settings.from_arguments(options)
    if options.config is not None:
        raise SettingsError("--config: is not in the pods; give its settings as flags")
    for name, why in (
        ("hosts", "the operator makes the host file"),
        ("mpirun", "the pods have that of their image"),
        ("api_key", "it would stand in the manifest; keys come from the Secret phalanx-api-keys"),
    ):
        if getattr(settings, name):
            raise SettingsError(f"--{name.replace('_', '-')}: {why}; leave it out")
    return settings


def _shape_mpijob(spec: Manifest, num_pods: int, ranks_per_pod: int) -> None:
    spec["slotsPerWorker"] = ranks_per_pod
    if num_pods == 1:  # the operator refuses a worker with no replicas
        del spec["mpiReplicaSpecs"]["Worker"]
    else:
        spec["mpiReplicaSpecs"]["Worker"]["replicas"] = num_pods - 1


def _pods(manifest: Manifest) -> list[Manifest]:
    """The specs of a job's pods, the launcher's first."""
    spec = manifest["spec"]
    if manifest["kind"] == "MPIJob":
        roles = spec["mpiReplicaSpecs"]
        return [roles[role]["template"]["spec"] for role in ("Launcher", "Worker") if role in roles]
    if manifest["kind"] == "TrainingRuntime":
        return [
            job["template"]["spec"]["template"]["spec"] for job in spec["template"]["spec"]["replicatedJobs"]
        ]
    return []


def _size(resources: Manifest, ranks: int) -> None:
    """A core, and a GPU where there are any, for each rank; what is less than a core is left as it is."""
    if resources["requests"]["cpu"].isdecimal():
        resources["requests"]["cpu"] = str(ranks)
    if "nvidia.com/gpu" in resources.get("limits", {}):
        resources["limits"]["nvidia.com/gpu"] = ranks


def _drop_secrets(pod: Manifest) -> None:
    names = set(_SECRETS.values())
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] not in names]
    container = pod["containers"][0]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] not in names]
    container["args"] = [
        argument for argument in container["args"] if argument.partition("=")[0] not in _SECRETS
    ]
    container["args"].append("--zmq-insecure")


def _arguments(base: list[str], settings: Settings, options: argparse.Namespace) -> list[str]:
    """`serve MODEL` with the flags of the manifests, and those that were given in their place or behind them."""
    flags = {argument.partition("=")[0]: argument for argument in base[2:]}
    flags |= {"--tp": f"--tp={settings.tp}", "--pp": f"--pp={settings.pp}"}
    for setting in fields(Settings):
        value: Any = getattr(options, setting.name, None)
        if value is None or setting.name in ("model", "tp", "pp"):
            continue
        flag = f"--{setting.name.replace('_', '-')}"
        if isinstance(value, bool):
            flags[flag] = flag if value else flag.replace("--", "--no-", 1)
        else:
            flags[flag] = f"{flag}={value}"
    return ["serve", settings.model, *flags.values()]


def _named(value: Any, name: str, namespace: str | None) -> Any:
    """With the deployment's name in the place of the default one."""

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {key: walk(part, key) for key, part in value.items()}
        if isinstance(value, list):
            return [walk(part) for part in value]
        if key in _NAMING_KEYS and (value == DEFAULT_NAME or str(value).startswith(f"{DEFAULT_NAME}-")):
            return name + value.removeprefix(DEFAULT_NAME)
        return value

    manifest = walk(value)
    if namespace is not None:
        manifest["metadata"]["namespace"] = namespace
    return manifest


def _text(manifest: Manifest) -> str:
    import yaml

    return yaml.safe_dump(manifest, sort_keys=False, width=110)
