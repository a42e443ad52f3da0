"""Requests in worlds that die: the order in which they go on, who is tried alone, who is acquitted, who fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import structlog

from gateway import quarantine
from gateway.control_messages import Fault
from gateway.errors import RequestFailed
from gateway.journal import Journal
from gateway.live_request import Request
from gateway.metrics import FrontMetrics
from gateway.protocol import Cancel, Failed, Limits, Output, SamplingParams, Submit, Tokens, Welcome
from gateway.replay import BATCH_TOKENS
from gateway.requests import Requests
from gateway.text import TextModel
from gateway.world_claim import WorldClaim
from tests.echo_world import write_text_folder

LIMITS = Limits(100_000, 1_000_000, 64, 300)


class World:
    """A world whose engine is the test."""

    def __init__(self, epoch: int) -> None:
        self.welcome: Welcome | None = Welcome(1, epoch, "m", 1, 1, LIMITS, [2])
        self.running: dict[str, Submit] = {}
        self.submitted: list[Submit] = []
        self.cancelled: list[str] = []

    def send(self, message: Submit | Cancel) -> None:
        if isinstance(message, Submit):
            self.submitted.append(message)
            self.running[message.request_id] = message
        else:
            self.cancelled.append(message.request_id)
            del self.running[message.request_id]  # what it does not have is not cancelled


class Sink:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.error: RequestFailed | None = None

    def output(self, request: Request, output: Output) -> None:
        assert output.position == len(self.token_ids)
        self.token_ids += output.token_ids

    def failed(self, request: Request, error: RequestFailed) -> None:
        self.error = error


class Deployment:
    """Requests, and worlds that the test lets live and die."""

    def __init__(self, text: TextModel, claim: WorldClaim | None = None) -> None:
        self.journal = Journal()
        self.metrics = FrontMetrics("m")
        self.requests = Requests(
            self.journal,
            text,
            self.metrics,
            structlog.get_logger(),
            max_wait_s=60.0,
            max_waiting=10_000,
            claim=claim,
        )
        self.world = World(0)
        self.epoch = 0
        self.members: dict[str, tuple[Request, Sink]] = {}

    def up(self) -> World:
        self.epoch += 1
        self.world = World(self.epoch)
        assert self.world.welcome is not None
        self.requests.world_up(self.world, self.world.welcome)
        return self.world

    def down(self, kind: str | None = "exit", signal: str | None = None, phase: str | None = None) -> None:
        self.requests.world_down()
        if kind is not None:
            fault = Fault(self.epoch, 0.0, kind, 1, "here", "rank 1 did it", signal=signal, phase=phase)
            self.requests.judge([fault])

    def crash(self) -> World:
        self.down()
        return self.up()

    def ask(self, name: str, prompt_tokens: int = 3, priority: int = 0) -> Sink:
        sink = Sink()
        params = SamplingParams(max_tokens=100, seed=1)
        request = self.requests.accept([70] * prompt_tokens, params, [], sink, priority=priority)
        self.members[name] = (request, sink)
        return sink

    def name(self, engine_id: str) -> str:
        request_id = engine_id.split(".")[0]
        return next(name for name, (request, _) in self.members.items() if request.request_id == request_id)

    def in_world(self) -> list[str]:
        return [self.name(engine_id) for engine_id in self.world.running]

    def token(self, *names: str, finish: bool = False) -> None:
        """The engine makes one token for each of these, and confirms what was cancelled."""
        outputs = []
        for engine_id, submit in list(self.world.running.items()):
            if self.name(engine_id) in names:
                request, _ = self.members[self.name(engine_id)]
                position = len(request.entry.output_token_ids)
                outputs.append(Output(submit.request_id, position, [71], "length" if finish else None))
                if finish:
                    del self.world.running[engine_id]
        assert len(outputs) == len(names), (names, self.in_world())
        self.requests.receive(Tokens(self.epoch, 1, outputs))
        self.confirm()

    def confirm(self) -> None:
        cancelled, self.world.cancelled = self.world.cancelled, []
        outputs = [Output(engine_id, 0, [], "cancelled") for engine_id in cancelled]
        if outputs:
            self.requests.receive(Tokens(self.epoch, 1, outputs))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return TextModel.from_folder(write_text_folder(tmp_path_factory.mktemp("text")))


@pytest.fixture
async def front(text: TextModel) -> Deployment:
    deployment = Deployment(text)
    deployment.up()
    return deployment


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    def set_round(round_s: float) -> None:
        monkeypatch.setattr(quarantine, "ROUND_S", round_s)
        monkeypatch.setattr(quarantine, "REST_S", 0.05)

    yield set_round


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one."""
    monkeypatch.setattr(quarantine, "GROUP_TOKENS", 0)


# --------------------------------------------------------------------------- replay


async def test_replays_are_submitted_shortest_first_and_in_batches(front: Deployment) -> None:
    for number, tokens in enumerate((5000, 10, 3000, 5000, 20, 5000)):
        front.ask(f"{tokens}-{number}", tokens)
    front.down(kind="planned")
    front.up()
    assert front.in_world() == ["10-1", "20-4", "3000-2", "5000-0"]
    front.ask("new")
    assert front.in_world()[-1] == "new"  # it waits for one batch, not for all
    front.token("5000-0")
    assert front.in_world()[-1] == "5000-3"
    front.token("5000-0", "10-1", "20-4", "3000-2", "5000-3")
    assert front.in_world()[-1] == "5000-5"
    assert front.metrics.replays == 6


async def test_a_replay_longer_than_a_batch_has_its_turn(front: Deployment) -> None:
    front.ask("long", 2 * BATCH_TOKENS)
    front.ask("short", 10)
    front.down(kind="planned")
    front.up()
    assert front.in_world() == ["short"]
    front.token("short")
    assert front.in_world() == ["short", "long"]


async def test_a_replay_that_ends_makes_room(front: Deployment) -> None:
    for name in ("first", "second", "third"):
        front.ask(name, BATCH_TOKENS)
    front.down(kind="planned")
    front.up()
    front.requests.cancel(front.members["second"][0])  # of those that wait
    assert front.in_world() == ["first"]
    front.token("first", finish=True)
    assert front.in_world() == ["third"]


async def test_replays_of_a_lower_priority_number_come_first(front: Deployment) -> None:
    front.ask("short", 10)
    front.ask("long", 100, priority=-1)
    front.down(kind="planned")
    front.up()
    assert front.in_world() == ["long", "short"]


# --------------------------------------------------------------------------- quarantine


async def test_one_crash_makes_nobody_a_suspect(front: Deployment) -> None:
    for name in "abc":
        front.ask(name)
    front.crash()
    assert sorted(front.in_world()) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["lost", "planned", None])
async def test_what_is_no_crash_is_not_counted(front: Deployment, kind: str | None) -> None:
    for name in "abc":
        front.ask(name)
    for _ in range(4):
        front.down(kind)
        front.up()
    assert sorted(front.in_world()) == ["a", "b", "c"]


async def test_suspects_are_tried_in_groups_and_acquitted(front: Deployment, singly: None) -> None:
    sinks = [front.ask(name, 10 - number) for number, name in enumerate("abc")]
    front.token("a", "b", "c")
    front.crash()
    front.crash()
    assert front.in_world() == ["c"]  # the shortest
    front.ask("new")
    assert front.in_world() == ["c"]
    front.token("c")
    assert front.in_world() == ["b"]
    front.token("b")
    assert front.in_world() == ["a"]
    front.token("a")
    assert sorted(front.in_world()) == ["a", "b", "c", "new"]
    assert front.metrics.trials["acquitted"] == 3
    assert [sink.token_ids for sink in sinks] == [[71, 71]] * 3
    front.crash()
    assert sorted(front.in_world()) == ["a", "b", "c", "new"]  # their count has begun anew


async def test_the_next_trial_waits_until_the_world_is_empty(front: Deployment, singly: None) -> None:
    front.ask("a", 3)
    front.ask("b", 4)
    front.crash()
    front.crash()
    [engine_id] = front.world.running
    front.requests.receive(Tokens(front.epoch, 1, [Output(engine_id, 0, [71])]))
    assert front.world.cancelled == [engine_id] and front.in_world() == []
    front.confirm()
    assert front.in_world() == ["b"]


async def test_one_that_fails_while_it_leaves_holds_nobody_up(front: Deployment, singly: None) -> None:
    front.ask("a", 3)
    front.ask("b", 4)
    front.crash()
    front.crash()
    [engine_id] = front.world.running
    front.requests.receive(Tokens(front.epoch, 1, [Output(engine_id, 0, [71])]))
    assert front.world.cancelled == [engine_id] and front.in_world() == []
    front.requests.receive(Failed(front.epoch, engine_id, "internal", "no"))  # instead of "cancelled"
    assert front.in_world() == ["b"]


async def test_only_the_one_that_kills_alone_fails(front: Deployment, singly: None) -> None:
    innocent = front.ask("innocent", 3)
    poison = front.ask("poison", 4)
    front.crash()
    front.crash()
    front.token("innocent")
    assert front.in_world() == ["poison"]
    front.down("killed", "SIGSEGV", "stepping")
    assert poison.error is not None and poison.error.code == "poisoned"
    assert "ran in 3 worlds" in poison.error.message and "rank 1 did it" in poison.error.message
    front.up()
    assert front.in_world() == ["innocent"] and innocent.error is None
    assert front.metrics.trials["failed"] == 1 and front.metrics.finished["error"] == 1


async def test_who_dies_in_company_does_not_fail(front: Deployment) -> None:
    sinks = [front.ask(name) for name in "ab"]
    front.crash()
    front.crash()
    assert sorted(front.in_world()) == ["a", "b"]
    front.token("a")  # the other one is on trial still, and not alone
    front.down("killed", "SIGSEGV", "stepping")
    front.up()
    assert front.in_world() == ["b"], "alone now"
    front.token("b")
    assert sorted(front.in_world()) == ["a", "b"]
    assert [sink.error for sink in sinks] == [None, None]


async def test_innocent_ones_are_acquitted_together(front: Deployment) -> None:
    names = [f"r{number}" for number in range(12)]
    sinks = [front.ask(name, 3 + number) for number, name in enumerate(names)]
    for _ in range(2):
        front.down("killed", "SIGKILL", "stepping")
        front.up()
    assert front.in_world() == names and front.requests._quarantine.holds
    front.ask("new")
    assert front.in_world() == names
    front.token(*names)
    assert front.in_world() == [*names, "new"] and front.metrics.trials["acquitted"] == 12
    # A third death from outside, in the middle of their trial: two trials free them.
    front.requests.cancel(front.members["new"][0])
    for _ in range(3):
        front.down("killed", "SIGKILL", "stepping")
        front.up()
    assert front.in_world() == names[:6]
    front.token(*names[:6])
    assert front.in_world() == names[6:]
    front.token(*names[6:])
    assert sorted(front.in_world()) == sorted(names)
    assert [sink.error for sink in sinks] == [None] * 12
    assert not any(request.entry.crashes for request, _ in front.members.values())


@pytest.mark.parametrize(("signal", "expected_deaths"), [("SIGSEGV", 4), ("SIGKILL", 8)])
async def test_one_among_twelve_is_found_and_convicted_alone(
    front: Deployment, signal: str, expected_deaths: int
) -> None:
    """SIGKILL: what the kernel does to one that takes the last memory."""
    names = [f"r{number}" for number in range(12)]
    for name in names:
        front.ask(name)
    poison, deaths = "r7", 0
    while front.members[poison][1].error is None:
        assert deaths < expected_deaths
        front.confirm()
        if poison in front.in_world():
            front.down("killed", signal, "stepping")
            deaths += 1
            front.up()
        else:
            front.token(*front.in_world())
    # Two to suspect them, one together, from outside one for each half that holds it, and alone one or two.
    assert deaths == expected_deaths
    errors = {name: sink.error for name, (_, sink) in front.members.items() if sink.error is not None}
    assert list(errors) == [poison] and errors[poison] is not None and errors[poison].code == "poisoned"
    for _ in range(6):
        front.confirm()
        front.token(*front.in_world())
    assert sorted(front.in_world()) == sorted(set(names) - {poison})


async def test_groups_are_not_larger_than_what_others_may_wait_for(
    front: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "GROUP_TOKENS", 100)
    for name in ("first", "second", "third"):
        front.ask(name, 50)
    front.crash()
    front.crash()
    assert front.in_world() == ["first", "second"]
    front.token("first")
    assert front.in_world() == ["first", "second"]
    front.token("second")
    front.confirm()
    assert front.in_world() == ["third"]


async def test_a_signal_from_outside_takes_two_deaths_in_a_step(front: Deployment) -> None:
    sink = front.ask("a")
    front.crash()
    front.crash()
    for phase in ("idle", "stepping", "idle"):
        front.down("killed", "SIGKILL", phase)
        assert sink.error is None
        front.up()
        assert front.in_world() == ["a"]
    front.down("frozen", None, "stepping")
    assert sink.error is not None


async def test_a_lost_node_does_not_count_against_the_one_on_trial(front: Deployment) -> None:
    sink = front.ask("a")
    front.crash()
    front.crash()
    front.down("lost")
    assert sink.error is None and front.members["a"][0].entry.crashes == 2
    front.up()
    assert front.in_world() == ["a"]


@pytest.mark.parametrize("how", ["finishes", "cancelled", "refused"])
async def test_a_trial_that_ends_makes_room_for_the_next(front: Deployment, singly: None, how: str) -> None:
    front.ask("a", 3)
    front.ask("b", 4)
    front.crash()
    front.crash()
    [engine_id] = front.world.running
    if how == "finishes":
        front.token("a", finish=True)
    elif how == "cancelled":
        front.requests.cancel(front.members["a"][0])
        assert front.in_world() == []
        front.confirm()
    else:
        del front.world.running[engine_id]
        front.requests.receive(Failed(front.epoch, engine_id, "invalid_request", "no"))
    assert front.in_world() == ["b"]


async def test_a_suspect_that_is_cancelled_before_its_trial(front: Deployment, singly: None) -> None:
    front.ask("a", 3)
    front.ask("b", 4)
    front.crash()
    front.crash()
    front.requests.cancel(front.members["b"][0])
    front.token("a")
    assert front.in_world() == ["a"]


async def test_trials_leave_room_for_others(
    front: Deployment, singly: None, no_rest: Callable[[float], None]
) -> None:
    for number, name in enumerate("abc"):
        front.ask(name, 3 + number)
    no_rest(60.0)
    front.crash()
    front.crash()
    front.ask("new")
    no_rest(0.0)  # the round is over with the trial that is under way
    front.token("a")
    assert sorted(front.in_world()) == ["a", "new"]
    front.token("new", "a")
    no_rest(60.0)
    async with asyncio.timeout(10):
        while len(front.in_world()) == 2:
            await asyncio.sleep(0.01)
    assert front.in_world() == []  # everybody makes room
    front.confirm()
    assert front.in_world() == ["b"]
    front.token("b")
    front.token("c")
    assert sorted(front.in_world()) == ["a", "b", "c", "new"]
