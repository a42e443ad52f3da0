"""Process 1 of a "pod" of the tests (see pods): makes the container's root, read-only, from the machine's own folders
and the pod's volumes, and becomes the container's command. `pod_init SPECIFICATION`, as root, in namespaces of its
own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_PR_SET_NO_NEW_PRIVS = 38
_DEVICES = ("null", "zero", "full", "random", "urandom")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def bind(source: Path, target: Path, read_only: bool = False) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--rbind" if source.is_dir() else "--bind", str(source), str(target))
    if read_only:
        mount("-o", "remount,bind,ro", str(target))


def make_root(root: Path, specification: dict[str, Any]) -> None:
    """The image's folders are those of this machine, its files are written. A volume without a source is memory."""
    image, volumes = specification["image"], specification["volumes"]
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root))
    for name in ("bin", "sbin", "lib", "lib64"):
        place = Path("/", name)
        if place.is_symlink():
            (root / name).symlink_to(os.readlink(place))
        elif place.exists():
            bind(place, root / name, read_only=True)
    for path, text in image["files"].items():
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    bind(Path(specification["hosts"]), root / "etc/hosts")
    (root / "proc").mkdir()
    mount("-t", "proc", "proc", str(root / "proc"))
    bind(Path("/sys"), root / "sys", read_only=True)
    make_devices(root / "dev")
    for volume in volumes:
        target = root / volume["target"].lstrip("/")
        if volume["source"] is None:
            target.mkdir(parents=True, exist_ok=True)
            mount("-t", "tmpfs", "-o", f"mode={volume['mode']},gid={volume['group']}", "tmpfs", str(target))
        else:
            bind(Path(volume["source"], volume["sub_path"]), target, volume["read_only"])
    for folder in image["folders"]:  # above the volumes: what lies in /tmp here must be there, too
        bind(Path(folder), root / folder.lstrip("/"), read_only=True)
    if specification["read_only"]:
        mount("-o", "remount,bind,ro", str(root))


def make_devices(folder: Path) -> None:
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
    for name in _DEVICES:
        bind(Path("/dev", name), folder / name)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        (folder / name).symlink_to(target)
    (folder / "shm").mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "shm"))  # as containerd has it


def main(specification: dict[str, Any]) -> None:
    socket.sethostname(specification["hostname"])
    mount("--make-rprivate", "/")
    root = Path(specification["root"])
    make_root(root, specification)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("up", flush=True)
    sys.stdin.readline()  # the network is there
    log = os.open(specification["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.umask(0o022)
    os.chroot(root)
    os.chdir(specification["folder"])
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    user, group = specification["user"], specification["group"]
    os.setgroups(specification["groups"])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    command = specification["command"]
    os.execvpe(command[0], command, specification["environment"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
