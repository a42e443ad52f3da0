"""`--hosts`, which hosts a world gets, and whether it runs where it should."""

from __future__ import annotations

import io
import logging
import socket
import time
from pathlib import Path

import pytest

from launcher.children import child_environment
from launcher.errors import SettingsError
from launcher.fronts import FrontPlan
from launcher.guard_messages import GuardHello
from launcher.host_faults import WINDOW_S
from launcher.hosts import Host, HostPool, check_slots, host_of, parse_hosts
from launcher.launchers.mpirun import Flavor, Mpirun, argv, environment
from launcher.logs import EventLog
from launcher.placement import find_misplaced
from launcher.processes import host_id
from launcher.run_dir import RunDir
from launcher.stop_signals import StopSignals
from launcher.supervisor import Supervisor
from launcher.watch import EXIT_CONFIG, SpareKind
from launcher.world_records import RankWatch, WorldFault, WorldPlan

A, B, C = Host("a", 2), Host("b", 1), Host("c", 4)


@pytest.mark.parametrize(
    "text", ["a:2,b,c:4", "a slots=2\nb\n\n# spare\nc   slots = 4 # big\n", "a:2\nb:1\nc:3\nc:1\n"]
)
def test_every_way_to_name_hosts(text: str, tmp_path: Path) -> None:
    if "\n" in text:
        (tmp_path / "hosts").write_text(text)
        text = str(tmp_path / "hosts")
    assert parse_hosts(text) == (A, B, C)


def test_no_hosts_is_this_machine_alone() -> None:
    assert parse_hosts("") == ()
    check_slots((), 99)


@pytest.mark.parametrize("text", ["a:two", "a:1:2", ",", "a slots"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(SettingsError, match="--hosts"):
        parse_hosts(text)


def test_too_few_slots() -> None:
    check_slots((A, B), 3)
    with pytest.raises(SettingsError, match="3 slots, but tp \\* pp are 4"):
        check_slots((A, B), 4)


def test_lost_hosts_come_last_until_they_are_back() -> None:
    pool = HostPool((A, B, C), EventLog())
    assert pool.choose(3, 0.0) == (A, B)
    assert pool.choose(1, 0.0) == (Host("a", 1),)
    pool.on_fault("b", "lost", 10.0)
    assert pool.choose(3, 10.0) == (A, Host("c", 1))
    assert pool.choose(7, 10.0) == (A, C, B), "it is needed"
    assert pool.choose(3, 1e6) == (A, Host("c", 1)) and pool.slots_present(1e6) == 6
    pool.on_back("b", 14.0)
    assert pool.choose(3, 14.0) == (A, B) and pool.slots_present(14.0) == 7
    pool.on_fault("b", "lost", 10.0)
    pool.on_fault("c", "lost", 15.0)
    assert pool.choose(3, 16.0) == (A, B), "it was lost earlier than the other one"
    pool.on_back("b", 17.0)
    pool.on_fault("b", "lost", 20.0)
    assert pool.choose(3, 21.0) == (A, Host("c", 1))
    pool.on_fault("a", "lost", 10.0)
    assert pool.choose(3, 11.0)[0] == A, "rank 0 stays beside the supervisor"


def test_slots_are_filled_in_order() -> None:
    assert [host_of((A, B, C), rank) for rank in range(5)] == ["a", "a", "b", "c", "c"]


def ranks(*machines: str) -> dict[int, RankWatch]:
    return {
        rank: RankWatch(GuardHello(1, rank, f"name-{machine}", machine, 1, 1, 1, 1), b"", 0.0)
        for rank, machine in enumerate(machines)
    }


def test_where_ranks_should_be() -> None:
    here = host_id()
    assert find_misplaced((), ranks("x", "y")) is None
    assert find_misplaced((A, B), ranks(here, here, "y")) is None


@pytest.mark.parametrize(
    "machines", [(True, True, True), (True, "y", "y"), (True, "y", "z"), ("y", "y", "z")]
)
def test_ranks_in_the_wrong_place_are_one_clear_message(machines: tuple[object, ...]) -> None:
    fault = find_misplaced((A, B), ranks(*(host_id() if m is True else str(m) for m in machines)))
    assert fault is not None and fault.exit_code == EXIT_CONFIG
    assert "--hosts" in fault.detail


def test_mpirun_over_hosts_shows_no_value() -> None:
    mpirun = Mpirun(Path("/bin/mpirun"), Flavor.OPEN_MPI, "")
    variables = {"PHALANX_GUARD_SECRET_KEY": "hidden", "PATH": "/bin", "OMP_NUM_THREADS": "2"}
    command = argv(mpirun, 3, ["guard"], Path("/run/hosts"), variables)
    assert command[3:5] == ["--hostfile", "/run/hosts"] and command[-1] == "guard"
    assert command[-5:-1] == ["-x", "OMP_NUM_THREADS", "-x", "PHALANX_GUARD_SECRET_KEY"]
    assert "hidden" not in " ".join(command)
    made = environment(mpirun, 1, 4, Path("/dev/shm/w"), Path("/tmp/w"), {}, several_hosts=True)
    assert made["OMPI_MCA_btl"] == "self,sm,tcp" and made["PRTE_MCA_oob_tcp_keepalive_probes"] == "2"


def test_hosts_with_three_faults_are_left_out_while_others_suffice() -> None:
    log = EventLog("test-of-hosts")
    written = io.StringIO()
    log.to_stream(logging.StreamHandler(written))
    pool = HostPool((A, B, C), log)
    for at, kind in enumerate(["killed", "hung", "lost"]):
        assert pool.choose(3, float(at)) == (A, B)
        pool.on_fault("b", kind, float(at))
    back_at = 62.0
    pool.on_back("b", back_at)
    assert pool.choose(3, back_at) == pool.choose(3, back_at + 1) == (A, Host("c", 1))
    lines = written.getvalue().splitlines()
    assert "host lost host=b" in lines[0] and "host is back host=b" in lines[1]
    line = lines[-1]
    assert 'warning host left out while others suffice host=b faults="killed, hung, lost" until=2' in line
    assert pool.choose(7, back_at) == (A, B, C), "it is needed"
    pool.on_fault("c", "lost", back_at)
    assert pool.choose(3, back_at) == (A, B), "c cannot be reached: b is needed"
    assert pool.choose(3, WINDOW_S + 1.0) == (A, B), "the first fault is long ago"
    assert written.getvalue().count("left out") == 1


def test_the_supervisors_own_host_is_never_left_out() -> None:
    for hosts in ((A,), (A, B)):
        pool = HostPool(hosts, EventLog())
        for at in range(9):
            pool.on_fault("a", "killed", float(at))
            pool.on_fault("", "killed", float(at))  # no --hosts
        assert pool.choose(2, 9.0) == (A,)


@pytest.mark.parametrize("rank", [2, None])
def test_the_supervisor_counts_each_fault(rank: int | None, tmp_path: Path) -> None:
    """Against the host of the rank that the fault names, as --hosts calls it; the next world goes elsewhere."""
    log = EventLog("test-of-hosts-wiring")
    plan = WorldPlan(
        mpirun=Mpirun(Path("/bin/true"), Flavor.OPEN_MPI, ""),
        tp=3,
        pp=1,
        cores=1,
        rank_command=[],
        guard_command=[],
        served_model_name="small",
        hosts=(A, B, C),
        remote_endpoint="tcp://127.0.0.1:*",
    )
    run_dir = RunDir(tmp_path)
    with StopSignals() as stop, socket.create_server(("127.0.0.1", 0)) as listener:
        supervisor = Supervisor(
            plan=plan,
            run_dir=run_dir,
            fronts=[FrontPlan([], listener)],
            environment=child_environment(),
            log=log,
            stop=stop,
            on_progress=lambda world: None,
            on_ready=lambda world, state: None,
        )
        for _ in range(3):
            world = supervisor._worlds.start(SpareKind.WARM)
            assert world.hosts == (A, B)
            supervisor._worlds.abort(
                world, WorldFault("exit", rank, "a-name", "rank 2 exited"), time.monotonic()
            )
        after = supervisor._worlds.start(SpareKind.WARM)
        assert after.hosts == ((A, Host("c", 1)) if rank == 2 else (A, B))
        supervisor._shut_down()
    run_dir.close()
