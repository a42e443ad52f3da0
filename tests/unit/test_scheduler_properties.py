"""Whatever comes in whatever order: streams, pooled prompts, shared beginnings, priorities, cancels."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import Pooling, PoolingKind, SequenceParams, StepPlan, StepResult
from engine.scheduling.scheduler import NewToken, Scheduler
from engine.scheduling.sequence import Sequence
from tests.unit.test_scheduler import END, Ranks, scheduler

BLOCK = 4


@dataclass(frozen=True)
class Ask:
    """One request: its prompt is the first `num_prompt` tokens of one of two texts, so that beginnings are shared."""

    text: int
    num_prompt: int
    max_tokens: int
    pooling: Pooling | None
    priority: int

    def sequence(self, name: int) -> Sequence:
        tokens = [1000 * (self.text + 1) + position for position in range(self.num_prompt)]
        params = SequenceParams(0.0, 1.0, 0, 0, 0, pooling=self.pooling)
        max_tokens = 0 if self.pooling else self.max_tokens
        end = frozenset({END})
        return Sequence(
            (b"c", str(name)), tokens, len(tokens), max_tokens, end, frozenset(), params, self.priority
        )


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    num_prompt = draw(st.integers(2, 40))
    kind = draw(st.sampled_from([None, None, *PoolingKind]))
    first_scored = draw(st.integers(1, num_prompt - 1))
    pooling = None if kind is None else Pooling(kind, first_scored=first_scored)
    return Ask(
        draw(st.integers(0, 1)), num_prompt, draw(st.integers(1, 30)), pooling, draw(st.integers(-1, 1))
    )


@dataclass
class Pooled:
    """What a sampler would have pooled of the running sequences, from the plans alone."""

    states: dict[int, list[int]] = field(default_factory=dict)
    """Positions whose hidden states were seen, by handle."""

    def apply(self, plan: StepPlan, params: dict[int, SequenceParams]) -> dict[int, bytes]:
        for handle in plan.released:
            self.states.pop(handle, None)
            params.pop(handle, None)
        params.update(plan.admitted)
        found = {}
        for handle in plan.decode_handles:
            assert params[handle].pooling is None, "a pooled sequence decodes"
        for chunk in plan.chunks:
            pooling = params[chunk.handle].pooling
            assert pooling is not None or not chunk.pools
            assert not (chunk.pools and chunk.samples)
            if pooling is None:
                continue
            seen = self.states.setdefault(chunk.handle, [])
            seen += range(chunk.start, chunk.start + len(chunk.token_ids))
            assert not chunk.samples, "a token is drawn for a pooled sequence"
            if chunk.pools:
                length = chunk.start + len(chunk.token_ids)
                needed = {
                    PoolingKind.LAST: range(length - 1, length),
                    PoolingKind.MEAN: range(length),
                    PoolingKind.SCORE: range(pooling.first_scored - 1, length),
                }[pooling.kind]
                assert seen == list(range(seen[0], length)), "a position was pooled twice, or left out"
                assert set(needed) <= set(seen), "a state that is needed was not computed"
                found[chunk.handle] = str(self.states.pop(chunk.handle)).encode()
        return found


@settings(max_examples=400, deadline=None)
@given(
    num_slots=st.integers(1, 3),
    num_blocks=st.integers(18, 40),
    budget=st.integers(4, 24),
    arrivals=st.lists(asks(), min_size=1, max_size=14),
    cancels=st.lists(st.integers(0, 13), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_as_it_should_and_nothing_is_left(
    num_slots: int, num_blocks: int, budget: int, arrivals: list[Ask], cancels: list[int], seed: int
) -> None:
    choices = random.Random(seed)
    subject = scheduler(num_blocks, num_slots, budget=budget)
    ranks, pooled, params = Ranks(BLOCK), Pooled(), {}
    expected = {(b"c", str(name)): ask for name, ask in enumerate(arrivals)}
    todo = deque(ask.sequence(name) for name, ask in enumerate(arrivals))
    doomed = {(b"c", str(name)) for name in cancels}
    ended: dict[tuple[bytes, str], NewToken] = {}
    received = dict.fromkeys(expected, 0)
    outstanding: dict[int, tuple[StepPlan, dict[int, bytes]]] = {}
    steps = slot = 0
    while todo or subject.has_work:
        steps += 1
        assert steps < 5000, "a request starves"
        while todo and choices.random() < 0.5:
            subject.add(todo.popleft())
        for key in sorted(doomed):
            # At any moment: waiting, running, in flight, ended, or not here yet.
            if choices.random() < 0.1 and (token := subject.cancel(key)) is not None:
                assert key not in ended
                ended[key] = token
        if slot in outstanding:
            plan, numbers = outstanding.pop(slot)
            drawn = [END if choices.random() < 0.03 else 3 for _ in plan.sampling_handles]
            for token in subject.complete(slot, StepResult(drawn, pooled=numbers)):
                assert token.key not in ended, "something came after the end"
                received[token.key] += token.token_id is not None
                if token.finish_reason is not None:
                    ended[token.key] = token
        made = subject.schedule(slot)
        if made is not None:
            assert made.num_tokens <= budget
            running = {s.handle: s.tokens for many in subject.running for s in many if s.handle is not None}
            ranks.apply(made, running)
            outstanding[slot] = (made, pooled.apply(made, params))
        slot = (slot + 1) % num_slots
    assert set(ended) == set(expected)
    for key, token in ended.items():
        ask = expected[key]
        if token.finish_reason == "cancelled":
            assert key in doomed and token.pooled is None
        elif ask.pooling is not None:
            assert (token.finish_reason, received[key]) == ("stop", 0) and token.pooled
        else:
            assert token.pooled is None
            assert token.finish_reason == "stop" or received[key] == ask.max_tokens
    subject.check_idle()
    assert subject.pool.num_used == 0
    assert not pooled.states.keys() - set(params)


@settings(max_examples=100, deadline=None)
@given(st.lists(asks(), min_size=2, max_size=10), st.integers(4, 16), st.integers(1, 2))
def test_who_comes_first_in_the_order_of_service_is_computed_first(
    arrivals: list[Ask], budget: int, num_slots: int
) -> None:
    """All there from the beginning, and room for one at a time: they end in the order of (priority, arrival)."""
    subject = Scheduler(scheduler(40).pool, scheduler(40, budget=budget, max_num_seqs=1).limits, num_slots)
    for name, ask in enumerate(arrivals):
        subject.add(ask.sequence(name))
    order = sorted(range(len(arrivals)), key=lambda name: (arrivals[name].priority, name))
    ended: list[int] = []
    pooled, params = Pooled(), {}
    for step in range(5000):
        if not subject.has_work:
            break
        slot = step % num_slots
        plan = subject.schedule(slot)
        if plan is not None:
            result = StepResult([3] * len(plan.sampling_handles), pooled=pooled.apply(plan, params))
            ended += [int(token.key[1]) for token in subject.complete(slot, result) if token.finish_reason]
    assert ended == order


def test_a_flood_of_urgent_requests_lets_the_running_ones_go_on() -> None:
    """Priorities decide who is admitted next; a request that runs gets its token in every step, whatever waits."""
    subject = scheduler(num_blocks=64, budget=8, max_num_seqs=2)
    subject.add(Ask(0, 4, 20, None, 5).sequence(0))
    urgent = 1
    tokens = 0
    for _ in range(60):
        subject.add(Ask(1, 6, 3, None, -5).sequence(urgent))
        urgent += 1
        plan = subject.schedule(0)
        assert plan is not None
        for token in subject.complete(0, StepResult([3] * len(plan.sampling_handles))):
            tokens += token.key[1] == "0"
    assert tokens == 20
