"""How large a world may be while hosts are lost, and when it grows again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.growth import BACK_OFF_S, SETTLE_S, Growth
from launcher.hosts import Host, HostPool
from launcher.launchers.mpirun import Flavor, Mpirun
from launcher.logs import EventLog
from launcher.world_records import WorldPlan, WorldTimes
from launcher.world_sizes import HostsMissing, WorldSizes, largest_shape
from launcher.worlds import World

HOSTS = (Host("a", 2), Host("b", 2), Host("c", 2))


@pytest.mark.parametrize(
    ("asked", "slots", "shape"),
    [
        ((2, 2), 3, (2, 1)),  # a stage less; not (3, 1)
        ((2, 3), 4, (2, 2)),
        ((4, 1), 3, (3, 1)),  # any tp
        ((4, 2), 4, (4, 1)),  # rather a stage less than a smaller tp
        ((3, 2), 5, (2, 2)),
        ((1, 4), 3, (1, 3)),
        ((2, 2), 1, (1, 1)),
        ((2, 2), 0, None),
    ],
)
def test_the_largest_world_that_there_is_room_for(asked: Any, slots: int, shape: Any) -> None:
    assert largest_shape(*asked, slots) == shape


def plan(tp: int = 2, pp: int = 3, **more: Any) -> WorldPlan:
    return WorldPlan(
        mpirun=Mpirun(Path("/bin/true"), Flavor.OPEN_MPI, ""),
        tp=tp,
        pp=pp,
        cores=1,
        rank_command=[],
        guard_command=[],
        served_model_name="small",
        hosts=HOSTS,
        **more,
    )


class Loaded(World):
    """One whose KV cache has so many blocks."""

    def __init__(self, of: WorldPlan, blocks: int) -> None:
        self.plan, self._blocks, self.times = of, blocks, WorldTimes()

    @property
    def kv_blocks(self) -> int:
        return self._blocks


def test_a_world_shrinks_only_while_hosts_are_lost_and_with_elastic() -> None:
    pool = HostPool(HOSTS, EventLog())
    sizes = WorldSizes(pool)
    asked, elastic = plan(), plan(elastic=True)
    assert sizes.fit(asked, 0.0) is asked
    pool.on_lost("b", "no answer within 10 s", 1.0)
    with pytest.raises(HostsMissing, match=r"b \(no answer.*room for 4 of 6 ranks.*waited for.*--elastic"):
        sizes.fit(asked, 2.0)
    smaller = sizes.fit(elastic, 2.0)
    assert (smaller.tp, smaller.pp) == (2, 2)
    notice = sizes.notice(elastic, smaller)
    assert notice is not None and "tp 2, pp 2 (4 ranks) instead of tp 2, pp 3 (6) since b is lost" in notice
    assert sizes.notice(elastic, elastic) is None
    pool.on_back("b", 3.0)
    assert sizes.fit(elastic, 4.0) is elastic
    assert sizes.fit(plan(tp=2, pp=2), 5.0).size == 4


def test_a_spare_host_takes_the_place_of_one_that_is_lost() -> None:
    pool = HostPool(HOSTS, EventLog())
    asked = plan(tp=2, pp=2)
    pool.on_lost("b", "dead", 1.0)
    assert WorldSizes(pool).fit(asked, 2.0) is asked
    assert [host.name for host in pool.choose(4, 2.0)] == ["a", "c"]


def test_a_smaller_world_must_hold_what_was_accepted() -> None:
    pool = HostPool(HOSTS, EventLog())
    sizes = WorldSizes(pool)
    elastic = plan(elastic=True, max_model_len=1000)
    sizes.note_blocks(elastic, 100)
    pool.on_lost("c", "dead", 1.0)
    smaller = sizes.fit(elastic, 2.0)
    assert sizes.blocks(smaller) == 0 and sizes.blocks(elastic) == 100
    assert sizes.problem(Loaded(smaller, 63)) is None, "the longest request fits"
    fault = sizes.problem(Loaded(smaller, 62))
    assert fault is not None and "holds 992 tokens, and requests of up to 1000" in fault.detail
    with pytest.raises(HostsMissing, match=r"fewer cannot serve: .*--kv-cache-memory"):
        sizes.fit(elastic, 3.0)
    with pytest.raises(HostsMissing):
        sizes.fit(elastic, 4.0)
    assert sizes.fit(plan(elastic=True, version="2"), 4.0).pp == 2, "of another model nothing is known"


def test_the_world_grows_when_the_hosts_are_back_and_it_has_settled() -> None:
    pool = HostPool(HOSTS, EventLog())
    sizes = WorldSizes(pool)
    growth = Growth(pool, sizes)
    elastic = plan(elastic=True)
    for host in ("b", "c"):
        pool.on_lost(host, "dead", 0.0)
    smaller = Loaded(sizes.fit(elastic, 1.0), 0)
    assert smaller.size == 2
    assert not growth.is_due(elastic, smaller, 99.0), "it does not serve yet"
    smaller.times.served = 10.0
    assert not growth.is_due(elastic, smaller, 99.0), "nobody is back"
    pool.on_back("c", 50.0)
    assert not growth.is_due(elastic, smaller, 10.0 + SETTLE_S / 2)
    assert growth.is_due(elastic, smaller, 99.0), "a part is better than nothing"
    assert growth.on_failed(99.0) == BACK_OFF_S and not growth.is_due(elastic, smaller, 100.0)
    assert growth.is_due(elastic, smaller, 99.0 + BACK_OFF_S)
    for at in (100.0, 101.0, 102.0):
        pool.on_fault("c", "killed", at)
    assert not growth.is_due(elastic, smaller, 200.0), "it would bring the next fault"
    assert growth.is_due(elastic, smaller, 800.0)
    assert not growth.is_due(elastic, Loaded(elastic, 0), 800.0), "it is as large as asked for"
