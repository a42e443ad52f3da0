"""What the MPI Operator (kubeflow/mpi-operator, pkg/controller/mpi_job_controller.go) makes of an MPIJob v2beta1:
pods, host file, keys. For the tests that run such a job in namespaces (see pods)."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
CONFIG, KEYS = "config", "ssh"


def name_of(job: Manifest) -> str:
    return str(job["metadata"]["name"])


def _namespace(job: Manifest) -> str:
    return str(job["metadata"].get("namespace", "default"))


def _implementation(job: Manifest) -> str:
    return str(job["spec"].get("mpiImplementation", "OpenMPI"))


def _key_path(job: Manifest) -> str:
    return str(job["spec"].get("sshAuthMountPath", "/root/.ssh"))


def num_workers(job: Manifest) -> int:
    return int(job["spec"]["mpiReplicaSpecs"].get("Worker", {}).get("replicas", 0))


def host_file(job: Manifest) -> str:
    """Of the ConfigMap NAME-config."""
    name, slots = name_of(job), job["spec"].get("slotsPerWorker", 1)
    pods = [f"{name}-launcher"] if job["spec"].get("runLauncherAsWorker") else []
    pods += [f"{name}-worker-{index}" for index in range(num_workers(job))]
    line = "{}.{}.{}.svc slots={}\n" if _implementation(job) == "OpenMPI" else "{}.{}.{}.svc:{}\n"
    return "".join(line.format(pod, name, _namespace(job), slots) for pod in pods)


def discover_hosts(job: Manifest) -> str:
    """Of the same ConfigMap, when all workers run."""
    hosts = [line.replace(":", " ").split()[0] for line in host_file(job).splitlines()]
    return "#!/bin/sh\n" + "".join(f"echo {host}\n" for host in hosts)


def make_keys(folder: Path) -> dict[str, str]:
    """Of the Secret NAME-ssh: an ECDSA key on P-521, as the operator makes one for each job."""
    key = folder / "key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-C", "", "-f", str(key)],
        check=True,
    )
    public = key.with_suffix(".pub").read_text()
    return {"id_rsa": key.read_text(), "id_rsa.pub": public, "authorized_keys": public}


def launcher(job: Manifest) -> Manifest:
    """The pod of the launcher's Job."""
    pod = _pod(job, "Launcher", f"{name_of(job)}-launcher")
    variables = {"K_MPI_JOB_ROLE": "launcher"}
    slots = str(job["spec"].get("slotsPerWorker", 1))
    if _implementation(job) == "OpenMPI":
        variables |= {
            "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
            "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
            "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
            "OMPI_MCA_orte_set_default_slots": slots,
        }
    elif _implementation(job) == "Intel":
        variables |= {
            "I_MPI_HYDRA_HOST_FILE": "/etc/mpi/hostfile",
            "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": "-o ConnectionAttempts=10",
            "I_MPI_PERHOST": slots,
        }
    else:
        variables |= {
            "HYDRA_HOST_FILE": "/etc/mpi/hostfile",
            "HYDRA_LAUNCH_EXTRA_ARGS": "-o ConnectionAttempts=10",
        }
    if not job["spec"].get("runLauncherAsWorker"):
        variables |= {"NVIDIA_VISIBLE_DEVICES": "", "NVIDIA_DRIVER_CAPABILITIES": ""}
    items = [{"key": "hostfile", "path": "hostfile", "mode": 0o444}]
    items += [{"key": "discover_hosts.sh", "path": "discover_hosts.sh", "mode": 0o555}]
    config = {"name": "mpi-job-config", "configMap": {"name": f"{name_of(job)}-{CONFIG}", "items": items}}
    _extend(pod, variables, config, "/etc/mpi")
    return pod


def worker(job: Manifest, index: int) -> Manifest:
    pod = _pod(job, "Worker", f"{name_of(job)}-worker-{index}")
    search = f"{name_of(job)}.{_namespace(job)}.svc.cluster.local"
    pod["spec"].setdefault("dnsConfig", {}).setdefault("searches", []).append(search)
    container = pod["spec"]["containers"][0]
    if not container.get("command") and not container.get("args"):
        container["command"] = ["/usr/sbin/sshd", "-De"]
    _extend(pod, {"K_MPI_JOB_ROLE": "worker"})
    return pod


def _pod(job: Manifest, role: str, name: str) -> Manifest:
    """With the keys, which launcher and workers have alike."""
    template = copy.deepcopy(job["spec"]["mpiReplicaSpecs"][role]["template"])
    spec = template["spec"] | {"hostname": name, "subdomain": name_of(job)}
    labels = {
        "training.kubeflow.org/operator-name": "mpi-operator",
        "training.kubeflow.org/job-name": name_of(job),
        "training.kubeflow.org/job-role": role.lower(),
    }
    metadata = template.get("metadata", {})
    metadata = {"name": name, "namespace": _namespace(job), "labels": metadata.get("labels", {}) | labels}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    items = [{"key": name, "path": name} for name in ("id_rsa", "id_rsa.pub", "authorized_keys")]
    secret: Manifest = {"secretName": f"{name_of(job)}-{KEYS}", "items": items}
    if _key_path(job) == "/root/.ssh":
        secret["defaultMode"] = 0o600
    _extend(pod, {}, {"name": "ssh-auth", "secret": secret}, _key_path(job))
    return pod


def _extend(pod: Manifest, variables: dict[str, str], volume: Manifest | None = None, path: str = "") -> None:
    """The operator adds to the first container."""
    container = pod["spec"]["containers"][0]
    container.setdefault("env", []).extend(
        {"name": name, "value": value} for name, value in variables.items()
    )
    if volume is not None:
        pod["spec"].setdefault("volumes", []).append(volume)
        container.setdefault("volumeMounts", []).append({"name": volume["name"], "mountPath": path})
