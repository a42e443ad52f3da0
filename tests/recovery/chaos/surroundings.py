"""What a deployment under chaos runs in, and what can befall that: a small /dev/shm and a small disk that get full, a
second host behind a network that is cut. Used by the campaign and by the injector; needs root.

Namespaces are entered by a thread: what it starts afterwards, threads and processes, is in them, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.cluster.namespaces import Cluster, cluster
from tests.recovery.chaos.schedule import Place
from tests.unit.disks import fill

SHARED_MEMORY, DISK = "256m", "64m"
"""Enough for two worlds and their front at work."""
NUM_FILES = 3000
"""So many fit there: a folder needs no more room than that of its name, and is to find none."""
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


class Surroundings:
    """Of the usual kind: nothing befalls them."""

    def __init__(
        self,
        disk: Path | None = None,
        hosts: Cluster | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.disk = disk
        """Folder of a small file system for run folders; None where they may lie anywhere."""
        self.variables = dict(variables or {})
        """For `phalanx serve`."""
        self._hosts = hosts

    @property
    def flags(self) -> Sequence[str]:
        """For `phalanx serve`."""
        if self._hosts is None:
            return ()
        return ("--hosts", ",".join(f"{name}:1" for name in self._hosts.names))

    @contextmanager
    def filled(self, shared_memory: bool) -> Iterator[None]:
        """Nothing more fits into /dev/shm, or onto the disk."""
        assert self.disk is not None
        folder = Path("/dev/shm") if shared_memory else self.disk
        names = folder / "names"
        try:
            fill(folder)
            with contextlib.suppress(OSError):
                names.mkdir()
                for number in itertools.count():
                    (names / str(number)).touch()
            yield
        finally:
            (folder / "filler").unlink(missing_ok=True)
            shutil.rmtree(names, ignore_errors=True)

    @contextmanager
    def cut_off(self, towards: bool, back: bool) -> Iterator[None]:
        """What is sent to the second host, or what it sends, or both, gets lost."""
        assert self._hosts is not None
        self._hosts.cut(2, towards, back)
        try:
            yield
        finally:
            self._hosts.heal(2)

    def other_host(self, what: str, without: str | None = None) -> list[psutil.Process]:
        """Processes of the second host with this in their command line."""
        assert self._hosts is not None
        found = []
        for process in self._hosts.processes(2):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if what in line and (without is None or without not in line):
                found.append(process)
        return found


@contextmanager
def surroundings(place: Place) -> Iterator[Surroundings]:
    """Makes them and has this thread enter them, for good: it should have nothing else to do afterwards. Raises
    OSError, or CalledProcessError, without the rights to it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phalanx-place-")))
        if place is Place.CRAMPED:
            _call("unshare", _CLONE_NEWNS)
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            _mount(SHARED_MEMORY, Path("/dev/shm"))
            _mount(DISK, folder)
            stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            yield Surroundings(disk=folder)
        elif place is Place.HOSTS:
            hosts = stack.enter_context(cluster(2, folder))
            descriptor = os.open(f"/proc/{hosts.first_pid}/ns/net", os.O_RDONLY)
            try:
                _call("setns", descriptor, _CLONE_NEWNET)
            finally:
                os.close(descriptor)
            yield Surroundings(hosts=hosts, variables=hosts.variables)
        else:
            yield Surroundings()


def _mount(size: str, folder: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={NUM_FILES}", "tmpfs", str(folder)], check=True
    )


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
