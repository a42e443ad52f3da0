"""The report of a campaign: one HTML file that needs nothing from elsewhere, and the same figures as JSON.

Called at the end of a campaign, and by itself for one that is still under way.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.common import RESULTS, machine, percentile
from tests.recovery.chaos.campaign import Leg
from tests.recovery.chaos.checker import Violation
from tests.recovery.chaos.figures import Counts, Figure, Outage, counts, outages, table
from tests.recovery.chaos.plots import scatter, timeline
from tests.recovery.chaos.schedule import Place

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5d6b7a; --line: #d9dfe6; --ground: #fff; --panel: #f5f7f9;
  --flow: #4c8bb8; --good: #2a8a57; --bad: #c23b3b; --kill: #c23b3b; --exit: #b86a13; --freeze: #3467c2;
  --hang: #7d4bb0; --front: #1b8f8f; --nothing: #8a96a3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #98a5b3; --line: #33404d; --ground: #151c23;
  --panel: #1d262f; --flow: #6ba7d1; --good: #5cc08b; --bad: #ee7b7b; --kill: #ee7b7b; --exit: #e2a45a;
  --freeze: #7ea3ee; --hang: #b58be0; --front: #4fc4c4; --nothing: #7d8a97; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0 auto;
  max-width: 1180px; padding: 32px 24px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p.soft, td.soft, .soft { color: var(--soft); } p { margin: 6px 0; max-width: 80ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }
summary { margin: 10px 0; color: var(--soft); cursor: pointer; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); font-size: 13px; } th:first-child, td:first-child { text-align: left; }
svg { display: block; width: 100%; height: auto; margin: 8px 0 20px; }
svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); } svg .flow { fill: var(--flow); opacity: .75; }
svg .gap { fill: var(--bad); opacity: .13; }
.kill { stroke: var(--kill); fill: var(--kill); } .exit { stroke: var(--exit); fill: var(--exit); }
.freeze { stroke: var(--freeze); fill: var(--freeze); } .hang { stroke: var(--hang); fill: var(--hang); }
.front, .supervisor { stroke: var(--front); fill: var(--front); }
.nothing { stroke: var(--nothing); fill: var(--nothing); }
svg .target { stroke: var(--good); stroke-width: 2; }
.key span { margin-right: 18px; font-size: 13px; } .key i { display: inline-block; width: 10px; height: 10px;
  border-radius: 5px; margin-right: 5px; background: currentColor; }
"""

_KEY = (
    '<p class="key"><span style="color:var(--kill)"><i></i>killed</span>'
    '<span style="color:var(--exit)"><i></i>exception, out of memory</span>'
    '<span style="color:var(--freeze)"><i></i>stopped</span><span style="color:var(--hang)"><i></i>hung</span>'
    '<span style="color:var(--front)"><i></i>front or supervisor killed</span>'
    '<span style="color:var(--nothing)"><i></i>no fault: a short stop</span></p>'
)


def write(legs: Sequence[Leg], seed: int, name: str = "chaos", folder: Path = RESULTS) -> Path:
    """Writes NAME.html and NAME.json. Returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {index: outages(leg.history, leg.spare) for index, leg in enumerate(legs)}
    every = [outage for of_leg in found.values() for outage in of_leg]
    violations = [violation for leg in legs for violation in leg.violations]
    total = counts([leg.history for leg in legs], violations, sum(_duration_s(leg) for leg in legs))
    # Where machine or network is short of something, other things take their time.
    usual = [
        outage for index, of_leg in found.items() if legs[index].place is Place.USUAL for outage in of_leg
    ]
    figures = table(usual)
    cores = sorted({leg.cores for leg in legs})
    loads = [injection.load_average for leg in legs for injection in leg.history.injections]
    result = {
        "machine": machine(list(range(cores[0] if cores else 0))),
        "machine_cores": os.cpu_count(),
        "load_average": {"p50": percentile(loads, 0.5), "max": max(loads)} if loads else None,
        "seed": seed,
        "counts": total,
        "figures": figures,
        "violations": violations,
        "notes": [note for leg in legs for note in leg.notes],
        "outages": every,
    }
    (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    page = folder / f"{name}.html"
    page.write_text(_page(legs, found, total, figures, violations, loads))
    return page


def _duration_s(leg: Leg) -> float:
    last = max((injection.at for injection in leg.history.injections), default=leg.started_at)
    return (leg.ended_at or last) - leg.started_at


def _page(
    legs: Sequence[Leg],
    found: dict[int, list[Outage]],
    total: Counts,
    figures: Sequence[Figure],
    violations: Sequence[Violation],
    loads: Sequence[float],
) -> str:
    every = [outage for of_leg in found.values() for outage in of_leg]
    described = machine(list(range(legs[0].cores if legs else 0)))
    load = f"{percentile(list(loads), 0.5):.1f} (at most {max(loads):.1f})" if loads else "not measured"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Phalanx under {total.faults} faults</title><style>{_STYLE}</style></head><body>",
        f"<h1>Phalanx under {total.faults} faults</h1>",
        f"<p class='soft'>SmolLM2-135M, float32, {described['cores_used']} of {os.cpu_count()} cores of "
        f"{html.escape(str(described['cpu']))}, {described['date']}; load average of the whole machine at a fault: "
        f"{load}. Faults come one after the other while clients stream without pause.</p>",
        _tiles(total),
        "<h2>How fast</h2>",
        "<p class='soft'>Seconds from the fault, for faults that hit ranks and came alone. A spare counts as none if "
        "it was not ready. Other work on the machine is in every figure.</p>",
        _figures_table([figure for figure in figures if figure.target_p50 or figure.target_p99]),
        "<details><summary>All others</summary>",
        _figures_table([figure for figure in figures if not (figure.target_p50 or figure.target_p99)]),
        "</details>",
        _KEY,
        scatter(every),
        "<h2>What clients saw</h2>",
        "<p class='soft'>What reached all clients together in each half second (tokens, or pieces of text), and the "
        "faults. Red: from a fault until a world served again.</p>",
        *(timeline(_title(number, leg), leg.history, found[number]) for number, leg in enumerate(legs)),
        "<h2>Violations</h2>",
        _violations(violations),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _title(number: int, leg: Leg) -> str:
    shape = f"tp {leg.tp}" + (f", pp {leg.pp}" if leg.pp > 1 else "")
    spare = "no spare" if leg.spare == "none" else f"{leg.spare} spare"
    shape += "" if leg.place is Place.USUAL else f", {leg.place.value}"
    size = f"{len(leg.history.injections)} faults, {len(leg.history.requests)} requests"
    return f"{number + 1}: {shape}, {spare}, {size}"


def _tiles(total: Counts) -> str:
    tiles = [
        (f"{total.faults:,}", "faults", ""),
        (f"{total.requests:,}", "requests", ""),
        (f"{total.tokens_lost_or_repeated}", "tokens lost or repeated", "zero"),
        (f"{total.false_alarms}", "false alarms", "zero"),
        (f"{total.given_up}", "requests given up after three worlds", ""),
        (f"{total.violations}", "violations in all", "zero"),
        (f"{total.seconds / 3600:.1f} h", "under load", ""),
    ]
    made = []
    for value, name, wanted in tiles:
        look = "" if not wanted else "good" if value == "0" else "bad"
        made.append(f"<div class='tile'><b class='{look}'>{value}</b>{name}</div>")
    return f"<div class='tiles'>{''.join(made)}</div>"


def _figures_table(figures: Sequence[Figure]) -> str:
    rows = []
    for figure in figures:
        verdict = {True: "<td class='good'>met</td>", False: "<td class='bad'>missed</td>", None: "<td></td>"}
        cells = [figure.p50, figure.p99, figure.target_p50, figure.target_p99]
        shown = "".join(f"<td>{'' if value is None else f'{value:.2f}'}</td>" for value in cells)
        rows.append(f"<tr><td>{figure.label}</td><td>{figure.count}</td>{shown}{verdict[figure.met]}</tr>")
    names = ("seconds", "faults", "p50", "p99", "target p50", "target p99", "")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _violations(violations: Sequence[Violation]) -> str:
    if not violations:
        return "<p>None.</p>"
    rows = []
    for violation in violations:
        at = time.strftime("%H:%M:%S", time.gmtime(violation.at)) if violation.at is not None else ""
        cells = (violation.rule.value, at, violation.request or "", violation.detail[:300])
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table><tr><th>rule</th><th>at</th><th>request</th><th></th></tr>{''.join(rows)}</table>"
