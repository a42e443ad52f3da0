"""Several fronts: limits that count all of them, and requests on trial that have the world for themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog

from gateway import quarantine
from gateway.admission import WaitingRoom
from gateway.control_messages import FrontState
from gateway.errors import EndpointError, RequestFailed
from gateway.key_file import make_key, save
from gateway.keys import Bucket, KeyRing
from gateway.shared_counts import MAX_BUCKETS, SharedCounts
from gateway.text import TextModel
from gateway.world_claim import WorldClaim
from launcher.world_claims import WorldClaims
from tests.echo_world import write_text_folder
from tests.unit.test_gateway_quarantine import Deployment

# --------------------------------------------------------------------------- limits


def counts(folder: Path, fronts: int = 2) -> list[SharedCounts]:
    return [SharedCounts(folder, front, fronts) for front in range(fronts)]


def test_the_waiting_rooms_of_all_fronts_are_one(tmp_path: Path) -> None:
    shared = counts(tmp_path)
    one, two = (WaitingRoom(10, 100, each) for each in shared)
    for _ in range(6):
        one.enter(5)
    two.check(4, 40, 0.0)
    for wanted in ((5, 5), (1, 71)):
        with pytest.raises(RequestFailed, match="6 requests with 30 prompt tokens") as refused:
            two.check(*wanted, 0.0)
        assert refused.value.code == "overloaded"
    one.leave(5, 1.0)
    two.check(5, 5, 1.0)
    WaitingRoom(10, 100, SharedCounts(tmp_path, 0, 2))  # the first one was started again: nothing waits there
    two.check(10, 100, 1.0)


def test_a_limit_is_one_for_all_fronts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    buckets = [Bucket(60, each.bucket("alice requests")) for each in counts(tmp_path, 3)]
    taken = 0
    while any(bucket.wait_s(1, now) == 0 for bucket in buckets):
        bucket = buckets[taken % 3]
        assert bucket.wait_s(1, now) == 0  # what one still has, all have
        bucket.charge(1, now)
        taken += 1
    assert taken == 60
    now += 10
    assert [bucket.level(now) for bucket in buckets] == [10.0] * 3
    later = Bucket(
        60, SharedCounts(tmp_path, 1, 3).bucket("alice requests")
    )  # of a front that was started again
    assert later.level(now) == 10.0
    later.charge(4, now)
    assert [bucket.level(now) for bucket in buckets] == [6.0] * 3
    assert Bucket(60, SharedCounts(tmp_path, 1, 3).bucket("bob requests")).level(now) == 60.0


def test_what_flows_in_between_two_looks_is_not_given_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    one, two = (Bucket(60, each.bucket("alice tokens")) for each in counts(tmp_path))
    for _ in range(20):
        now += 1
        one.charge(2, now)
        assert one.level(now) - 1 <= two.level(now) <= one.level(now)


def test_keys_of_two_fronts(tmp_path: Path) -> None:
    key, record = make_key("alice", requests_per_minute=5, tokens_per_minute=1000)
    save(tmp_path / "keys.json", [record])
    log = structlog.get_logger()
    rings = [KeyRing(None, tmp_path / "keys.json", log, each) for each in counts(tmp_path)]
    holders = [ring.find(key.encode()) for ring in rings]
    let_through = 0
    for number in range(12):
        holder = holders[number % 2]
        assert holder is not None
        let_through += holder.take_request() is None
    assert let_through == 5
    assert holders[0] is not None and holders[1] is not None
    holders[0].charge_tokens(800)
    assert (b"x-ratelimit-remaining-tokens", b"200") in holders[1].headers()


def test_no_place_for_a_limit_is_no_end(tmp_path: Path) -> None:
    shared, other = counts(tmp_path)
    for number in range(MAX_BUCKETS):
        assert shared.bucket(f"key {number}") is not None
    assert other.bucket("one more") is None and other.bucket("key 77") is not None


def test_a_folder_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="serve with one front"):
        SharedCounts(tmp_path / "nowhere", 0, 2)


# --------------------------------------------------------------------------- quarantine


class Fronts:
    """Two fronts at the same worlds, and the supervisor between them."""

    def __init__(self, text: TextModel) -> None:
        self.claims = [WorldClaim(front, 2) for front in range(2)]
        self.all = [Deployment(text, claim) for claim in self.claims]
        self.frozen: set[int] = set()
        self._supervisor = WorldClaims()
        for claim in self.claims:
            claim.say = self.talk
        self._is_talking = False
        for front in self.all:
            front.up()

    def talk(self) -> None:
        """Until nobody has anything new to say; a frozen front hears nothing."""
        if self._is_talking:
            return
        self._is_talking = True
        before: object = None
        while before != (now := [(claim.wanted, claim.out_of) for claim in self.claims]):
            before = now
            states = [
                FrontState(1, "", front.epoch, claims=claim.wanted, out_of=claim.out_of)
                for front, claim in zip(self.all, self.claims, strict=True)
            ]
            turn = self._supervisor.judge(states)
            for number, claim in enumerate(self.claims):
                if number not in self.frozen:
                    claim.note(turn)
                    self.all[number].requests.note_claims()
        self._is_talking = False

    def settle(self) -> None:
        """Rank 0 confirms what was cancelled, and everybody hears of it."""
        for _ in range(3):
            for number, front in enumerate(self.all):
                if number not in self.frozen:
                    front.confirm()
            self.talk()

    def crash(self) -> None:
        for front in self.all:
            front.down()
        for front in self.all:
            front.up()
        self.settle()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.from_folder(write_text_folder(tmp_path_factory.mktemp("text")))


@pytest.fixture
async def fronts(text: TextModel) -> Fronts:
    return Fronts(text)


async def test_a_suspect_has_the_world_for_itself_over_all_fronts(fronts: Fronts) -> None:
    one, two = fronts.all
    killer = one.ask("killer")
    fronts.crash()
    innocent = two.ask("innocent")
    fronts.crash()
    assert one.in_world() == ["killer"] and two.in_world() == []
    later = two.ask("later")  # waits like everybody else
    fronts.crash()
    assert killer.error is not None and killer.error.code == "poisoned"
    assert sorted(two.in_world()) == ["innocent", "later"]
    assert two.members["innocent"][0].entry.crashes == 1 and innocent.error is later.error is None


async def test_an_acquitted_suspect_lets_the_others_go_on(fronts: Fronts) -> None:
    one, two = fronts.all
    one.ask("a")
    two.ask("b")
    fronts.crash()
    fronts.crash()  # both are suspects now: one front after the other
    assert one.in_world() == ["a"] and two.in_world() == []
    one.token("a")
    fronts.settle()
    assert one.in_world() == [] and two.in_world() == ["b"]  # a has left the world to b
    two.token("b")
    fronts.settle()
    assert one.in_world() == ["a"] and two.in_world() == ["b"]
    for front in fronts.all:
        assert not any(request.entry.crashes for request, _ in front.members.values())


async def test_nobody_is_given_up_for_a_death_beside_others(
    fronts: Fronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "CLAIM_WAIT_S", 0.01)
    one, two = fronts.all
    suspect = one.ask("suspect")
    fronts.crash()
    two.ask("frozen")
    fronts.frozen = {1}
    fronts.crash()
    assert one.in_world() == [] and two.in_world() == ["frozen"]
    await asyncio.sleep(0.05)
    assert one.in_world() == ["suspect"]  # for ever it cannot wait
    fronts.crash()
    assert suspect.error is None


async def test_a_round_of_another_front_that_does_not_end(
    fronts: Fronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "ASIDE_S", 0.01)
    one, two = fronts.all
    suspect = one.ask("suspect")
    fronts.crash()
    two.ask("innocent")
    fronts.crash()
    assert one.in_world() == ["suspect"] and two.in_world() == []
    await asyncio.sleep(0.05)
    assert two.in_world() == ["innocent"]
    fronts.talk()
    fronts.crash()  # it was not alone any more
    assert suspect.error is None


def test_turns_go_round_and_a_front_that_is_away_is_waited_for() -> None:
    def state(claims: int | None, out_of: int | None) -> FrontState:
        return FrontState(1, "", 7, claims=claims, out_of=out_of)

    claims = WorldClaims()
    assert claims.judge([state(None, None), None]) is None
    first = claims.judge([state(7, None), state(7, None)])
    assert first is not None and (first.front, first.is_alone) == (0, False)
    first = claims.judge([state(7, None), state(7, 7)])
    assert first is not None and (first.front, first.is_alone) == (0, True)
    away = claims.judge([state(7, None), None])
    assert away is not None and not away.is_alone
    second = claims.judge([state(None, 7), state(7, 7)])
    assert second is not None and (second.front, second.is_alone) == (1, True)
    third = claims.judge([state(8, None), state(None, None)])
    assert third is not None and (third.front, third.epoch, third.is_alone) == (0, 8, False)
