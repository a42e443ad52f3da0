"""`phalanx status`: what /cluster answers, for people or as JSON. Reads only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from gateway.control_messages import MOST_IN_FLIGHT_IDS
from launcher.errors import LauncherError
from launcher.http_client import get_json, key_or_default
from launcher.post_mortem import telling_line
from launcher.run_dir import ADDRESS_FILE
from launcher.settings import default_run_dir


def status(url: str, as_json: bool, api_key: str | None = None) -> int:
    """Prints it. 0 if a world is active, 1 if none is. Raises LauncherError if nothing answers."""
    cluster = get_json(url, "/cluster", api_key=key_or_default(api_key))
    worlds = cluster.get("worlds", [])
    print(json.dumps(cluster, indent=2) if as_json else "\n".join(format_cluster(cluster)))
    return 0 if any(world.get("state") == "active" for world in worlds) else 1


def address_of(port: int, run_dir: Path | None, job_id: str | None = None) -> str:
    """Where a deployment of this machine, or a job of Slurm, is served. Raises LauncherError."""
    if job_id is not None:
        from launcher.slurm_job import find_endpoint

        return find_endpoint(job_id, run_dir)
    folder = run_dir if run_dir is not None else default_run_dir(port)
    try:
        return (folder / ADDRESS_FILE).read_text().strip()
    except OSError:
        if run_dir is None:  # it may have a run folder elsewhere
            return f"http://127.0.0.1:{port}"
        raise LauncherError(
            f"nothing is served from {run_dir}; say which deployment with --port, --run-dir or --url"
        ) from None


def format_cluster(cluster: dict[str, Any]) -> list[str]:
    """The lines for people."""
    lines = []
    for world in cluster.get("worlds", []):
        shape = f"tp {world['tp']}, pp {world['pp']}"
        state = world["state"]
        if world.get("spare"):
            state += f" ({', '.join([world['spare'], *_memory(world)])})"
        asked = cluster.get("asked") or {}
        if world["tp"] * world["pp"] < (asked.get("tp") or 0) * (asked.get("pp") or 0):
            shape += f"; asked for: tp {asked['tp']}, pp {asked['pp']}"
        lines.append(f"world {world['epoch']}  {state}  {world['model']}  ({shape})")
        rows = [("rank", "tp", "pp", "host", "pid", "guard", "state", "step", "heartbeat")]
        rows += [
            (
                str(rank["rank"]),
                str(rank["tp"]),
                str(rank["pp"]),
                str(rank["host"]),
                str(rank["pid"]),
                str(rank["guard_pid"]),
                str(rank["state"]),
                str(rank["step"]),
                f"{1000 * rank['heartbeat_age_s']:.0f} ms",
            )
            for rank in world.get("ranks", [])
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    if not lines:
        lines.append("no world is there")
    supervisor = cluster.get("supervisor", {})
    if supervisor.get("gone_s") is not None:
        left_s = max(0.0, supervisor["wait_s"] - supervisor["gone_s"])
        lines.insert(
            0,
            f"the supervisor ended {supervisor['gone_s']:.0f} s ago without an order; what is below is what it knew "
            f"then. Requests are served on, but no fault is mended: start `phalanx serve` with the same flags to "
            f"take over, or everything ends in {left_s:.0f} s (`phalanx stop` ends it now)",
        )
    if any(host["state"] != "in use" for host in cluster.get("hosts") or []):
        lines.append(f"hosts: {', '.join(map(_host, cluster['hosts']))}")
    if cluster.get("notice"):
        lines.append(f"notice: {cluster['notice']}")
    faults = cluster.get("faults", [])
    if faults:
        lines.append("last faults:")
    for fault in faults[:5]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fault["at"]))
        lines.append(f"  {at}  world {fault['epoch']}  {fault['kind']}: {fault['detail']}")
        lines.append(f"      {'; '.join([*_place(fault), *_times(fault)])}")
        if line := telling_line(fault.get("last_lines") or ""):
            lines.append(f"      it said: {line}")
        if fault.get("in_flight"):
            ids = ", ".join(fault["in_flight_ids"])
            more = ", ..." if fault["in_flight"] > len(fault["in_flight_ids"]) >= MOST_IN_FLIGHT_IDS else ""
            lines.append(f"      in flight: {fault['in_flight']} ({ids}{more})")
    return lines


def _host(host: dict[str, Any]) -> str:
    words = host["state"]
    if host.get("since"):
        words += f" since {time.strftime('%H:%M:%S', time.localtime(host['since']))}: {host['detail']}"
    return f"{host['name']} ({words})"


def _place(fault: dict[str, Any]) -> list[str]:
    if fault.get("tp") is None:
        return []
    return [f"tp {fault['tp']}, pp {fault['pp']} on {fault['host']}"]


def _times(fault: dict[str, Any]) -> list[str]:
    """How long detection, abort, the next world and the first token took, as far as is known."""
    words = {
        "detect_s": "detected after",
        "abort_s": "world dead after",
        "recover_s": "served again after",
        "resume_s": "first token again after",
    }
    times = [f"{word} {fault[key]:.2f} s" for key, word in words.items() if fault.get(key) is not None]
    return times if fault.get("recover_s") is not None else [*times, "not recovered yet"]


def _memory(world: dict[str, Any]) -> list[str]:
    """What the ranks of a parked spare hold together; nothing before it is measured."""
    total = sum(rank.get("memory_bytes", 0) for rank in world.get("ranks", []))
    return [f"{total / 1e6:.0f} MB"] if total else []
