"""Writes the README's numbers from benchmarks/results/*.json, between two marker comments; never by hand.

`python -m benchmarks.table`. A benchmark without a result file is left out. With `--check` nothing is written: the
exit code is 1 if the README does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS, ROOT, median

README = ROOT / "README.md"
WEIGHT_BYTES = 269_000_000
"""Of SmolLM2-135M in bfloat16, all of which a step reads."""
BEGIN = "<!-- numbers: written by `python -m benchmarks.table`, do not edit -->"
END = "<!-- end of numbers -->"

Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{README.name} lacks one of the markers {BEGIN} and {END}")
    written = f"{before}{BEGIN}\n\n{render()}\n{END}{after}"
    if arguments.check:
        return 0 if written == text else 1
    README.write_text(written)
    return 0


def render() -> str:
    """Everything between the markers."""
    sections = []
    for name, (title, rows_of) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text())
            sections.append(f"**{title(result)}** {_measured_on(result)}\n\n{rows_of(result)}\n")
    return "\n".join(sections) or "Not measured yet.\n"


def _measured_on(result: Result) -> str:
    machine = result["machine"]
    return (
        f"({machine['cores_used']} cores of {machine['cpu']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['date']})"
    )


# --------------------------------------------------------------------------- one table for each benchmark


def _peers(result: Result) -> str:
    speeds, starts = result["tokens_per_second"], result["loaded_after_s"]
    works = list(dict.fromkeys(work for done in speeds.values() for work in done))
    order = sorted(speeds, key=lambda label: label.startswith("phalanx"))
    rows = [
        [
            label if not label.startswith("phalanx") else f"**{label}**",
            *(_number(median(speeds[label][work])) if work in speeds[label] else "" for work in works),
            _number(starts[label]),
        ]
        for label in order
    ]
    reached = "; ".join(
        f"{found['work']}, {found['weights']}: {found['ratio']:.2f} times {found['peer']} "
        f"(target {found['target']})"
        for found in result["targets"]
    )
    plain = next(label for label in speeds if label.startswith("phalanx bfloat16"))
    share = median(speeds[plain]["decode, 1 sequence"]) * WEIGHT_BYTES / result["bytes_per_second"]
    bandwidth = f"{result['bytes_per_second'] / 1e9:.1f} GB/s"
    return _table(["tokens/s", *works, "loaded after, s"], rows) + (
        f"\n\nMedians of the rounds' ratios: {reached}. torch's sum over an array reads {bandwidth} from memory on "
        f"these cores; one bfloat16 stream reads {share:.0%} of that. Peers are driven by their Python interface, "
        "Phalanx by a ZeroMQ client. vLLM had compiled the model in an earlier run; llama.cpp and OpenVINO read the "
        "GGUF file, and have no batches in these interfaces.\n\n![Tokens per second](docs/peers.svg)"
    )


def _serve(result: Result) -> str:
    rows = []
    for clients, http in result["http"].items():
        zmq, ratio = result["zmq"][clients], result["ratio_http_to_zmq"][clients]
        load = f"{clients} client{'s' * (clients != '1')}"
        for what, label in (
            ("time_to_first_token", "to first token, ms p50 / p99"),
            ("time_between_tokens", "between tokens, ms p50 / p99"),
        ):
            rows.append([f"{load}: {label}", _spread(http[what]), _spread(zmq[what]), _ratio(ratio[what])])
        what = "tokens_per_second"
        rows.append([f"{load}: tokens/s", _number(http[what]), _number(zmq[what]), _ratio(ratio[what])])
    return _table(["", "HTTP", "ZeroMQ client", "ratio"], rows)


def _tensor_parallel(result: Result) -> str:
    speeds, (two, at_once) = result["tokens_per_second"], result["ratios"].values()
    one, double, _ = speeds.values()
    rows = [
        [
            work,
            _number(median(one[work])),
            _number(median(double[work])),
            _ratio(two[work]),
            _ratio(at_once[work]),
        ]
        for work in one
    ]
    memory = [median(values) / 1e9 for values in result["bytes_per_second"].values()]
    return (
        _table(["tokens/s", "tp 1, one core", "tp 2, two cores", "ratio", "two worlds of tp 1 at once"], rows)
        + "\n\nThe last column is what the machine had for two cores in the same rounds: both worlds together to one "
        "alone, with nothing to wait for. Memory gave one core "
        f"{_number(memory[0])} GB/s and two {_number(memory[1])} GB/s ({_ratio(result['memory_ratio'])}). The "
        "target is 1.8; what is in the way: [benchmarks/profile.md](benchmarks/profile.md)."
    )


def _http_cost(result: Result) -> str:
    http, bare = (median(result["tokens_per_second"][name]) for name in ("http", "bare"))
    return (
        f"Over HTTP {_number(http)} tokens/s with {result['streams']} streams, the bare world (no supervisor, no "
        f"front, token ids in and out) {_number(bare)}: ratio {_ratio(result['ratio'])}, the target is "
        f"{result['target']}."
    )


def _startup(result: Result) -> str:
    first, later = result["first_s"], result["later_median_s"]
    rows = [
        [f"{part}: {what}", _number(first[part]), _number(later[part])]
        for part, what in result["parts"].items()
    ]
    rows.insert(-1, ["**ready**", f"**{_number(first['ready'])}**", f"**{_number(later['ready'])}**"])
    rows.append(["first token, from the start on", _number(first["first"]), _number(later["first"])])
    peers, ratios = result["peers_s"], result["ratio_to_peers"]
    transformers, torch = median(peers["transformers"]), median(peers["import torch"])
    return _table(["seconds", "first start", f"later (median of {len(result['later_s'])})"], rows) + (
        f"\n\nIn the same run transformers took {_number(transformers)} s to its first token "
        f"(ratio {_ratio(ratios['transformers'])}), and a bare `import torch` {_number(torch)} s "
        f"(ready takes {_ratio(ratios['import torch'])} times as long)."
    )


def _control_plane(result: Result) -> str:
    rows = [
        [f"{ranks} ranks: {part}", _number(times["p50"]), _number(times["p99"])]
        for ranks, parts in result["plan_us"].items()
        for part, times in parts.items()
    ]
    busiest, later = max(result["idle_percent_of_a_core"]), result["first_token_from_rest_extra_ms_p50"]
    return _table(["microseconds", "p50", "p99"], rows) + (
        f"\n\nA world at rest uses {busiest:.1f} % of a core for each rank, and its first token comes "
        f"{_number(later)} ms (p50) later than in a world that is awake."
    )


def _recovery(result: Result) -> str:
    kinds = result["kinds"]
    rows = []
    for part, what in result["parts"].items():
        row = [f"{part}: {what}"]
        for kind in kinds.values():
            seconds = kind["seconds"].get(part)
            row.append(f"{_number(seconds['p50'])} / {_number(seconds['p99'])}" if seconds else "")
        rows.append(row)
    rows.append(
        ["tokens lost, repeated", *(f"{kind['lost']}, {kind['repeated']}" for kind in kinds.values())]
    )
    rows.append(
        [
            "memory of the spare, MB",
            *(_number(s["spare_mb"]) if s["spare_mb"] else "" for s in kinds.values()),
        ]
    )
    columns = [f"{_KINDS[name]}, {kind['hits']} times" for name, kind in kinds.items()]
    missed = [
        f"{name}: {_number(verdict['measured_s'])} s instead of {verdict['target_s']:g} s"
        for name, verdict in result["targets"].items()
        if verdict["measured_s"] > verdict["target_s"]
    ]
    table = _table(["seconds from the fault, p50 / p99", *columns], rows)
    told = f"Targets that are missed: {'; '.join(missed)}" if missed else "All targets are met"
    return f"{table}\n\n{told} ([docs/recovery.md](docs/recovery.md#figures) has them)."


_KINDS = {
    "hot": "killed, `--spare hot`",
    "warm": "killed, `--spare warm`",
    "none": "killed, `--spare none`",
    "freeze": "stopped, `--spare hot`",
}


def _hosts(result: Result) -> str:
    parts = {"detected": "known", "dead behind": "no rank lives behind the cut", "fenced": "certain of it"}
    rows = [[what, *(_number(result["seconds"][part][at]) for at in _CUT)] for part, what in parts.items()]
    table = _table(["seconds from the cut", *_CUT], rows)
    return f"{table}\n\nThe target is {result['target_s']:g} s at p99."


_CUT = ("p50", "p99", "max")


def _journal(result: Result) -> str:
    rows = []
    for name, what in (("spread_disk_to_off", "the journal"), ("guards", "guards and supervisor")):
        spread = result.get(name, {})
        spread = spread.get("spread", spread)
        if spread:
            quartiles = f"{_ratio(spread['quartile_low'])} to {_ratio(spread['quartile_high'])}"
            rows.append(
                [f"with {what} over without", f"{spread['median']:.3f}", quartiles, str(spread["pairs"])]
            )
    return _table(["tokens per second", "median of the pairs", "half of them within", "pairs"], rows)


def _deterministic(result: Result) -> str:
    rows = []
    for tp, works in result["tokens_per_second"].items():
        for work, pairs in works.items():
            plain, ordered = (median([pair[at] for pair in pairs]) for at in (0, 1))
            ratio = median([with_flag / without for without, with_flag in pairs])
            rows.append([f"{tp}, {work}", _number(plain), _number(ordered), _ratio(ratio)])
    return _table(["tokens per second", "without", "`--deterministic`", "ratio, median of pairs"], rows)


def _interference(result: Result) -> str:
    rows = []
    for factor, found in result["step_factors"].items():
        alone, beside = found["alone_ms"], found["beside_long_prompt_ms"]
        rows.append(
            [
                "no bound" if factor == "0" else f"`--step-factor {factor}`",
                _spread(alone),
                _spread(beside),
                _number(beside["max"]),
                _ratio(beside["p50"] / alone["p50"]),
                _number(found["long_prompt_first_token_s"]),
            ]
        )
    columns = ["", "alone, ms p50 / p99", "beside the prompt, ms p50 / p99", "longest, ms", "ratio p50"]
    return _table([*columns, "the prompt's first token, s"], rows)


def _structured(result: Result) -> str:
    plain, schema = result["milliseconds"]["plain"], result["milliseconds"]["schema"]
    row = [
        f"{_number(plain['p50'])} / {_number(plain['p90'])}",
        f"{_number(schema['p50'])} / {_number(schema['p90'])}",
    ]
    return _table(
        ["without, ms p50 / p90", "with, ms p50 / p90", "ratio p50"], [[*row, _ratio(result["ratio_p50"])]]
    )


def _front(result: Result) -> str:
    rates, ratios = result["throughput"], result["throughput"]["ratio_to_bare"]
    overhead, many = result["overhead"], result["many_streams"]
    memory = many["memory_mb"]
    rows = [["a bare route of FastAPI, requests/s", _number(rates["bare"]["requests_per_second"])]]
    for count, ratio in ratios.items():
        label = f"the front, answers of {count} token{'s' * (count != '1')}, requests/s (ratio)"
        rows.append([label, f"{_number(rates[count]['requests_per_second'])} ({_ratio(ratio)})"])
    rows += [
        ["added to a token, ms p50 / p99", _spread(overhead["token_ms"])],
        ["added to a request of one token, ms p50 / p99", _spread(overhead["request_ms"])],
        [
            f"memory with {many['streams']} streams, MB after a quarter / at the end",
            f"{_number(memory['first_quarter'])} / {_number(memory['end'])}",
        ],
    ]
    if several := result.get("fronts"):
        each = several["requests_per_second"]
        label = "one front / two fronts on a core each, answers of 16 tokens, requests/s (ratio)"
        rows.append([label, f"{_number(each['1'])} / {_number(each['2'])} ({_ratio(several['ratio'])})"])
    return _table(["", ""], rows)


SECTIONS: dict[str, tuple[Callable[[Result], str], Callable[[Result], str]]] = {
    "peers": (
        lambda result: (
            f"Beside other engines, SmolLM2-135M, at a load average of {float(result['load'][0]):.0f}."
        ),
        _peers,
    ),
    "tensor_parallel": (
        lambda result: (
            "A second core as a second rank, SmolLM2-135M in bfloat16, without gateway, at a load average of "
            f"{float(result['load'][0]):.0f}."
        ),
        _tensor_parallel,
    ),
    "http_cost": (lambda result: f"What HTTP costs, tp {result['tp']}.", _http_cost),
    "serve": (lambda result: f"Serving, tp {result['tp']}.", _serve),
    "startup": (lambda result: f"Start of `phalanx serve`, tp {result['tp']}.", _startup),
    "recovery": (
        lambda result: (
            f"A rank is killed, or stopped, in the middle of {result['streams']} streams of {result['new_tokens']} "
            f"tokens, tp {result['tp']}."
        ),
        _recovery,
    ),
    "hosts": (
        lambda result: f"A host is cut off without a word, {result['cuts']} times, over network namespaces.",
        _hosts,
    ),
    "journal": (
        lambda result: (
            f"What journal and guards cost, {result['sequences']} streams of {result['new_tokens']} tokens, "
            f"tp {result['tp']}, in pairs."
        ),
        _journal,
    ),
    "deterministic": (lambda result: "What `--deterministic` costs, bfloat16, in pairs.", _deterministic),
    "front": (
        lambda result: (
            f"The front with an engine that answers at once, on one core, {result['connections']} connections, at a "
            f"load average of {result['load_average']:.0f}."
        ),
        _front,
    ),
    "interference": (
        lambda result: (
            f"Time between tokens of 8 streams while a prompt of 6,000 tokens comes in, tp {result['tp']}, "
            f"at a load average of {result['load'][0]:.0f}."
        ),
        _interference,
    ),
    "structured": (
        lambda result: (
            f"Time between tokens of {result['streams']} streams with a JSON schema and without, tp {result['tp']}, "
            f"at a load average of {result['load'][0]:.0f}."
        ),
        _structured,
    ),
    "control_plane": (lambda result: "A step's plan for 32 decoding sequences.", _control_plane),
}
"""By the name of the result file: title and table."""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])


def _number(value: float) -> str:
    """Three digits, or all of a larger number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _spread(value: dict[str, float]) -> str:
    return f"{_number(value['p50'])} / {_number(value['p99'])}"


if __name__ == "__main__":
    sys.exit(main())
