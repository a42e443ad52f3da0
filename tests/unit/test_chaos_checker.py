"""The checker of chaos runs must find nothing in a good history, and something in every other one."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recovery.chaos.checker import Bounds, Rule, check
from tests.recovery.chaos.history import (
    Delivery,
    Detection,
    End,
    Expected,
    Expects,
    History,
    Injection,
    Leftover,
    Oracle,
    Recovery,
    Request,
)

BOUNDS = Bounds(silence_s=20.0, detect_s=5.0, recover_s=20.0)
START = 1000.0
PIECES = ["Once", " upon", " a", " time", ",", " in", " a", " far", " land"]


def expected(length: int = len(PIECES), reason: str = "length", close_at: int | None = None) -> Expected:
    pieces = PIECES[:length]
    ends = [len("".join(pieces[: index + 1])) for index in range(length)]
    margins = [1e-4 if index == close_at else 0.5 for index in range(length)]
    return Expected(list(range(100, 100 + length)), margins, "".join(pieces), ends, reason)


ORACLE: Oracle = {
    "plain": [expected()],
    "two": [expected(6), expected(4, "stop")],
    "close": [expected(close_at=5)],
    "silent": [Expected([7], [0.5], "", [0], "stop")],
}


def tokens(name: str, case: str = "plain", outage_at: int | None = 4) -> Request:
    """A ZeroMQ client's request: one token a delivery, each 0.1 s after the one before."""
    request = Request(name, case, sent_at=START, accepted_at=START + 0.1)
    for choice, wanted in enumerate(ORACLE[case]):
        at = START
        for position, token in enumerate(wanted.token_ids):
            at += 5.0 if position == outage_at else 0.1
            request.deliveries.append(Delivery(at, choice, position, [token]))
        request.ends.append(End(at, choice, wanted.finish_reason))
    request.deliveries.sort(key=lambda delivery: delivery.at)
    return request


def text(name: str, case: str = "plain") -> Request:
    """An HTTP client's request."""
    request = Request(name, case, sent_at=START, accepted_at=START + 0.1)
    for choice, wanted in enumerate(ORACLE[case]):
        at, begin = START, 0
        for end in wanted.text_ends:
            at += 0.1
            if end > begin:
                request.deliveries.append(Delivery(at, choice, begin, wanted.text[begin:end]))
            begin = end
        request.ends.append(End(at, choice, wanted.finish_reason))
    request.completion_tokens = sum(len(wanted.token_ids) for wanted in ORACLE[case])
    return request


def good_history() -> History:
    return History(
        spare="warm",
        requests=[
            tokens("zmq-1"),
            tokens("zmq-2", "two"),
            text("http-1"),
            text("http-2", "two"),
            text("http-3", "silent"),
        ],
        injections=[
            Injection(1, START + 1, "kill", "rank", Expects.WORLD_FAULT, epoch=1, rank=0),
            Injection(
                2, START + 6, "short stop", "rank", Expects.NOTHING, epoch=2, rank=1, until=START + 6.2
            ),
            Injection(3, START + 8, "kill", "spare rank", Expects.WORLD_FAULT, epoch=3, rank=1),
        ],
        detections=[
            Detection(START + 1.05, 1, "killed"),
            Detection(START + 8.1, 3, "killed", spare=True),
        ],
        recoveries=[Recovery(START + 3, 2)],
    )


def rules(history: History, bounds: Bounds = BOUNDS) -> set[Rule]:
    return {violation.rule for violation in check(history, ORACLE, bounds)}


def changed(change: Callable[[History], None]) -> set[Rule]:
    history = good_history()
    change(history)
    return rules(history)


def test_a_good_history_is_accepted() -> None:
    assert check(good_history(), ORACLE, BOUNDS) == []


def test_a_history_survives_the_disk() -> None:
    history = good_history()
    assert msgspec.json.decode(msgspec.json.encode(history), type=History) == history


# --------------------------------------------------------------------------- what clients saw


def test_a_lost_token() -> None:
    def lose_one(history: History) -> None:
        del history.requests[0].deliveries[3]

    assert changed(lose_one) == {Rule.LOST}


def test_a_lost_token_with_the_later_ones_moved_up() -> None:
    def lose_one(history: History) -> None:
        deliveries = history.requests[0].deliveries
        del deliveries[3]
        for index in range(3, len(deliveries)):
            deliveries[index] = msgspec.structs.replace(deliveries[index], position=index)

    assert changed(lose_one) == {Rule.DIFFERS}


def test_the_last_token_lost() -> None:
    def lose_last(history: History) -> None:
        del history.requests[0].deliveries[-1]

    assert changed(lose_last) == {Rule.LOST}


def test_everything_lost_but_the_end() -> None:
    def lose_all(history: History) -> None:
        history.requests[0].deliveries.clear()

    assert changed(lose_all) == {Rule.LOST}


def test_lost_text() -> None:
    def lose_piece(history: History) -> None:
        deliveries = history.requests[2].deliveries
        gone = deliveries.pop(2)
        assert isinstance(gone.content, str)
        for index in range(2, len(deliveries)):
            moved = deliveries[index].position - len(gone.content)
            deliveries[index] = msgspec.structs.replace(deliveries[index], position=moved)

    assert changed(lose_piece) == {Rule.DIFFERS}


def test_a_repeated_token() -> None:
    def repeat(history: History) -> None:
        deliveries = history.requests[0].deliveries
        deliveries.insert(4, deliveries[3])

    assert changed(repeat) == {Rule.REPEATED}


def test_a_token_that_changes_after_it_was_delivered() -> None:
    def change(history: History) -> None:
        deliveries = history.requests[0].deliveries
        deliveries.insert(4, msgspec.structs.replace(deliveries[3], content=[999]))

    assert changed(change) == {Rule.CHANGED}


def test_a_token_that_differs() -> None:
    def differ(history: History) -> None:
        deliveries = history.requests[0].deliveries
        deliveries[5] = msgspec.structs.replace(deliveries[5], content=[999])

    assert changed(differ) == {Rule.DIFFERS}


@pytest.mark.parametrize("position", [4, 5, 6])
def test_a_difference_is_allowed_only_where_the_oracle_was_close(position: int) -> None:
    history = good_history()
    request = tokens("zmq-9", "close")
    for index in range(position, len(request.deliveries)):
        request.deliveries[index] = msgspec.structs.replace(request.deliveries[index], content=[900 + index])
    history.requests.append(request)
    # From position 4 on it was not close, and at 6 it is too late to part: 5 was the oracle's.
    assert rules(history) == ({Rule.DIFFERS} if position != 5 else set())
    exact = msgspec.structs.replace(BOUNDS, exact=True)
    assert rules(history, exact) == {Rule.DIFFERS}


def test_text_that_differs_where_the_oracle_was_close() -> None:
    history = good_history()
    request = text("http-9", "close")
    deliveries = request.deliveries
    deliveries[5] = msgspec.structs.replace(deliveries[5], content=" on")
    history.requests.append(request)
    assert rules(history) == set()
    deliveries[5] = text("http-9", "close").deliveries[5]
    deliveries[3] = msgspec.structs.replace(deliveries[3], content=" tame")
    assert rules(history) == {Rule.DIFFERS}


def test_a_stream_that_goes_on_behind_its_last_token() -> None:
    def go_on(history: History) -> None:
        request = history.requests[0]
        last = request.deliveries[-1]
        request.deliveries.append(msgspec.structs.replace(last, position=last.position + 1, content=[1]))

    assert changed(go_on) == {Rule.DIFFERS}


def test_a_request_that_never_finishes() -> None:
    def hang(history: History) -> None:
        history.requests[0].ends.clear()

    assert changed(hang) == {Rule.UNFINISHED}


@pytest.mark.parametrize("worlds", [2, 3])
def test_only_after_three_worlds_may_a_request_be_given_up(worlds: int) -> None:
    def give_up(history: History) -> None:
        for number in range(worlds):
            at, epoch = START + 20 + number, 10 + number
            kill = Injection(10 + number, at, "kill", "rank", Expects.WORLD_FAULT, epoch=epoch)
            history.injections.append(kill)
            history.detections.append(Detection(at + 0.1, epoch, "killed"))
        history.recoveries.append(Recovery(START + 24, 20))
        error = "poisoned: this request ran in 3 worlds when they died"
        lost = Request("zmq-9", "plain", START + 19, START + 19.1, error=error, error_at=START + 23)
        history.requests.append(lost)

    assert changed(give_up) == (set() if worlds == 3 else {Rule.FAILED})


def test_a_choice_that_never_finishes() -> None:
    def hang(history: History) -> None:
        del history.requests[1].ends[1]

    assert changed(hang) == {Rule.UNFINISHED}


def test_a_request_that_was_accepted_and_brought_nothing() -> None:
    def forget(history: History) -> None:
        history.requests[0].ends.clear()
        history.requests[0].deliveries.clear()

    assert changed(forget) == {Rule.UNFINISHED}


def test_a_client_that_went_away_is_owed_nothing_more() -> None:
    def leave(history: History) -> None:
        request = history.requests[0]
        request.ends.clear()
        del request.deliveries[4:]
        request.left_at = START + 1

    assert changed(leave) == set()


def test_a_client_that_went_away_was_still_owed_the_right_tokens() -> None:
    def leave(history: History) -> None:
        request = history.requests[0]
        request.ends.clear()
        del request.deliveries[4:]
        request.deliveries[2] = msgspec.structs.replace(request.deliveries[2], content=[5])
        request.left_at = START + 1

    assert changed(leave) == {Rule.DIFFERS}


def test_a_failed_request() -> None:
    def fail(history: History) -> None:
        history.requests[0].ends.clear()
        history.requests[0].error = "internal: the engine dropped tokens of this request"

    assert changed(fail) == {Rule.FAILED}


def test_a_refusal() -> None:
    refused = Request("http-8", "plain", sent_at=START + 2, refused="503")
    history = good_history()
    history.requests.append(refused)
    assert rules(history) == {Rule.REFUSED}
    history.injections.append(Injection(4, START + 1.9, "fill", "disk", Expects.ANYTHING, until=START + 3))
    assert rules(history) == set()
    refused.accepted_at = START + 2.1
    assert rules(history) == {Rule.FAILED}


def test_a_wrong_end() -> None:
    def end_wrongly(history: History) -> None:
        end = history.requests[0].ends[0]
        history.requests[0].ends[0] = msgspec.structs.replace(end, reason="stop")

    assert changed(end_wrongly) == {Rule.WRONG_END}


def test_two_ends() -> None:
    def end_again(history: History) -> None:
        history.requests[0].ends.append(history.requests[0].ends[0])

    assert changed(end_again) == {Rule.AFTER_END}


def test_something_after_the_end() -> None:
    def end_early(history: History) -> None:
        end = history.requests[0].ends[0]
        history.requests[0].ends[0] = msgspec.structs.replace(end, at=end.at - 1)

    assert Rule.AFTER_END in changed(end_early)


def test_a_choice_that_nobody_asked_for() -> None:
    def add(history: History) -> None:
        history.requests[0].deliveries.append(Delivery(START + 7, 3, 0, [1]))

    assert changed(add) == {Rule.CHANGED}


def test_a_wrong_count() -> None:
    def miscount(history: History) -> None:
        history.requests[2].completion_tokens = 3

    assert changed(miscount) == {Rule.MISCOUNTED}


def test_an_overlong_outage() -> None:
    history = good_history()
    history.requests[0] = request = tokens("zmq-1")
    for index in range(4, len(request.deliveries)):
        delivery = request.deliveries[index]
        request.deliveries[index] = msgspec.structs.replace(delivery, at=delivery.at + 20)
    request.ends[0] = msgspec.structs.replace(request.ends[0], at=request.ends[0].at + 20)
    assert rules(history) == {Rule.OUTAGE}


def test_an_answer_before_its_question() -> None:
    def precede(history: History) -> None:
        deliveries = history.requests[0].deliveries
        deliveries[0] = msgspec.structs.replace(deliveries[0], at=START - 1)

    assert changed(precede) == {Rule.BACK_IN_TIME}


def test_a_case_that_the_oracle_does_not_know() -> None:
    history = good_history()
    history.requests[0].case = "unheard of"
    with pytest.raises(KeyError):
        check(history, ORACLE, BOUNDS)


# --------------------------------------------------------------------------- faults


def test_a_fault_that_nobody_detects() -> None:
    assert changed(lambda history: history.detections.__delitem__(0)) == {Rule.UNDETECTED}


def test_a_fault_that_is_detected_too_late() -> None:
    def delay(history: History) -> None:
        history.detections[0] = msgspec.structs.replace(history.detections[0], at=START + 6.5)

    assert changed(delay) == {Rule.UNDETECTED, Rule.FALSE_ALARM}


def test_a_fault_that_is_not_recovered() -> None:
    assert changed(lambda history: history.recoveries.clear()) == {Rule.UNRECOVERED}


def test_a_late_recovery() -> None:
    def delay(history: History) -> None:
        history.recoveries[0] = Recovery(START + 22, 2)

    assert changed(delay) == {Rule.UNRECOVERED}


def test_a_lost_spare_needs_no_recovery() -> None:
    history = good_history()
    history.injections = history.injections[2:]
    history.detections = history.detections[1:]
    history.recoveries = []
    assert rules(history) == set()


def test_of_two_faults_in_one_world_one_is_detected() -> None:
    def hit_twice(history: History) -> None:
        history.injections.append(Injection(4, START + 1.2, "kill", "rank", Expects.WORLD_FAULT, epoch=1))

    assert changed(hit_twice) == set()


def test_a_short_stop_that_is_taken_for_a_fault() -> None:
    def alarm(history: History) -> None:
        history.detections.append(Detection(START + 6.5, 2, "frozen"))
        history.recoveries.append(Recovery(START + 7, 4))

    assert changed(alarm) == {Rule.FALSE_ALARM}


def test_an_alarm_without_a_fault() -> None:
    def alarm(history: History) -> None:
        history.detections.append(Detection(START + 50, 2, "lost"))

    assert changed(alarm) == {Rule.FALSE_ALARM}


def test_an_alarm_before_its_fault() -> None:
    def hurry(history: History) -> None:
        history.detections[0] = msgspec.structs.replace(history.detections[0], at=START + 0.5)

    assert Rule.FALSE_ALARM in changed(hurry)


@pytest.mark.parametrize(
    ("expects", "kind"), [(Expects.NEW_FRONT, "front"), (Expects.NEW_SUPERVISOR, "supervisor")]
)
def test_a_new_front_or_supervisor_has_to_come(expects: Expects, kind: str) -> None:
    history = good_history()
    history.injections.append(Injection(4, START + 12, "kill", kind, expects))
    assert rules(history) == {Rule.UNDETECTED}
    history.detections.append(Detection(START + 12.1, None, kind))
    assert rules(history) == set()
    # It is no excuse for the death of a world.
    history.detections.append(Detection(START + 12.2, 2, "lost"))
    assert rules(history) == {Rule.FALSE_ALARM}


def test_what_is_left_behind() -> None:
    def leave(history: History) -> None:
        history.leftovers.append(Leftover(START + 5, "rank 1 of world 1, pid 1234"))

    assert changed(leave) == {Rule.LEFTOVER}


def test_a_deployment_that_gives_up() -> None:
    def give_up(history: History) -> None:
        history.died = "exit code 1: 3 worlds in a row did not start"

    assert changed(give_up) == {Rule.GAVE_UP}


# --------------------------------------------------------------------------- mutations


Mutation = Callable[[History, st.DataObject], None]


def _some_request(history: History, data: st.DataObject) -> Request:
    return data.draw(st.sampled_from([request for request in history.requests if request.deliveries]))


def _index(request: Request, data: st.DataObject) -> int:
    return data.draw(st.integers(0, len(request.deliveries) - 1))


def _drop(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    del request.deliveries[_index(request, data)]


def _double(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    index = _index(request, data)
    request.deliveries.insert(index, request.deliveries[index])


def _swap(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    choice = data.draw(st.sampled_from(sorted({delivery.choice for delivery in request.deliveries})))
    own = [index for index, delivery in enumerate(request.deliveries) if delivery.choice == choice]
    first, second = data.draw(st.lists(st.sampled_from(own), min_size=2, max_size=2, unique=True))
    deliveries = request.deliveries
    deliveries[first], deliveries[second] = deliveries[second], deliveries[first]


def _alter(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    index = _index(request, data)
    old = request.deliveries[index]
    new: list[int] | str = "\N{SNOWMAN}" * len(old.content)
    if not isinstance(old.content, str):
        new = [token + data.draw(st.integers(1, 1000)) for token in old.content]
    request.deliveries[index] = msgspec.structs.replace(old, content=new)


def _shift(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    index = _index(request, data)
    old = request.deliveries[index]
    by = data.draw(st.integers(-3, 3).filter(lambda by: by != 0 and old.position + by >= 0))
    request.deliveries[index] = msgspec.structs.replace(old, position=old.position + by)


def _give_to_another(history: History, data: st.DataObject) -> None:
    source, other = history.requests[0], history.requests[1]
    if data.draw(st.booleans()):
        source, other = other, source
    other.deliveries.append(source.deliveries.pop(_index(source, data)))


def _end_never(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    del request.ends[data.draw(st.integers(0, len(request.ends) - 1))]


def _stall(history: History, data: st.DataObject) -> None:
    request = _some_request(history, data)
    index = _index(request, data)
    choice = request.deliveries[index].choice
    late_s = data.draw(st.floats(BOUNDS.silence_s, 1000))

    def later(entry: Delivery) -> Delivery:
        return msgspec.structs.replace(entry, at=entry.at + late_s) if entry.choice == choice else entry

    request.deliveries[index:] = [later(delivery) for delivery in request.deliveries[index:]]
    request.ends = [
        msgspec.structs.replace(end, at=end.at + late_s) if end.choice == choice else end
        for end in request.ends
    ]


def _fail(history: History, data: st.DataObject) -> None:
    _some_request(history, data).error = "internal"


def _miss(history: History, data: st.DataObject) -> None:
    del history.detections[data.draw(st.integers(0, len(history.detections) - 1))]


def _invent(history: History, data: st.DataObject) -> None:
    at = data.draw(st.floats(START - 100, START + 100))
    history.detections.append(Detection(at, data.draw(st.integers(4, 9)), "lost"))


MUTATIONS = [
    _drop, _double, _swap, _alter, _shift, _give_to_another, _end_never, _stall, _fail, _miss, _invent,
]  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__.strip("_"))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_mutation_of_a_good_history_passes(mutate: Mutation, data: st.DataObject) -> None:
    history = good_history()
    mutate(history, data)
    assert check(history, ORACLE, BOUNDS)
