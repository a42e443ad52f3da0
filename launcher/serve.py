"""`phalanx serve`: checks that this machine can do what the settings ask, brings the model here, and runs the
supervisor with what it found. Called by `cli`; must refuse at once, in one line, what cannot work."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from gateway.control_messages import FrontState, of_front
from launcher.access_settings import KEY_VARIABLE, AccessSettings
from launcher.adoption import Found, RecordKeeper, find, receive_listener
from launcher.children import child_environment, python_module
from launcher.display import Display, choose_display
from launcher.errors import LauncherError
from launcher.fronts import FrontPlan
from launcher.grpc_port import DEFAULT_PORT, choose_grpc_port
from launcher.hangup import HangupReload, has_terminal
from launcher.hosts import Host, address_towards, parse_hosts, with_own_name
from launcher.launchers import mpijob
from launcher.launchers.host_file import host_file
from launcher.launchers.mpirun import Mpirun, find_mpirun, flavor_named
from launcher.listeners import bind, bind_fronts, listen
from launcher.logs import EventLog
from launcher.network import Interface, find_interface
from launcher.owner import Owner
from launcher.planned_changes import PlannedChanges, longest_request, rank_command
from launcher.preparation import PreparedModel, Stopped, prepare
from launcher.processes import usable_cores
from launcher.run_dir import RunDir, RunDirInUse
from launcher.service_manager import ServiceManager
from launcher.settings import Settings, default_cache_dir, default_run_dir
from launcher.slurm_job import SlurmJob
from launcher.start_report import (
    DisplayHandler,
    StartProgress,
    client_url,
    say_ready_line,
    show_preparation,
)
from launcher.stop_signals import StopSignals
from launcher.supervisor import Supervisor
from launcher.watch import SpareKind, adopt_orphans
from launcher.world_records import WorldPlan
from launcher.worlds import World

HOSTS_WAIT_S = 60.0
"""How long other hosts may take to answer before the first world, if nobody says otherwise."""
NOT_RECORDED = (
    "run_dir",
    "max_wait_s",
    "wait_for_hosts",
    "drain_timeout",
    "stopped_exit_code",
    *(setting.name for setting in fields(AccessSettings)),
)
"""Settings that a supervisor may be given otherwise than the one that it takes over from."""


def serve(settings: Settings, read_settings: Callable[[], Settings] | None = None) -> int:
    """Serves until a signal ends it; returns --stopped-exit-code. `read_settings`: again, from where they came, when
    SIGHUP asks for that. Raises LauncherError."""
    log = EventLog()
    reloads = read_settings is not None and not has_terminal()
    with (
        StopSignals(stops_at_hangup=not reloads, leaves_at_usr1=settings.launcher == "slurm") as stop,
        choose_display() as display,
    ):
        log.to_stream(DisplayHandler(display))
        try:
            job = SlurmJob.find(settings)
            with contextlib.suppress(Stopped):
                _serve(settings, log, stop, display, read_settings or (lambda: settings), job)
            if job is not None and stop.leaves:
                job.requeue(log)
        finally:
            log.close()
    return settings.stopped_exit_code


def _serve(
    settings: Settings,
    log: EventLog,
    stop: StopSignals,
    display: Display,
    read_settings: Callable[[], Settings],
    job: SlurmJob | None = None,
) -> None:
    adopt_orphans()
    manager = ServiceManager(os.environ)
    owner = Owner(os.environ)
    mpirun = find_mpirun(settings.mpirun, flavor_named(settings.mpi)) if job is None else job.mpirun
    settings = mpijob.complete(settings, os.environ, log) if job is None else job.complete(settings)
    hosts = parse_hosts(settings.hosts)
    if job is None:
        hosts = with_own_name(hosts)
        host_file(mpirun.flavor, hosts)  # what this MPI cannot name is refused at once
    interface = find_interface(settings.interface) if settings.interface else None
    run_dir, listeners, found = _claim(settings, log)
    try:
        log.to_file(run_dir.path / "supervisor.log")
        port = listeners[0].getsockname()[1]
        grpc_port: int | None = DEFAULT_PORT if settings.grpc_port is None else settings.grpc_port
        if found is not None:
            prepared = PreparedModel(**{**found.prepared, "path": Path(found.prepared["path"])})
        else:
            grpc_port = choose_grpc_port(settings.host, settings.grpc_port, display.say)
            prepared = prepare(
                settings.model,
                settings.tp,
                settings.pp,
                settings.dtype,
                default_cache_dir(),
                lambda progress: show_preparation(display, progress),
                lambda: stop.requested() or owner.has_ended(),
                settings.backend,
                settings.expert_parallel,
            )
            if prepared.license is not None:
                display.say(f"{prepared.name}: {prepared.license}")
        name = settings.served_model_name or prepared.name
        plan = make_plan(settings, prepared, mpirun, hosts, interface, job)
        for listener in listeners:
            listen(listener, settings.host, settings.port)
        run_dir.write_address(client_url(settings, port))
        hangups = HangupReload(run_dir.path, read_settings, log)
        progress = StartProgress(display)
        keeper = RecordKeeper(run_dir, recorded_settings(settings), recorded_model(prepared))

        def remember(changed: Settings, model: PreparedModel) -> None:
            keeper.change(recorded_settings(changed), recorded_model(model))

        def say_ready(world: World, state: FrontState) -> None:
            say_ready_line(display, settings, port, world, state, prepared.path)
            manager.ready(f"serving {world.plan.served_model_name} at {client_url(settings, port)}")
            if job is not None:
                job.publish(run_dir.path, client_url(settings, port, job.address), name, state, log)

        def turn() -> None:
            hangups.check(stop.take_hangup())
            manager.beat()
            if owner.has_ended():
                stop.request()
            if stop.requested():
                manager.stopping()

        environment = child_environment()
        environment.pop(KEY_VARIABLE, None)  # it is nothing for ranks
        Supervisor(
            plan=plan,
            run_dir=run_dir,
            fronts=[
                FrontPlan(
                    front_command(settings, prepared, name, listener.fileno(), run_dir, grpc_port, number),
                    listener,
                )
                for number, listener in enumerate(listeners)
            ],
            environment=environment,
            front_secrets=settings.front_secrets(),
            log=log,
            stop=stop,
            on_progress=progress.show,
            on_ready=say_ready,
            spare=SpareKind(settings.spare),
            drain_timeout_s=settings.drain_timeout,
            keeper=keeper,
            found=found,
            changes=PlannedChanges(settings, prepared, plan, remember),
            on_turn=turn,
        ).run()
        display.say("stopped")
    finally:
        if job is not None:
            job.retire(run_dir.path)
        for listener in listeners:
            listener.close()
        run_dir.close()


def make_plan(
    settings: Settings,
    prepared: PreparedModel,
    mpirun: Mpirun,
    hosts: Sequence[Host],
    interface: Interface | None,
    job: SlurmJob | None = None,
) -> WorldPlan:
    """What the worlds of these settings are started from. Raises LauncherError."""
    name = settings.served_model_name or prepared.name
    guard_command = python_module("launcher.guard")
    if settings.bind != "none":
        guard_command += ["--bind", settings.bind]
    return WorldPlan(
        mpirun=mpirun,
        tp=settings.tp,
        pp=settings.pp,
        cores=usable_cores(),
        rank_command=rank_command(settings, prepared, name),
        guard_command=guard_command,
        served_model_name=name,
        hosts=hosts,
        elastic=settings.elastic,
        max_model_len=longest_request(settings, prepared),
        remote_endpoint=_remote_endpoint(hosts if job is None else job.reachable_hosts(), interface),
        interface=interface,
        wait_for_hosts_s=settings.wait_for_hosts if settings.wait_for_hosts is not None else HOSTS_WAIT_S,
        started_by=job.launcher(interface) if job is not None else None,
    )


def _remote_endpoint(hosts: Sequence[Host], interface: Interface | None) -> str:
    """Where guards of other hosts report; empty if there are none."""
    if len(hosts) < 2:
        return ""
    return f"tcp://{address_towards(hosts) if interface is None else interface.address}:*"


def recorded_settings(settings: Settings) -> dict[str, Any]:
    """By flag, what a supervisor must have been given to take over what another one started."""
    values = {name: value for name, value in asdict(settings).items() if name not in NOT_RECORDED}
    return {
        f"--{name.replace('_', '-')}" if name != "model" else "MODEL": str(value)
        if value is not None
        else None
        for name, value in values.items()
    }


def recorded_model(prepared: PreparedModel) -> dict[str, Any]:
    """The model, for a supervisor that takes over."""
    return {**asdict(prepared), "path": str(prepared.path)}


def _claim(settings: Settings, log: EventLog) -> tuple[RunDir, list[socket.socket], Found | None]:
    """The run folder, tidied of what an earlier run left, the bound sockets of the fronts, and what of an earlier run
    goes on. The folder comes first: a front that an earlier run left behind may hold the port."""
    listeners: list[socket.socket] = []
    path = settings.run_dir
    if path is None:
        if settings.port == 0:
            listeners = bind_fronts(settings.host, 0, settings.fronts)
        path = default_run_dir(listeners[0].getsockname()[1] if listeners else settings.port)
    try:
        run_dir = RunDir(path)
    except RunDirInUse as error:
        if settings.run_dir is not None:
            raise
        raise LauncherError(
            f"port {settings.port} is served already ({error}); choose another port with --port"
        ) from None
    try:
        found = find(run_dir, recorded_settings(settings))
        if found is not None:
            found, received = _take_listeners(found, run_dir, log)
            if received:
                port = next(iter(received.values())).getsockname()[1]
                listeners = [
                    received.get(number) or bind(settings.host, port, shared=settings.fronts > 1)
                    for number in range(settings.fronts)
                ]
        return run_dir, listeners or bind_fronts(settings.host, settings.port, settings.fronts), found
    except LauncherError:
        run_dir.close()
        raise


def _take_listeners(found: Found, run_dir: RunDir, log: EventLog) -> tuple[Found, dict[int, socket.socket]]:
    """The sockets of the fronts that are there, by their numbers. One that does not answer is ended."""
    received: dict[int, socket.socket] = {}
    for number, front in enumerate(found.fronts):
        if front is None:
            continue
        listener = receive_listener(run_dir.path / of_front("listen.sock", number))
        if listener is not None:
            received[number] = listener
            continue
        # It hangs, or is about to end.
        log.warning("the front of an earlier run does not answer; it is replaced", pid=front.pid)
        fronts = tuple(None if other == front else other for other in found.fronts)
        found = replace(found, fronts=fronts)
        run_dir.remove_leftovers(
            keep_epochs=[world.epoch for world in found.worlds], keep_pids=found.front_pids
        )
    return found, received


def front_command(
    settings: Settings,
    prepared: PreparedModel,
    name: str,
    http_fd: int,
    run_dir: RunDir,
    grpc_port: int | None = None,
    number: int = 0,
) -> list[str]:
    """What the supervisor starts as front `number`. The first has the ports of ZeroMQ and gRPC."""
    command = [
        *python_module("gateway.front"),
        "--model-dir",
        str(prepared.path),
        "--served-model-name",
        name,
    ]
    own_zmq = f"ipc://{run_dir.path / of_front('zmq.sock', number)}"
    command += ["--http-fd", str(http_fd), "--zmq", own_zmq if number else settings.zmq]
    if settings.fronts > 1:
        command += ["--front", str(number), "--fronts", str(settings.fronts)]
    if settings.zmq_curve_dir is not None:
        command += ["--zmq-curve-dir", str(settings.zmq_curve_dir.absolute())]
    if grpc_port is not None and number == 0:
        command += ["--grpc", f"{settings.host}:{grpc_port}"]
    control = run_dir.path / of_front("control.sock", number)
    command += ["--control", f"ipc://{control}", "--run-dir", str(run_dir.path)]
    command += ["--max-waiting", str(settings.max_waiting)]
    command += ["--max-waiting-tokens", str(settings.max_waiting_tokens)]
    command += ["--max-wait-s", f"{settings.max_wait_s:g}"]
    command += ["--journal", settings.journal, "--journal-max-bytes", str(settings.journal_max_size)]
    command += ["--journal-retention-s", f"{settings.journal_retention_s:g}"]
    command += ["--disconnect-grace-s", f"{settings.disconnect_grace_s:g}"]
    command += ["--tool-call-parser", settings.tool_call_parser]
    command += ["--reasoning-parser", settings.reasoning_parser]
    if settings.journal_sync:
        command.append("--journal-sync")
    if not settings.page:
        command.append("--no-page")
    return [*command, "--drain-timeout-s", f"{settings.drain_timeout:g}", *settings.access_arguments()]
