"""What a guard tells of its host and of its rank: cores, GPU, shared memory and clock in its first message, versions
and weights as the rank has told them. Used by the guard alone; it reads and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.binding import cpus_for, describe, local_place, usable_cpus
from launcher.gpus import visible_gpus
from launcher.guard_messages import RankFacts
from launcher.watch import FactReader

_CODE = ("engine", "gateway", "launcher")
_FACTS = {field.name for field in fields(RankFacts)} - {"epoch", "rank"}


class HostReport:
    """As of one rank, which has its place among those of the host."""

    def __init__(self, binding: str, variables: Mapping[str, str] = os.environ) -> None:
        local_rank, local_size = local_place(variables)
        self._cpus = cpus_for(binding, local_rank, local_size, usable_cpus())
        self.bound_to = [] if binding == "none" else self._cpus
        """Processors for the rank; empty: all that it finds."""
        gpus = visible_gpus(variables)
        self._gpu = gpus[local_rank] if local_rank < len(gpus) else ""
        self._num_gpus = len(gpus)

    def read(self, shm_dir: Path) -> dict[str, Any]:
        """Fields of GuardHello."""
        try:
            status = os.statvfs(shm_dir)
            sizes = {
                "shm_bytes": status.f_frsize * status.f_blocks,
                "shm_free_bytes": status.f_frsize * status.f_bavail,
            }
        except OSError:
            sizes = {}
        return {
            "cores": describe(self._cpus),
            "gpu": self._gpu,
            "num_gpus": self._num_gpus,
            "unix_s": time.time(),
            **sizes,
        }


class RankReport:
    """What a rank has told of itself, as a message."""

    def __init__(self, epoch: int, rank: int, page_path: Path, has_other_hosts: bool) -> None:
        """`has_other_hosts`: whether the world has, so that its code is compared."""
        self._epoch, self._rank = epoch, rank
        self._sheet = FactReader(page_path)
        self._has_other_hosts = has_other_hosts
        self._phalanx = ""

    def read_new(self) -> RankFacts | None:
        """None if there is nothing that was not told yet."""
        facts = self._sheet.read_new()
        if not facts:
            return None
        if self._has_other_hosts and not self._phalanx:
            self._phalanx = f"{_version()} {code_digest()}"
        told = {name: value for name, value in facts.items() if name in _FACTS}
        return RankFacts(epoch=self._epoch, rank=self._rank, **{**told, "phalanx": self._phalanx})


def code_digest() -> str:
    """Of the Python code of this very checkout or installation: two of them may bear one version."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=6)
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            with contextlib.suppress(OSError):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _version() -> str:
    try:
        return metadata.version("phalanx-serve")
    except metadata.PackageNotFoundError:
        return "checkout"
