"""The GPUs that ranks of this host would use: each rank the one with its number among the ranks of the host. Called
by guards and `--dry-run`; it loads no driver."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus(variables: Mapping[str, str] = os.environ, driver: Path = _DRIVER) -> list[str]:
    """Their names for people, in the order in which CUDA numbers them for a process with these variables; empty where
    there is none. CUDA_VISIBLE_DEVICES is read up to the first entry that is none, as CUDA does."""
    try:
        count = sum(1 for _ in driver.iterdir())
    except OSError:
        return []
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(count)]
    found = []
    for entry in chosen.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or (entry.isdecimal() and int(entry) >= count):
            break
        found.append(entry)
    return found
