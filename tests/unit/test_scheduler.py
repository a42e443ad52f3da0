"""The scheduler and its block pool under any order of arrivals, cancels, steps and preemptions."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import SequenceParams, StepPlan, StepResult
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.scheduler import Refused, Scheduler, SchedulerLimits
from engine.scheduling.sequence import Sequence

PARAMS = SequenceParams(0.0, 1.0, 0, 0, 0)
END = 7


def sequence(name: int, num_prompt: int, max_tokens: int, stop: frozenset[int] = frozenset()) -> Sequence:
    return Sequence(
        (b"c", str(name)), [1] * num_prompt, num_prompt, max_tokens, frozenset({END}), stop, PARAMS
    )


def scheduler(num_blocks: int = 32, num_slots: int = 1, max_num_seqs: int = 4, budget: int = 8) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 4), SchedulerLimits(100, max_num_seqs, budget), num_slots)


class Ranks:
    """What the other ranks would know from the plans alone: it must always be enough, and never contradict.

    Each cache slot remembers the whole context that its keys were computed from.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}

    def apply(self, plan: StepPlan, tokens_of: dict[int, list[int]]) -> None:
        for handle in plan.released:
            del self.tables[handle], self.computed[handle]
        for handle, _ in plan.admitted:
            assert handle not in self.tables, "a handle was given out twice"
            self.tables[handle], self.computed[handle] = [], -1
        for row, block in plan.decode_blocks:
            self.tables[plan.decode_handles[row]].append(block)
        for handle, token in zip(plan.decode_handles, plan.decode_tokens, strict=True):
            self._compute(handle, self.computed[handle], [token], tokens_of[handle])
        for chunk in plan.chunks:
            self.tables[chunk.handle] += chunk.new_blocks
            self._compute(chunk.handle, chunk.start, chunk.token_ids, tokens_of[chunk.handle])
        # All keys of a step are written before anything attends.
        for handle in [*plan.decode_handles, *(chunk.handle for chunk in plan.chunks)]:
            for position in range(self.computed[handle]):
                read = self.cache[self._slot(handle, position)]
                assert read == tuple(tokens_of[handle][: position + 1]), "a slot holds another context"

    def _compute(self, handle: int, start: int, new: list[int], tokens: list[int]) -> None:
        # An admitted sequence may start behind blocks that were there.
        assert self.computed[handle] in (start, -1), "a token was skipped or computed twice"
        for position, token in enumerate(new, start):
            assert tokens[position] == token
            self.cache[self._slot(handle, position)] = tuple(tokens[: position + 1])
        self.computed[handle] = start + len(new)

    def _slot(self, handle: int, position: int) -> tuple[int, int]:
        return self.tables[handle][position // self.block_size], position % self.block_size


requests = st.tuples(st.integers(1, 40), st.integers(1, 30))


@settings(max_examples=300, deadline=None)
@given(
    num_slots=st.integers(1, 3),
    num_blocks=st.integers(18, 40),
    budget=st.integers(4, 24),
    arrivals=st.lists(requests, min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_nothing_leaks_starves_or_exceeds_the_budget(
    num_slots: int, num_blocks: int, budget: int, arrivals: list[tuple[int, int]], seed: int
) -> None:
    choices = random.Random(seed)
    subject = scheduler(num_blocks, num_slots, budget=budget)
    ranks = Ranks(4)
    todo = deque(sequence(name, *sizes) for name, sizes in enumerate(arrivals))
    expected = {s.key: s.max_tokens for s in todo}
    received: dict[tuple[bytes, str], int] = dict.fromkeys(expected, 0)
    ended: dict[tuple[bytes, str], str] = {}
    outstanding: dict[int, StepPlan] = {}
    steps = slot = 0
    while todo or subject.has_work:
        steps += 1
        assert steps < 5000, "a sequence starves"
        while todo and choices.random() < 0.5:
            subject.add(todo.popleft())
        if choices.random() < 0.05:
            key = choices.choice(sorted(expected))
            token = subject.cancel(key)
            if token is not None:
                ended[key] = "cancelled"
        if slot in outstanding:
            plan = outstanding.pop(slot)
            drawn = [END if choices.random() < 0.03 else 3 for _ in plan.sampling_handles]
            for token in subject.complete(slot, StepResult(drawn)):
                if token.token_id is not None:
                    assert token.position == received[token.key]
                    received[token.key] += 1
                if token.finish_reason:
                    assert token.key not in ended
                    ended[token.key] = token.finish_reason
        plan_or_none = subject.schedule(slot)
        if plan_or_none is not None:
            assert plan_or_none.num_tokens <= budget
            ranks.apply(
                plan_or_none,
                {s.handle: s.tokens for many in subject.running for s in many if s.handle is not None},
            )
            outstanding[slot] = plan_or_none
        slot = (slot + 1) % num_slots
    assert set(ended) == set(expected)
    for key, reason in ended.items():
        if reason == "length":
            assert received[key] == expected[key]
        else:
            assert received[key] <= expected[key]
    subject.check_idle()
    assert subject.pool.num_used == 0


def test_running_streams_are_never_stalled_by_a_long_prompt() -> None:
    subject = scheduler(budget=8)
    subject.add(sequence(0, 3, 20))
    subject.schedule(0)
    list(subject.complete(0, StepResult([3])))
    subject.add(sequence(1, 60, 5))
    for _ in range(8):
        plan = subject.schedule(0)
        assert plan is not None
        assert len(plan.decode_handles) >= 1, "the running stream must be in every step"
        list(subject.complete(0, StepResult([3] * len(plan.sampling_handles))))


def test_the_oldest_is_never_preempted() -> None:
    subject = scheduler(num_blocks=12, budget=16)
    for name in range(4):
        subject.add(sequence(name, 8, 30))
    finished = []
    for _ in range(400):
        plan = subject.schedule(0)
        if plan is None:
            break
        oldest = min(subject.running[0], key=lambda s: s.arrival)
        computed = oldest.num_computed
        for token in subject.complete(0, StepResult([3] * len(plan.sampling_handles))):
            if token.finish_reason:
                finished.append(token.key[1])
        assert oldest.num_computed >= computed or oldest.key[1] in finished
    assert finished == ["0", "1", "2", "3"]
    assert subject.num_preemptions > 0


def test_ends() -> None:
    subject = scheduler()
    subject.add(sequence(0, 2, 10))
    subject.add(sequence(1, 2, 10, stop=frozenset({9})))
    subject.schedule(0)
    ends = {token.key[1]: token for token in subject.complete(0, StepResult([END, 9]))}
    assert (ends["0"].finish_reason, ends["0"].stop_token_id) == ("stop", None)
    assert (ends["1"].finish_reason, ends["1"].stop_token_id) == ("stop", 9)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "num_blocks", "says"),
    [
        (90, 20, 32, "prompt of 90 tokens plus max_tokens 20 is 110, but the model's length is 100"),
        (40, 30, 16, "KV cache holds 64 tokens"),
        (0, 5, 32, "empty"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_numbers(
    num_prompt: int, max_tokens: int, num_blocks: int, says: str
) -> None:
    with pytest.raises(Refused, match=says):
        scheduler(num_blocks).add(sequence(0, num_prompt, max_tokens))


def test_a_block_cannot_be_given_back_twice() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.take(2)
    pool.give_back(blocks)
    with pytest.raises(ValueError, match="twice"):
        pool.give_back(blocks)


def _run_alone(subject: Scheduler, one: Sequence) -> list[StepPlan]:
    subject.add(one)
    plans = []
    while (plan := subject.schedule(0)) is not None:
        plans.append(plan)
        list(subject.complete(0, StepResult([3] * len(plan.sampling_handles))))
    return plans


def test_a_second_request_computes_only_what_differs() -> None:
    subject = Scheduler(BlockPool(200, 4), SchedulerLimits(400, 4, 400), 1)
    prefix = list(range(100, 300))
    for name, tail in enumerate(([1, 2, 3], [4, 5, 6])):
        tokens = prefix + tail
        one = Sequence((b"c", str(name)), list(tokens), len(tokens), 5, frozenset(), frozenset(), PARAMS)
        plans = _run_alone(subject, one)
        assert plans[0].num_tokens == (len(tokens) if name == 0 else len(tail))
    assert subject.pool.num_hit_tokens == len(prefix)
    subject.check_idle()


def test_the_first_token_says_what_the_cache_had() -> None:
    subject = Scheduler(BlockPool(200, 4), SchedulerLimits(400, 4, 400), 1)
    tokens, told = list(range(100, 142)), []
    for name in range(2):
        subject.add(Sequence((b"c", str(name)), list(tokens), 42, 3, frozenset(), frozenset(), PARAMS))
        while (plan := subject.schedule(0)) is not None:
            new = subject.complete(0, StepResult([3] * len(plan.sampling_handles)))
            told += [token.num_cached_tokens for token in new]
    assert told == [0, None, None, 40, None, None]


def test_the_same_prompt_again_computes_its_last_block_only() -> None:
    subject = Scheduler(BlockPool(200, 4), SchedulerLimits(400, 4, 400), 1)
    tokens = list(range(100, 140))
    for name, computed in enumerate((40, 4)):
        one = Sequence((b"c", str(name)), list(tokens), len(tokens), 1, frozenset(), frozenset(), PARAMS)
        assert _run_alone(subject, one)[0].num_tokens == computed


def test_requests_that_come_together_share_their_prompt() -> None:
    subject = Scheduler(BlockPool(200, 4), SchedulerLimits(400, 8, 400), 1)
    tokens = list(range(100, 142))
    for name in range(4):
        subject.add(Sequence((b"c", str(name)), list(tokens), 42, 5, frozenset(), frozenset(), PARAMS))
    plan = subject.schedule(0)
    assert plan is not None
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [42, 2, 2, 2]
    assert subject.pool.num_used == 10 + 4


def test_content_is_forgotten_least_recently_used_first_and_only_when_room_is_needed() -> None:
    subject = Scheduler(BlockPool(9, 4), SchedulerLimits(36, 1, 36), 1)

    def computed(first: int, name: int) -> int:
        tokens = list(range(first, first + 13))
        one = Sequence((b"c", str(name)), tokens, 13, 1, frozenset(), frozenset(), PARAMS)
        return _run_alone(subject, one)[0].num_tokens

    assert [computed(first, name) for name, first in enumerate((100, 200, 100))] == [13, 13, 1]
    # A third content needs four blocks; three are free, so the end of the 200s is forgotten, not the 100s.
    assert computed(300, 3) == 13
    assert computed(100, 4) == 1
    assert computed(200, 5) > 1
