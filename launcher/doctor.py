"""`phalanx doctor`: what this machine has and lacks for serving, each finding with its remedy. Must change
nothing on the machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from launcher.doctor_findings import Finding, Level
from launcher.doctor_hosts import hosts_answer, world
from launcher.errors import LauncherError
from launcher.host_list import Host, parse_hosts
from launcher.launchers import mpirun
from launcher.launchers.mpirun import flavor_named
from launcher.network import Interface, find_interface
from launcher.processes import usable_cores
from launcher.settings import default_cache_dir

_GIB = 1 << 30


def doctor(
    port: int,
    mpirun_path: str | None,
    mpi: str = "auto",
    hosts: str = "",
    interface: str = "",
    as_json: bool = False,
) -> int:
    """Prints every finding; 1 if something that is needed is missing, else 0. Raises LauncherError for hosts that
    cannot be read."""
    named = parse_hosts(hosts)
    over = find_interface(interface) if interface else None
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        lambda: _mpi(Path(mpirun_path) if mpirun_path else None, flavor_named(mpi), named, over),
        _cores,
        _memory,
        _shared_memory,
        lambda: _ports(port),
        _model_cache,
        _torch,
        _libraries,
    ]
    for check in checks:
        for finding in check():
            findings.append(finding)
            if as_json:
                continue
            print(f"{finding.level.value:9} {finding.part:15} {finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':25} -> {finding.remedy}", flush=True)
    missing = any(finding.level is Level.MISSING for finding in findings)
    if as_json:
        entries = [{**asdict(finding), "level": finding.level.value} for finding in findings]
        print(json.dumps({"ready": not missing, "findings": entries}, indent=2))
    else:
        print("something that is needed is missing" if missing else "ready to serve")
    return 1 if missing else 0


def _python() -> Iterator[Finding]:
    yield Finding(Level.OK, "python", f"{sys.version.split()[0]} in {sys.prefix}")


def _mpi(
    given: Path | None, flavor: mpirun.Flavor | None, hosts: Sequence[Host], interface: Interface | None
) -> Iterator[Finding]:
    try:
        found = mpirun.find_mpirun(given, flavor)
    except LauncherError as error:
        reason, _, remedy = str(error).partition("; ")
        yield Finding(Level.MISSING, "mpirun", reason, remedy)
        return
    yield Finding(Level.OK, "mpirun", f"{found.flavor.value}: {found.version}, {found.path}")
    answers = list(hosts_answer(hosts))
    yield from answers
    if all(answer.level is Level.OK for answer in answers):
        yield from world(found, hosts, interface)


def _cores() -> Iterator[Finding]:
    usable, present = usable_cores(), os.cpu_count() or 1
    text = f"{usable} usable of {present}, {max(1, usable // 2)} threads a rank with 2 ranks here"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        text += f", OMP_NUM_THREADS={threads}"
    if (quota := cgroup_cpus()) is not None:
        text += f", cgroup quota {quota:g}"
    if quota is not None and quota < usable:
        remedy = f"set OMP_NUM_THREADS so that ranks times threads stay within {quota:g}"
        yield Finding(Level.WARNING, "cores", text, remedy)
    else:
        yield Finding(Level.OK, "cores", text)
    if finding := starving_scheduler(os.uname().release):
        yield finding


def starving_scheduler(
    release: str, setting: Path = Path("/proc/sys/kernel/sched_autogroup_enabled")
) -> Finding | None:
    """Whether this kernel may keep other programs from a processor on which threads of a rank wait for each other."""
    try:
        enabled = setting.read_text().strip() == "1"
    except OSError:
        enabled = False
    if not enabled or not release.startswith("6.18."):  # the only one with which it was seen
        return None
    text = f"Linux {release} with autogroups may keep other programs from cores that ranks use, for seconds"
    remedy = "sysctl kernel.sched_autogroup_enabled=0, or noautogroup on the kernel's command line (docs/recovery.md)"
    return Finding(Level.WARNING, "scheduler", text, remedy)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the cgroup's quota allows (cgroup v2 and v1); None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        return quota_us / int((root / "cpu" / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the cgroup allows (v2 and v1); None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int((root / name).read_text())
        except (OSError, ValueError):
            continue
        return limit if limit < 1 << 60 else None
    return None


def _memory() -> Iterator[Finding]:
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = int(rest.split()[0]) * 1024
    free = values["MemAvailable"]
    text = f"{free / _GIB:.1f} GiB available of {values['MemTotal'] / _GIB:.1f}"
    if (limit := cgroup_memory()) is not None:
        text += f", cgroup limit {limit / _GIB:.1f} GiB"
        free = min(free, limit)
    if free < 2 * _GIB:
        yield Finding(
            Level.WARNING,
            "memory",
            text,
            "give it 2 GiB or more, or serve a smaller model with --kv-cache-memory",
        )
    else:
        yield Finding(Level.OK, "memory", text)


def _shared_memory() -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not os.access(path, os.W_OK):
        yield Finding(Level.WARNING, "/dev/shm", "not writable", "mount a tmpfs there (--shm-size in Docker)")
        return
    usage = shutil.disk_usage(path)
    text = f"{usage.free / _GIB:.2f} GiB free of {usage.total / _GIB:.2f}"
    if usage.free < 256 << 20:
        remedy = (
            "a rank takes 16 MiB: enlarge it (--shm-size in Docker, a memory-backed emptyDir in Kubernetes)"
        )
        yield Finding(Level.WARNING, "/dev/shm", text, remedy)
    else:
        yield Finding(Level.OK, "/dev/shm", text)


def _ports(port: int) -> Iterator[Finding]:
    from launcher.grpc_port import DEFAULT_PORT
    from launcher.listeners import bind

    for number, flag in ((port, "--port"), (5555, "--zmq"), (DEFAULT_PORT, "--grpc-port")):
        try:
            bind("127.0.0.1", number).close()
        except LauncherError as error:
            yield Finding(Level.WARNING, f"port {number}", str(error).split(";")[0], f"choose another {flag}")
        else:
            yield Finding(Level.OK, f"port {number}", "free")


def _model_cache() -> Iterator[Finding]:
    path = default_cache_dir()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        remedy = "set PHALANX_CACHE to a folder that you may write to"
        yield Finding(Level.MISSING, "model cache", f"{path} cannot be written", remedy)
        return
    free = shutil.disk_usage(existing).free
    models = sorted(p.name for p in (path / "models").glob("*") if (p / "config.json").exists())
    text = f"{path}, {free / _GIB:.0f} GiB free, models: {', '.join(models) or 'none yet'}"
    remedy = "" if models else "`phalanx pull smollm2-135m-instruct` gets one"
    yield Finding(Level.OK if models else Level.OPTIONAL, "model cache", text, remedy)


def _torch() -> Iterator[Finding]:
    """In a process of its own: torch takes seconds to import, and a broken GPU driver may crash it."""
    code = (
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "nccl = '.'.join(map(str, torch.cuda.nccl.version())) if n else ''; "
        "print(torch.__version__, n, nccl, torch.cuda.get_device_name(0) if n else '', sep='|')"
    )
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120
        )
        version, gpus, nccl, name = answer.stdout.strip().split("\n")[-1].split("|")
    except (subprocess.TimeoutExpired, ValueError):
        yield Finding(Level.MISSING, "torch", "cannot be imported", "`pip install torch` in this environment")
        return
    yield Finding(Level.OK, "torch", version)
    if int(gpus):
        yield Finding(Level.OK, "gpu", f"{gpus} x {name}, NCCL {nccl}")
    else:
        yield Finding(Level.OPTIONAL, "gpu", "none; worlds compute on the CPU")


def _libraries() -> Iterator[Finding]:
    for name in ("zmq", "msgspec", "fastapi", "uvicorn", "tokenizers", "safetensors", "mpi4py"):
        if importlib.util.find_spec(name) is None:
            yield Finding(Level.MISSING, name, "not installed", "install phalanx-serve with its dependencies")
