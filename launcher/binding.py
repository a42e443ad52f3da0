"""Which cores a rank may run on (`--bind`), for every MPI and for Slurm alike: the guard sets it before it starts its
rank. It knows cores, nodes of memory and sockets as the kernel shows them, and moves nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

BINDINGS = ("none", "core", "numa", "socket")
_SYSTEM = Path("/sys/devices/system")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Cpu:
    """A processor as the scheduler counts them: a hardware thread of a core."""

    number: int
    socket: int
    numa: int
    core: int


def usable_cpus(system: Path = _SYSTEM) -> list[Cpu]:
    """Those that this process may run on. What the kernel does not show counts as 0, each as a core of its own."""
    numbers = sorted(os.sched_getaffinity(0))
    numa = {cpu: node for node, cpus in _numa_nodes(system).items() for cpu in cpus}
    return [
        Cpu(
            number,
            _read(system / f"cpu/cpu{number}/topology/physical_package_id", 0),
            numa.get(number, 0),
            _read(system / f"cpu/cpu{number}/topology/core_id", number),
        )
        for number in numbers
    ]


def cpus_for(binding: str, local_rank: int, local_size: int, cpus: Collection[Cpu]) -> list[int]:
    """Numbers of the processors that a rank gets. core: an even share of the whole cores, each with its hardware
    threads; numa, socket: all of one node of memory or socket, dealt out evenly; none: all."""
    if binding == "core":
        parts = _split(cpus, lambda cpu: (cpu.socket, cpu.numa, cpu.core))
        first = local_rank * len(parts) // local_size
        last = max(first + 1, (local_rank + 1) * len(parts) // local_size)
        chosen: Iterable[Cpu] = (cpu for part in parts[first:last] for cpu in part)
    elif binding in ("numa", "socket"):
        parts = _split(cpus, lambda cpu: (cpu.numa,) if binding == "numa" else (cpu.socket,))
        chosen = parts[local_rank * len(parts) // local_size]
    else:
        chosen = cpus
    return sorted(cpu.number for cpu in chosen)


def local_place(variables: Mapping[str, str]) -> tuple[int, int]:
    """Number of this process among those of its host, and how many they are, as the MPI launcher said; (0, 1) without
    one."""
    rank = next((int(variables[name]) for name in _LOCAL_RANK if name in variables), 0)
    size = next((int(variables[name]) for name in _LOCAL_SIZE if name in variables), None)
    if size is None:
        size = _slurm_tasks(variables)
    return rank, max(size, rank + 1)


def describe(numbers: Iterable[int]) -> str:
    """Processors as the kernel writes them, like 0-3,8."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _slurm_tasks(variables: Mapping[str, str]) -> int:
    """Of this node, from a list like 2(x3),1 (srun(1), SLURM_STEP_TASKS_PER_NODE)."""
    counts: list[int] = []
    for part in variables.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.partition("(x")
        if count.isdecimal():
            counts += [int(count)] * int(times.rstrip(")") or 1)
    node = variables.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1


def _split(cpus: Collection[Cpu], key: Callable[[Cpu], tuple[int, ...]]) -> list[list[Cpu]]:
    parts: dict[tuple[int, ...], list[Cpu]] = {}
    for cpu in sorted(cpus, key=lambda cpu: (*key(cpu), cpu.number)):
        parts.setdefault(key(cpu), []).append(cpu)
    return list(parts.values())


def _numa_nodes(system: Path) -> dict[int, set[int]]:
    nodes = {}
    for folder in system.glob("node/node[0-9]*"):
        try:
            nodes[int(folder.name.removeprefix("node"))] = parse_cpus((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
    return nodes


def parse_cpus(text: str) -> set[int]:
    """The inverse of `describe`. Raises ValueError."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _read(path: Path, missing: int) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return missing
