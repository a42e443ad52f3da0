"""Which rank runs where, on which cores and which GPU, and the table that shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.binding import Cpu, cpus_for, describe, local_place, parse_cpus, usable_cpus
from launcher.gpus import visible_gpus
from launcher.host_list import Host
from launcher.hosts import HostPool
from launcher.logs import EventLog
from launcher.placing import place, places, split_groups
from launcher.rank_table import RankRow, format_table


def hosts(slots: str) -> tuple[Host, ...]:
    return tuple(Host(name, int(count)) for name, count in zip("abcde", slots, strict=False))


@pytest.mark.parametrize(
    ("slots", "tp", "pp", "wanted"),
    [
        ("33", 2, 2, "a2 b2"),  # a slot stays empty on each
        ("312", 2, 2, "a2 c2"),  # b would tear a group
        ("44", 4, 2, "a4 b4"),
        ("54", 3, 2, "a3 b3"),
        ("8888", 8, 1, "a8"),
        ("214", 1, 3, "a2 b1"),
    ],
)
def test_groups_stay_on_one_host_where_the_slots_allow_it(slots: str, tp: int, pp: int, wanted: str) -> None:
    placed = place(hosts(slots), tp * pp, tp)
    assert " ".join(f"{host.name}{host.slots}" for host in placed) == wanted
    assert split_groups(placed, tp, pp) == {}


@pytest.mark.parametrize(
    ("slots", "tp", "pp", "torn"),
    [
        ("11", 2, 1, {0: ["a", "b"]}),
        ("122", 2, 2, {0: ["a", "b"]}),  # rank 0 stays on the first host
        ("2121", 2, 3, {2: ["b", "d"]}),  # whole groups first
        ("53", 2, 4, {2: ["a", "b"]}),  # every slot is needed
        ("44", 8, 1, {0: ["a", "b"]}),
    ],
)
def test_as_few_as_possible_are_torn(slots: str, tp: int, pp: int, torn: dict[int, list[str]]) -> None:
    placed = place(hosts(slots), tp * pp, tp)
    assert sum(host.slots for host in placed) == tp * pp and placed[0].name == "a"
    assert split_groups(placed, tp, pp) == torn


def test_the_pool_places_by_groups_and_takes_lost_hosts_last() -> None:
    pool = HostPool(hosts("332"), EventLog())
    assert [host.slots for host in pool.choose(4, 0.0, tp=2)] == [2, 2]
    pool.on_fault("b", "lost", 0.0)
    assert [host.name for host in pool.choose(4, 1.0, tp=2)] == ["a", "c"]
    assert [host.name for host in pool.choose(8, 1.0, tp=2)] == ["a", "c", "b"]


def test_places_of_ranks() -> None:
    last = places(hosts("22"), 2, 2)[3]
    assert (last.rank, last.tp_rank, last.pp_rank, last.host, last.local_rank) == (3, 1, 1, "b", 1)
    assert {one.host for one in places((), 2, 2)} == {""} and places((), 2, 2)[3].local_size == 4


TWO_SOCKETS = [Cpu(n, n // 4 % 2, n // 4 % 2, n % 4) for n in range(16)]
"""Two sockets of four cores with two threads each: 0-3,8-11 and 4-7,12-15."""


@pytest.mark.parametrize(
    ("binding", "ranks", "wanted"),
    [
        ("none", 2, ["0-15", "0-15"]),
        ("core", 2, ["0-3,8-11", "4-7,12-15"]),
        ("core", 3, ["0-1,8-9", "2-4,10-12", "5-7,13-15"]),
        ("core", 16, [*("0,8", "0,8", "1,9"), *["*"] * 13]),  # more ranks than cores share them
        ("socket", 2, ["0-3,8-11", "4-7,12-15"]),
        ("numa", 4, ["0-3,8-11", "0-3,8-11", "4-7,12-15", "4-7,12-15"]),
        ("numa", 1, ["0-3,8-11"]),
    ],
)
def test_cores_of_ranks(binding: str, ranks: int, wanted: list[str]) -> None:
    for rank, text in enumerate(wanted):
        given = describe(cpus_for(binding, rank, ranks, TWO_SOCKETS))
        assert text in ("*", given), (rank, given)


def test_even_shares_leave_no_core_out_and_share_none() -> None:
    for ranks in range(1, 9):
        given = [number for rank in range(ranks) for number in cpus_for("core", rank, ranks, TWO_SOCKETS)]
        assert sorted(given) == list(range(16)), ranks


def test_processors_of_this_machine() -> None:
    assert {cpu.number for cpu in usable_cpus()} == os.sched_getaffinity(0)
    assert parse_cpus(describe({0, 1, 2, 5, 7, 8})) == {0, 1, 2, 5, 7, 8}
    assert describe([]) == "" and describe([3]) == "3"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (1, 4)),
        ({"MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}, (2, 3)),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}, (0, 1)),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "1"}, (1, 2)),
        ({}, (0, 1)),
    ],
)
def test_place_among_the_ranks_of_a_host(variables: dict[str, str], wanted: tuple[int, int]) -> None:
    assert local_place(variables) == wanted


def test_gpus_that_ranks_see(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    assert visible_gpus({}, tmp_path) == ["0", "1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,0"}, tmp_path) == ["2", "0"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-8f,-1,1"}, tmp_path) == ["GPU-8f"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    assert visible_gpus({}, tmp_path / "no driver") == []


def test_the_table() -> None:
    rows = [RankRow(0, 0, 0, "node-a", "0-3", "0"), RankRow(10, 1, 5, "b", "", "")]
    assert format_table(rows) == [
        "rank  tp  pp  host    cores  GPU",
        "   0   0   0  node-a  0-3    0",
        "  10   1   5  b       -      -",
    ]
