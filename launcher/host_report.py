"""What a guard tells of its host in its first message: the cores and the GPU of its rank, shared memory, the clock.
Used by the guard alone; it reads and changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.binding import cpus_for, describe, local_place, usable_cpus
from launcher.gpus import visible_gpus


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
