"""How long steps get by prompts: against a machine whose costs are known."""

from __future__ import annotations

import pytest

from engine.plan import StepResult
from engine.scheduling.kv_blocks import BlockPool
from engine.scheduling.pace import FIRST_TOKENS, LEAST_TOKENS, Pace
from engine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.unit.test_scheduler import sequence


def cost_s(num_decoding: int, num_chunk_tokens: int, token_s: float) -> float:
    """A decode step costs the same for one row and for sixty-four, as on CPUs."""
    return (0.06 if num_decoding else 0.0) + num_chunk_tokens * token_s


@pytest.mark.parametrize("token_s", [0.0001, 0.0002, 0.0004])
@pytest.mark.parametrize("step_factor", [2.0, 4.0])
def test_a_step_beside_streams_takes_the_factor_once_it_is_known(token_s: float, step_factor: float) -> None:
    pace = Pace(step_factor)
    pace.note(8, 0, cost_s(8, 0, token_s))
    for _ in range(30):
        tokens = pace.chunk_tokens(8, 1)
        pace.note(8, tokens, cost_s(8, tokens, token_s))
    assert cost_s(8, pace.chunk_tokens(8, 1), token_s) == pytest.approx(step_factor * 0.06, rel=0.15)


def test_it_follows_a_cost_that_grows_with_the_context() -> None:
    pace = Pace(4.0)
    pace.note(8, 0, 0.06)
    longest = 0.0
    computed = 0
    while computed < 6000:
        tokens = pace.chunk_tokens(8, 1)
        duration = cost_s(8, tokens, 0.0002 * (1 + computed / 2000))  # four times as much in the end
        if computed > 500:
            longest = max(longest, duration)
        pace.note(8, tokens, duration)
        computed += tokens
    assert longest < 1.5 * 4.0 * 0.06


def test_more_who_wait_get_more() -> None:
    pace = Pace(4.0)
    pace.note(8, 0, 0.06)
    pace.note(0, 1000, 0.6)
    one, eight, many = (pace.chunk_tokens(8, waiting) for waiting in (1, 8, 100))
    assert one < eight < many and many > 2000


def test_unknown_and_hopeless_costs_have_bounds() -> None:
    pace = Pace(4.0)
    assert pace.chunk_tokens(8, 1) == FIRST_TOKENS
    pace.note(8, 0, 0.001)
    pace.note(8, 100, 10.0)
    assert pace.chunk_tokens(8, 1) == LEAST_TOKENS


@pytest.mark.parametrize("num_slots", [1, 2])
def test_the_scheduler_keeps_to_it_only_while_streams_run(num_slots: int) -> None:
    pace = Pace(4.0)
    pace.note(1, 0, 0.06)
    pace.note(0, 1000, 1.0)
    pool, limits = BlockPool(600, 16), SchedulerLimits(8000, 4, 1000)
    subject = Scheduler(pool, limits, num_slots, pace)

    def step(slot: int) -> list[int]:
        plan = subject.schedule(slot)
        if plan is None:
            return []
        list(subject.complete(slot, StepResult([3] * len(plan.sampling_handles))))
        return [len(chunk.token_ids) for chunk in plan.chunks]

    subject.add(sequence(0, 1500, 100))
    assert step(0) == [1000] and step(0) == [500]
    second = sequence(1, 1500, 5)
    second.tokens[0] = 2  # another beginning: nothing of it is in the cache
    subject.add(second)
    lengths = [length for number in range(30) for length in step(number % num_slots)]
    assert sum(lengths) == 1500
    assert all(length <= 180 for length in lengths)
