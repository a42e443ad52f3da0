"""Runs the supervisor over this folder's ranks and front until a signal comes: `deployment RUN_DIR TP [SPARE [HOSTS
[PP [elastic]]]]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.adoption import RecordKeeper, find, receive_listener
from launcher.children import child_environment, python_module
from launcher.errors import LauncherError
from launcher.fronts import FrontPlan
from launcher.hosts import Host, address_towards, parse_hosts
from launcher.launchers.mpirun import find_mpirun
from launcher.listeners import bind
from launcher.logs import EventLog
from launcher.run_dir import RunDir
from launcher.stop_signals import StopSignals
from launcher.supervisor import Supervisor
from launcher.watch import SpareKind, adopt_orphans
from launcher.world_records import WorldPlan


def main(
    path: Path, tp: int, spare: SpareKind, hosts: tuple[Host, ...], pp: int = 1, elastic: bool = False
) -> int:
    adopt_orphans()
    log = EventLog()
    log.to_stderr()
    run_dir = RunDir(path)
    settings = {"--tp": str(tp)}
    try:
        found = find(run_dir, settings)
    except LauncherError as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
        return error.exit_code
    listener = receive_listener(run_dir.listener_socket) if found is not None and found.front else None
    if listener is None:
        listener = bind("127.0.0.1", 0)
        listener.listen()
    plan = WorldPlan(
        mpirun=find_mpirun(),
        tp=tp,
        pp=pp,
        cores=1,
        rank_command=python_module("tests.recovery.small_world.rank"),
        guard_command=python_module("launcher.guard"),
        served_model_name="small",
        hosts=hosts,
        elastic=elastic,
        remote_endpoint=f"tcp://{address_towards(hosts)}:*" if hosts else "",
        wait_for_hosts_s=float(os.environ.get("WAIT_FOR_HOSTS_S", "30")) if hosts else None,
    )
    front = [*python_module("tests.recovery.small_world.front"), f"ipc://{run_dir.control_socket}", str(path)]
    front.append(str(listener.fileno()))
    with StopSignals() as stop:
        print("started", flush=True)
        try:
            Supervisor(
                plan=plan,
                run_dir=run_dir,
                fronts=[FrontPlan(front, listener)],
                environment=child_environment(),
                log=log,
                stop=stop,
                on_progress=lambda world: None,
                on_ready=lambda world, state: print(f"ready {world.epoch} {run_dir.run_id}", flush=True),
                spare=spare,
                keeper=RecordKeeper(run_dir, settings),
                found=found,
            ).run()
        except LauncherError as error:
            print(f"phalanx: error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            run_dir.close()
    return 0


if __name__ == "__main__":
    path, tp, spare, hosts, pp, elastic = [*sys.argv[1:], *("2", "none", "", "1", "")[len(sys.argv) - 2 :]]
    sys.exit(main(Path(path), int(tp), SpareKind(spare), parse_hosts(hosts), int(pp), bool(elastic)))
