"""The plan's encoding: whatever rank 0 plans, the others read the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.collectives.mpi import PLAN_HEAD_INTS
from engine.plan import Chunk, PlanCodec, SequenceParams, StepPlan

handles = st.lists(st.integers(0, 63), unique=True, max_size=40)
tokens = st.integers(0, 2**31 - 1)
params = st.builds(
    SequenceParams,
    st.floats(0, 2, width=32),
    st.floats(0.125, 1, width=32),
    st.integers(0, 100),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 100),
)


@st.composite
def plans(draw: st.DrawFn, num_slots: int) -> StepPlan:
    decode = draw(handles)
    others = st.integers(64, 127)
    chunks = [
        Chunk(handle, draw(st.integers(0, 8000)), draw(st.lists(tokens, min_size=1, max_size=300)),
              draw(st.lists(st.integers(0, 10**6), max_size=20)), draw(st.none() | tokens))
        for handle in draw(st.lists(others, unique=True, max_size=3))
    ]  # fmt: skip
    return StepPlan(
        step=draw(st.integers(0, 2**31 - 1)),
        slot=draw(st.integers(0, num_slots - 1)),
        released=draw(handles),
        admitted=draw(st.lists(st.tuples(others, params), max_size=3)),
        decode_handles=decode,
        decode_tokens=draw(st.lists(tokens, min_size=len(decode), max_size=len(decode))),
        decode_blocks=draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10**6)), max_size=5)),
        chunks=chunks,
        stop=draw(st.booleans()),
    )


@given(st.lists(plans(num_slots=2), min_size=1, max_size=8))
def test_any_sequence_of_plans_survives_the_encoding(sequence: list[StepPlan]) -> None:
    leader, follower = PlanCodec(2), PlanCodec(2)
    for plan in sequence:
        encoded = leader.encode(plan)
        assert encoded[0] == len(encoded)
        assert follower.decode(encoded) == plan


def test_a_steady_step_costs_one_int_for_each_sequence() -> None:
    codec = PlanCodec(1)
    rows = list(range(64))
    codec.encode(StepPlan(1, 0, decode_handles=rows, decode_tokens=rows))
    header = len(PlanCodec(1).encode(StepPlan(1, 0)))
    steady = codec.encode(StepPlan(2, 0, decode_handles=rows, decode_tokens=rows, decode_blocks=[(3, 17)]))
    assert len(steady) == header + 64 + 2
    assert len(steady) <= PLAN_HEAD_INTS, "64 decoding sequences must fit into one broadcast"


def test_a_sequence_that_samples_its_first_token_stays_without_being_named() -> None:
    codec = PlanCodec(1)
    codec.encode(StepPlan(1, 0, chunks=[Chunk(5, 0, [1, 2, 3], [0], None)]))
    header = len(PlanCodec(1).encode(StepPlan(1, 0)))
    assert len(codec.encode(StepPlan(2, 0, decode_handles=[5], decode_tokens=[9]))) == header + 1
