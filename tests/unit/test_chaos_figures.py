"""The figures and the report of chaos runs, from histories whose times are known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.recovery.chaos import report
from tests.recovery.chaos.campaign import Leg
from tests.recovery.chaos.checker import Rule, Violation
from tests.recovery.chaos.figures import outages, table
from tests.recovery.chaos.history import (
    Delivery,
    Detection,
    End,
    Expects,
    History,
    Injection,
    Recovery,
    Request,
)

KILLED_AT = 1000.0


def history(number_of_streams: int = 2) -> History:
    """A rank is killed at 1000, found after 0.03 s, replaced after 0.2 s; stream N goes on after 1 + N seconds."""
    requests = []
    for number in range(number_of_streams):
        request = Request(f"r{number}", "case", sent_at=KILLED_AT - 5, accepted_at=KILLED_AT - 4)
        before = [Delivery(KILLED_AT - 3 + index * 0.1, 0, index, [index]) for index in range(5)]
        late = Delivery(KILLED_AT + 0.05, 0, 5, [5])  # was under way when the rank died
        after = [Delivery(KILLED_AT + 1 + number + index * 0.1, 0, 6 + index, [index]) for index in range(5)]
        request.deliveries = [*before, late, *after]
        request.ends = [End(after[-1].at, 0, "length")]
        requests.append(request)
    over = Request("over", "case", sent_at=KILLED_AT - 9, accepted_at=KILLED_AT - 8)
    over.ends = [End(KILLED_AT - 7, 0, "length")]
    return History(
        spare="hot",
        requests=[*requests, over],
        injections=[
            Injection(1, KILLED_AT, "kill", "rank", Expects.WORLD_FAULT, epoch=1, spare_parked=True),
            Injection(2, KILLED_AT + 50, "stop for 200 ms", "rank", Expects.NOTHING, epoch=2),
        ],
        detections=[Detection(KILLED_AT + 0.03, 1, "killed")],
        recoveries=[Recovery(KILLED_AT + 0.2, 2)],
    )


def test_the_parts_of_an_outage() -> None:
    [outage] = outages(history(), "hot")
    assert outage.seconds == pytest.approx(
        {"detected": 0.03, "serving": 0.2, "first token": 1.0, "all streams": 2.0}, abs=1e-6
    )
    assert (outage.fault, outage.spare, outage.direct, outage.num_streams) == ("kill", "hot", True, 2)


def test_a_spare_that_was_not_ready_counts_as_none() -> None:
    seen = history()
    seen.injections[0].spare_parked = False
    assert [outage.spare for outage in outages(seen, "hot")] == ["none"]


def test_a_second_fault_makes_neither_of_them_direct() -> None:
    seen = history()
    seen.injections.insert(
        1, Injection(1, KILLED_AT + 0.1, "kill in recovery", "rank", Expects.WORLD_FAULT, epoch=2)
    )
    seen.detections.append(Detection(KILLED_AT + 0.15, 2, "killed"))
    assert [outage.direct for outage in outages(seen, "hot")] == [False, False]


def test_guards_are_not_what_the_targets_are_about() -> None:
    seen = history()
    seen.injections[0].target = "guard"
    assert [outage.direct for outage in outages(seen, "hot")] == [False]


def test_figures_stand_beside_their_targets() -> None:
    figures = {figure.label: figure for figure in table(outages(history(), "hot"))}
    detected = figures["kill to detected"]
    assert (detected.count, detected.target_p50, detected.target_p99, detected.met) == (1, 0.05, 0.2, True)
    serving = figures["kill to serving, hot"]
    assert (serving.target_p50, serving.target_p99, serving.met) == (0.1, 0.5, False)
    assert figures["kill to serving, warm"].met is None


def test_the_report_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    leg = Leg("hot", 2, 1, [1, 2], history(), 2, KILLED_AT - 10, KILLED_AT + 60)
    leg.violations = [Violation(Rule.LOST, "<script>", KILLED_AT, "r1")]
    page = report.write([leg], seed=3, name="trial", folder=tmp_path).read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert page.count("<svg") == 2
    result = json.loads((tmp_path / "trial.json").read_text())
    assert result["counts"]["tokens_lost_or_repeated"] == 1 and result["counts"]["faults"] == 2
    assert {figure["label"] for figure in result["figures"]} > {"kill to detected", "freeze to detected"}
