"""The plots of the report, as SVG: recovery times against targets, and the flow of tokens over time. Pure."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.targets import TARGETS
from tests.recovery.chaos.figures import Outage, fault_class
from tests.recovery.chaos.history import Expects, History

WIDTH = 1130
LABELS = 210
"""Pixels left of a plot."""
ROW = 26
LEAST_S, MOST_S = 0.005, 60.0
BIN_S = 0.5
FLOW = 70
"""Height of the flow of tokens."""


def _log_x(seconds: float) -> float:
    share = math.log(max(seconds, LEAST_S) / LEAST_S) / math.log(MOST_S / LEAST_S)
    return LABELS + share * (WIDTH - LABELS - 20)


def scatter(outages: Sequence[Outage]) -> str:
    """One dot for each fault and part of its recovery, on a logarithmic axis, with the targets as ticks."""
    rows: list[tuple[str, str, str | None]] = [("detected", "detected", None)]
    for part in ("serving", "all streams"):
        rows += [(f"{part}, {kind}", part, kind) for kind in ("none", "warm", "hot")]
    body = []
    bottom = 10 + ROW * len(rows)
    for seconds in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30):
        x = _log_x(seconds)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{bottom}"/>')
        body.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{seconds:g} s</text>')
    for index, (label, part, spare) in enumerate(rows):
        y = 10 + ROW * index + ROW / 2
        body.append(f'<text x="{LABELS - 14}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        for target in TARGETS:
            if target.part == part and target.spare == spare and target.share == "p99":
                x = _log_x(target.limit_s)
                body.append(
                    f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 10:.1f}" y2="{y + 10:.1f}">'
                    f"<title>target: {target.label} p99 {target.limit_s:g} s</title></line>"
                )
        for outage in outages:
            if (
                part in outage.seconds
                and spare in (None, outage.spare)
                and outage.direct
                and outage.fault != "front"
            ):
                body.append(_dot(outage, part, y))
    return _svg(bottom + 22, body)


def _dot(outage: Outage, part: str, y: float) -> str:
    # Moved up and down a little, by its number, so that dots do not hide each other.
    shift = (outage.number * 7 % 13 - 6) * 1.2
    seconds = outage.seconds[part]
    told = html.escape(f"fault {outage.number}, {outage.label}: {part} after {seconds:.3f} s")
    return (
        f'<circle class="{outage.fault}" cx="{_log_x(seconds):.1f}" cy="{y + shift:.1f}" r="3" stroke="none" '
        f'fill-opacity=".65"><title>{told}</title></circle>'
    )


def timeline(title: str, history: History, outages: Sequence[Outage]) -> str:
    """The flow of what reached all clients of one deployment, with its faults and outages."""
    arrivals = [delivery.at for request in history.requests for delivery in request.deliveries]
    moments = arrivals + [injection.at for injection in history.injections]
    if not arrivals:
        return f"<p>{html.escape(title)}: nothing reached a client.</p>"
    first, last = min(moments), max(moments)
    span_s = max(last - first, 1.0)

    def x(at: float) -> float:
        return 50 + (at - first) / span_s * (WIDTH - 60)

    bins = Counter(int((at - first) / BIN_S) for at in arrivals)
    most = max(bins.values())
    body = [
        f'<text x="50" y="12">{html.escape(title)}</text>',
        f'<text x="44" y="34" text-anchor="end">{most / BIN_S:.0f}/s</text>',
        f'<line class="grid" x1="50" x2="{WIDTH - 10}" y1="{26 + FLOW}" y2="{26 + FLOW}"/>',
    ]
    for outage in outages:
        ends = outage.at + outage.seconds["serving"]
        width = max(1.0, x(ends) - x(outage.at))
        body.append(
            f'<rect class="gap" x="{x(outage.at):.1f}" y="20" width="{width:.1f}" height="{FLOW + 6}"/>'
        )
    points = [f"{x(first):.1f},{26 + FLOW}"]
    for index in range(int(span_s / BIN_S) + 1):
        height = bins.get(index, 0) / most * FLOW
        left, right = x(first + index * BIN_S), x(min(last, first + (index + 1) * BIN_S))
        points += [f"{left:.1f},{26 + FLOW - height:.1f}", f"{right:.1f},{26 + FLOW - height:.1f}"]
    points.append(f"{x(last):.1f},{26 + FLOW}")
    body.append(f'<polygon class="flow" points="{" ".join(points)}"/>')
    for injection in history.injections:
        look = "nothing" if injection.expects is Expects.NOTHING else fault_class(injection)
        told = html.escape(
            f"fault {injection.number}: {injection.kind} of {injection.target}, world {injection.epoch}"
        )
        at = x(injection.at)
        body.append(
            f'<line class="{look}" x1="{at:.1f}" x2="{at:.1f}" y1="22" y2="{30 + FLOW}" stroke-width="1.5">'
        )
        body.append(f"<title>{told}</title></line>")
        body.append(
            f'<circle class="{look}" cx="{at:.1f}" cy="{33 + FLOW}" r="3"><title>{told}</title></circle>'
        )
    body += _minutes(first, last, x(first), x(last))
    return _svg(FLOW + 56, body)


def _minutes(first: float, last: float, left: float, right: float) -> Iterator[str]:
    span_s = max(last - first, 1.0)
    step_s = next((s for s in (10, 30, 60, 120, 300, 600, 1800) if span_s / s <= 12), 3600)
    for number in range(int(span_s / step_s) + 1):
        at = left + number * step_s / span_s * (right - left)
        seconds = number * step_s
        text = f"{seconds // 60} min" if step_s >= 60 else f"{seconds // 60}:{seconds % 60:02d}"
        yield f'<text x="{at:.1f}" y="{FLOW + 52}" text-anchor="middle">{text}</text>'


def _svg(height: float, body: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(body)}</svg>'
