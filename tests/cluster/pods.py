"""Pods on one machine: namespaces of network, processes, mounts and names, each with a root that is made by pod_init,
on one bridge. What a kubelet and the cluster's DNS do for a pod is done here; its manifest says what it needs."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.cluster import namespaces

ROOT = namespaces.ROOT
Manifest = dict[str, Any]
Result = TypeVar("Result")
_CLONE_NEWNET = 0x40000000
NAMESPACES = ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child"]


def why_not() -> str | None:
    """Why this machine cannot have such pods; None if it can."""
    if reason := namespaces.why_not():
        return reason
    for tool in ("/usr/sbin/sshd", "ssh", "ssh-keygen"):
        if shutil.which(tool) is None:
            return f"needs `{tool}`, of openssh-server and openssh-client"
    probe = [
        "sh",
        "-c",
        "ip link add bridge0 type bridge && mount -t tmpfs tmpfs /mnt && mount -t proc proc /proc",
    ]
    done = subprocess.run(["unshare", *NAMESPACES, *probe], capture_output=True, text=True)
    return f"no namespaces with a bridge here: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Image:
    """What the containers' image has beside the machine's own folders."""

    entrypoint: list[str]
    variables: Mapping[str, str]
    files: Mapping[str, str]
    """Texts by path."""
    folder: str = "/"

    def specification(self) -> dict[str, Any]:
        real = [Path(sys.prefix), Path(sys.base_prefix), ROOT, ROOT / "build"]
        folders = dict.fromkeys(str(path.resolve()) for path in real if path.exists())
        return {"folders": ["/usr", *folders], "links": {}, "files": dict(self.files)}


class Pod:
    """One container that runs, as process 1 of its namespaces."""

    def __init__(
        self, manifest: Manifest, address: str, link: str, process: subprocess.Popen[str], pid: int, log: Path
    ) -> None:
        self.manifest = manifest
        self.address = address
        self.link = link
        """Its end on the node."""
        self.pid = pid
        self._process = process
        self._log = log

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    def processes(self) -> list[psutil.Process]:
        """All in it but process 1."""
        return psutil.Process(self.pid).children(recursive=True)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Exit code of its process 1; -9 if it was killed."""
        return self._process.wait(timeout_s)


class Node:
    """One network on which pods get a new address each time they start, and find each other by names as in a
    cluster."""

    def __init__(self, folder: Path, image: Image) -> None:
        self._folder = folder
        self._image = image
        self._texts: dict[str, Mapping[str, str]] = {}
        self.claims: dict[str, Path] = {}
        """Folders of PersistentVolumeClaims."""
        self._bridge = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._bridge.stdout is not None and self._bridge.stdout.readline() == "up\n"
        self._on_node("ip", "link", "add", "bridge0", "type", "bridge")
        self._on_node("ip", "addr", "add", "10.78.0.1/16", "dev", "bridge0")
        self._on_node("ip", "link", "set", "bridge0", "up")
        self._started = 0
        self.pods: dict[str, Pod] = {}
        self._hosts_files: dict[str, Path] = {}
        self._network = os.open(f"/proc/{self._bridge.pid}/ns/net", os.O_RDONLY)
        self._asking = ThreadPoolExecutor(4, initializer=self.enter)

    # ----------------------------------------------------------------- clients

    def enter(self) -> None:
        """The thread that calls this is on the node's network from now on: setns(2)."""
        if ctypes.CDLL(None, use_errno=True).setns(self._network, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def ask(self, question: Callable[[], Result]) -> Result:
        """From the node's network."""
        return self._asking.submit(question).result()

    def thread(self, task: Callable[[], None]) -> threading.Thread:
        """Does it there, while others go on."""

        def run() -> None:
            self.enter()
            task()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    # ----------------------------------------------------------------- what the API server has

    def put(self, name: str, texts: Mapping[str, str]) -> None:
        """A ConfigMap or Secret."""
        self._texts[name] = texts

    # ----------------------------------------------------------------- pods

    def start(self, manifest: Manifest) -> Pod:
        """Its container runs when this returns, and its name is known, to all."""
        spec, name = manifest["spec"], manifest["metadata"]["name"]
        container = spec["containers"][0]
        self._started += 1
        number, folder = self._started, self._folder / f"{self._started}-{name}"
        folder.mkdir()
        address = f"10.78.{number // 250}.{number % 250 + 2}"
        root = folder / "root"
        root.mkdir()
        hosts = folder / "hosts"
        hosts.touch()
        log = folder / "log"
        log.touch()
        log.chmod(0o666)
        context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        user = context.get("runAsUser", 0)
        variables = {**self._image.variables, "HOSTNAME": spec["hostname"]}
        variables |= {
            entry["name"]: self._value(entry, manifest, address) for entry in container.get("env", [])
        }
        command = container.get("command") or self._image.entrypoint
        command = [*command, *container.get("args", [])]
        image = self._image.specification()
        image["files"]["/etc/hosts"] = ""
        (folder / "specification.json").write_text(
            json.dumps(
                {
                    "hostname": spec["hostname"],
                    "root": str(root),
                    "image": image,
                    "volumes": self._volumes(folder, spec, container),
                    "hosts": str(hosts),
                    "log": str(log),
                    "folder": container.get("workingDir", self._image.folder),
                    "user": user,
                    "group": context.get("runAsGroup", user),
                    "groups": [context["fsGroup"]] if "fsGroup" in context else [],
                    "read_only": bool(context.get("readOnlyRootFilesystem")),
                    "command": [_expand(word, variables) for word in command],
                    "environment": {name: _expand(value, variables) for name, value in variables.items()},
                }
            )
        )
        process = subprocess.Popen(
            [
                "unshare",
                *NAMESPACES,
                sys.executable,
                "-m",
                "tests.cluster.pod_init",
                str(folder / "specification.json"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "up\n":
            process.kill()
            raise AssertionError(f"pod {name} did not start")
        pid = psutil.Process(process.pid).children()[0].pid
        link = f"pod{number}"
        self._connect(pid, link, address)
        pod = Pod(manifest, address, link, process, pid, log)
        self.pods[name] = pod
        self._hosts_files[name] = hosts
        self.tell_names()
        process.stdin.write("go\n")
        process.stdin.flush()
        return pod

    def unplug(self, name: str) -> None:
        """Nothing comes from it or reaches it any more, and nobody is told."""
        self._on_node("ip", "link", "set", self.pods[name].link, "down")

    def kill(self, name: str, forget: bool = True) -> None:
        """SIGKILL to its process 1, with which all of it goes. `forget`: DNS does not know it any more."""
        pod = self.pods[name]
        with contextlib.suppress(ProcessLookupError):
            pod.send(signal.SIGKILL)
        pod.wait()
        if forget:
            self.remove(name)

    def remove(self, name: str) -> None:
        """It has ended, and its record is gone. Clients are refused, as by a Service without endpoints."""
        self._on_node("ip", "route", "add", "unreachable", self.pods[name].address)
        del self.pods[name], self._hosts_files[name]
        self.tell_names()

    def tell_names(self) -> None:
        """What a kubelet and the cluster's DNS let each pod know, as the hosts file of each: its own address, and all
        pods of a headless service by their names under it. To workers alone bare names mean anything: the operator
        gives them a search domain."""
        for name, file in self._hosts_files.items():
            lines = ["127.0.0.1 localhost"]
            own = self.pods[name]
            for pod in self.pods.values():
                spec, namespace = pod.manifest["spec"], pod.manifest["metadata"]["namespace"]
                short = f"{spec['hostname']}.{spec['subdomain']}"
                full = f"{short}.{namespace}.svc"
                names = [f"{full}.cluster.local", full, f"{short}.{namespace}", short]
                if pod is own or f"{spec['subdomain']}.{namespace}.svc.cluster.local" in _searches(
                    own.manifest
                ):
                    names.append(spec["hostname"])
                lines.append(f"{pod.address} {' '.join(names)}")
            file.write_text("\n".join(lines) + "\n")

    def close(self) -> None:
        """With their last process the namespaces go."""
        self._asking.shutdown()
        for pod in self.pods.values():
            with contextlib.suppress(ProcessLookupError):
                pod.send(signal.SIGKILL)
            pod.wait()
        self._bridge.kill()
        self._bridge.wait()
        os.close(self._network)

    # ----------------------------------------------------------------- parts of a pod

    def _value(self, entry: Manifest, manifest: Manifest, address: str) -> str:
        if "value" in entry:
            return str(entry["value"])
        source = entry.get("valueFrom", {})
        field = source.get("fieldRef", {}).get("fieldPath", "")
        if field == "status.podIP":
            return address
        if field.startswith("metadata."):
            return str(manifest["metadata"][field.removeprefix("metadata.")])
        for kind in ("secretKeyRef", "configMapKeyRef"):
            if kind in source:
                return self._texts.get(source[kind]["name"], {}).get(source[kind]["key"], "")
        raise AssertionError(f"variable {entry}: this kubelet does not know where its value comes from")

    def _volumes(self, folder: Path, spec: Manifest, container: Manifest) -> list[Manifest]:
        """Where each of them is mounted from; None: memory. Those of a group are writable for it (fsGroup)."""
        group = spec.get("securityContext", {}).get("fsGroup", 0)
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        found = []
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            source: Path | None = None
            read_only = bool(mount.get("readOnly"))
            if "emptyDir" in volume:
                pass
            elif "configMap" in volume or "secret" in volume:
                kind = volume.get("configMap") or volume["secret"]
                name = kind.get("name") or kind["secretName"]
                if name not in self._texts and kind.get("optional"):
                    continue
                source, read_only = folder / volume["name"], True
                _write_texts(source, kind, self._texts[name], group)
            elif "persistentVolumeClaim" in volume:
                source = self.claims[volume["persistentVolumeClaim"]["claimName"]]
                os.chown(source, 0, group)
                source.chmod(0o2775)
            else:
                raise AssertionError(f"volume {volume}: this kubelet does not know its kind")
            found.append(
                {
                    "target": mount["mountPath"],
                    "source": str(source) if source is not None else None,
                    "read_only": read_only,
                    "mode": "2777" if group else "0777",
                    "group": group,
                    "sub_path": mount.get("subPath", ""),
                }
            )
        return sorted(found, key=lambda volume: len(str(volume["target"])))

    def _connect(self, pid: int, link: str, address: str) -> None:
        self._on_node("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        self._on_node("ip", "link", "set", link, "master", "bridge0", "up")
        inside = ["nsenter", "--net", "--target", str(pid), "--", "ip"]
        subprocess.run([*inside, "addr", "add", f"{address}/16", "dev", "eth0"], check=True)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)

    def _on_node(self, *command: str) -> None:
        subprocess.run(["nsenter", "--net", "--target", str(self._bridge.pid), "--", *command], check=True)


def _searches(manifest: Manifest) -> list[str]:
    return list(manifest["spec"].get("dnsConfig", {}).get("searches", []))


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) of commands and values."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


def _write_texts(folder: Path, kind: Manifest, texts: Mapping[str, str], group: int) -> None:
    """As a kubelet does: a folder with a time in its name, a link to it, and a link to each file through that. They
    are root's, and readable for the pod's group."""
    place = folder / "..2026_11_23_00_00_00.1"
    place.mkdir(parents=True)
    (folder / "..data").symlink_to(place.name)
    for item in kind.get("items") or [{"key": key, "path": key} for key in texts]:
        file = place / item["path"]
        file.parent.mkdir(exist_ok=True)
        file.write_text(texts[item["key"]])
        os.chown(file, 0, group)
        file.chmod(item.get("mode", kind.get("defaultMode", 0o644)) | (0o440 if group else 0))
        first = Path(item["path"]).parts[0]
        if not (folder / first).is_symlink():
            (folder / first).symlink_to(f"..data/{first}")
    for path in (folder, place, *(path for path in place.rglob("*") if path.is_dir())):
        os.chown(path, 0, group)
        path.chmod(0o2755 if group else 0o755)


def wait_until(is_so: Callable[[], bool], timeout_s: float, what: Callable[[], object]) -> None:
    """AssertionError with `what()` if it is not so within the time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@contextlib.contextmanager
def node(folder: Path, image: Image) -> Iterator[Node]:
    pods = Node(folder, image)
    try:
        yield pods
    finally:
        pods.close()
