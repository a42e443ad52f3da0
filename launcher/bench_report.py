"""What `phalanx bench` found out: the figures, as text in the order that users of `vllm bench serve` know, and as
JSON. Computes and formats; measures nothing."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PERCENTILES = (50, 90, 99)
_WIDTH = 50


@dataclass
class Outcome:
    """One request."""

    began_s: float = 0.0
    latency_s: float = 0.0
    time_to_first_token_s: float | None = None
    inter_token_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    retries: int = 0
    resumes: int = 0
    error: str | None = None


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between the closest ranks; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(
    outcomes: Sequence[Outcome], duration_s: float, cpu_s: float, about: dict[str, Any]
) -> dict[str, Any]:
    """All figures, times in milliseconds as their names say."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    input_tokens = sum(outcome.input_tokens for outcome in good)
    output_tokens = sum(outcome.output_tokens for outcome in good)
    duration_s = max(duration_s, 1e-9)
    found: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **about,
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": errors,
        "retries": sum(outcome.retries for outcome in outcomes),
        "resumes": sum(outcome.resumes for outcome in outcomes),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "client_cpu_percent": 100 * cpu_s / duration_s,
    }
    times = {
        "ttft": [o.time_to_first_token_s for o in good if o.time_to_first_token_s is not None],
        "tpot": [
            (o.latency_s - o.time_to_first_token_s) / (o.output_tokens - 1)
            for o in good
            if o.time_to_first_token_s is not None and o.output_tokens > 1
        ],
        "itl": [gap for o in good for gap in o.inter_token_s],
        "e2el": [o.latency_s for o in good],
    }
    for name, values in times.items():
        found[f"mean_{name}_ms"] = 1000 * sum(values) / len(values) if values else 0.0
        found[f"max_{name}_ms"] = 1000 * max(values, default=0.0)
        for percent in PERCENTILES:
            found[f"p{percent}_{name}_ms"] = 1000 * percentile(values, percent)
    return found


def format_report(found: dict[str, Any]) -> str:
    """The lines for people."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]

    def add(name: str, value: float, digits: int = 2) -> None:
        lines.append(f"{name + ':':<{_WIDTH - 10}}{f'{value:.{digits}f}':<10}".rstrip())

    add("Successful requests", found["completed"], 0)
    add("Failed requests", found["failed"], 0)
    add("Retries", found["retries"], 0)
    add("Streams taken up again", found["resumes"], 0)
    if found.get("max_concurrency"):
        add("Maximum request concurrency", found["max_concurrency"], 0)
    if found.get("request_rate"):
        add("Request rate configured (req/s)", found["request_rate"])
    add("Benchmark duration (s)", found["duration"])
    add("Total input tokens", found["total_input_tokens"], 0)
    add("Total generated tokens", found["total_output_tokens"], 0)
    add("Request throughput (req/s)", found["request_throughput"])
    add("Output token throughput (tok/s)", found["output_throughput"])
    add("Total token throughput (tok/s)", found["total_token_throughput"])
    add("Client CPU (% of one core)", found["client_cpu_percent"], 0)
    for name, short, title in (
        ("ttft", "TTFT", "Time to First Token"),
        ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
        ("itl", "ITL", "Inter-token Latency"),
        ("e2el", "E2EL", "End-to-end Latency"),
    ):
        lines.append(title.center(_WIDTH, "-"))
        add(f"Mean {short} (ms)", found[f"mean_{name}_ms"])
        for percent in PERCENTILES:
            add(f"P{percent} {short} (ms)", found[f"p{percent}_{name}_ms"])
        add(f"Max {short} (ms)", found[f"max_{name}_ms"])
    lines.append("=" * _WIDTH)
    return "\n".join(lines)
