"""What /metrics says, read with Prometheus' own parser, against requests that were made; and that alerts and
dashboard use no name that is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.protocol import Stats
from gateway.request_metrics import COUNT_BUCKETS, LATENCY_BUCKETS_S, PER_TOKEN_BUCKETS_S
from gateway.world_metrics import EngineTotals
from tests.echo_world import ROOT, EchoCluster
from tests.unit.http_asking import TEXT, ask

MONITORING = ROOT / "monitoring"
VLLM_LABELS = {"model_name": "echo", "engine": "0"}


def test_what_worlds_count_never_falls() -> None:
    totals, seen = EngineTotals(), []
    for epoch, preemptions in ((1, 0), (1, 3), (2, 0), (2, 1), (4, 0), (4, 2)):
        totals.note(Stats(epoch, 0, 0, 0, 0, 0, preemptions, 0, 0, preemptions * 10, preemptions * 5))
        seen.append((totals["num_preemptions"], totals["prefix_cache_hits"]))
    assert seen == [(0, 0), (3, 15), (3, 15), (4, 20), (4, 20), (6, 30)]


def scrape(cluster: EchoCluster) -> dict[str, Metric]:
    status, body = cluster.get("/metrics")
    assert status == 200
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(families: dict[str, Metric], sample: str, **labels: str) -> float:
    """The sum over the samples of this name that have these labels."""
    found = [
        one.value
        for family in families.values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    ]
    assert found, f"no {sample}{labels}"
    return sum(found)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.mark.slow
def test_figures_are_those_of_the_requests_across_a_world_change(cluster: EchoCluster) -> None:
    before = scrape(cluster)
    sizes = [(3, 5), (7, 1), (10, 40), (2, 2)]
    for prompt, count in sizes:
        ask(cluster, TEXT, {"prompt": "x" * prompt, "max_tokens": count, "ignore_eos": True})
    ask(cluster, TEXT, {"prompt": "abcdef", "max_tokens": 99, "stop": ["e"]})  # stops after 5 tokens
    middle = scrape(cluster)
    cluster.kill_world()
    cluster.wait_serving(None)
    cluster.wait_serving(cluster.start_world())
    ask(cluster, TEXT, {"prompt": "ab", "max_tokens": 4, "ignore_eos": True})
    after = scrape(cluster)

    def grown(sample: str, **labels: str) -> float:
        return value(after, sample, **labels) - value(before, sample, **labels)

    for prefix, labels in (("vllm:", VLLM_LABELS), ("phalanx_", {"model": "echo"})):
        assert grown(f"{prefix}prompt_tokens_total", **labels) == 22 + 6 + 2
        assert grown(f"{prefix}generation_tokens_total", **labels) == 48 + 5 + 4
        for name, total in (("prompt", 30), ("generation", 57), ("params_max", 48 + 99 + 4)):
            sample = f"{prefix}request_{name}_tokens"
            assert (grown(f"{sample}_count", **labels), grown(f"{sample}_sum", **labels)) == (6, total)
        assert grown(f"{prefix}request_generation_tokens_bucket", le="5.0", **labels) == 5
        for name in ("queue_time", "prefill_time", "decode_time", "inference_time"):
            assert grown(f"{prefix}request_{name}_seconds_count", **labels) == 6
        assert grown(f"{prefix}request_time_per_output_token_seconds_count", **labels) == 5
        assert grown(f"{prefix}e2e_request_latency_seconds_count", **labels) == 6
        assert grown(f"{prefix}time_to_first_token_seconds_count", **labels) == 6
        assert grown(f"{prefix}inter_token_latency_seconds_count", **labels) == 57 - 6
        parts = [
            grown(f"{prefix}request_{name}_time_seconds_sum", **labels)
            for name in ("queue", "prefill", "decode")
        ]
        whole = grown(f"{prefix}e2e_request_latency_seconds_sum", **labels)
        assert 0.9 * whole - 0.1 <= sum(parts) <= whole
    assert grown("vllm:request_success_total", finished_reason="length", **VLLM_LABELS) == 5
    assert grown("vllm:request_success_total", finished_reason="stop", **VLLM_LABELS) == 1
    # No counter has fallen, whatever happened to the world.
    for family in middle.values():
        if family.type in ("counter", "histogram"):
            for sample in family.samples:
                if sample.name.endswith(("_total", "_count", "_bucket")):
                    assert value(after, sample.name, **sample.labels) >= sample.value, sample


@pytest.mark.slow
def test_vllm_s_names_types_and_bounds(cluster: EchoCluster) -> None:
    families = scrape(cluster)
    kinds = {
        "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
        "counter": ["prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens"],
        "histogram": ["time_to_first_token_seconds", "inter_token_latency_seconds"],
    }
    kinds["counter"] += ["generation_tokens", "request_success"]
    kinds["histogram"] += ["request_time_per_output_token_seconds", "e2e_request_latency_seconds"]
    kinds["histogram"] += [f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
    for kind, names in kinds.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind, name
            assert all(VLLM_LABELS.items() <= sample.labels.items() for sample in family.samples)
    for name, bounds in (
        ("request_generation_tokens", COUNT_BUCKETS),
        ("inter_token_latency_seconds", PER_TOKEN_BUCKETS_S),
        ("e2e_request_latency_seconds", LATENCY_BUCKETS_S),
    ):
        shown = {sample.labels.get("le") for sample in families[f"vllm:{name}"].samples}
        assert {str(bound) for bound in bounds} <= shown
    [info] = families["vllm:cache_config_info"].samples
    assert info.labels["num_gpu_blocks"] == "1000" and info.labels["block_size"] == "65"


@pytest.mark.slow
def test_worlds_and_ranks(cluster: EchoCluster) -> None:
    families = scrape(cluster)
    epoch = str(cluster.epoch)
    assert value(families, "phalanx_worlds", state="active") == 1
    assert value(families, "phalanx_worlds", state="spare") == 0
    assert value(families, "phalanx_epoch") == cluster.epoch
    assert 0 < value(families, "phalanx_rank_heartbeat_age_seconds", epoch=epoch, rank="0") < 5
    assert value(families, "phalanx_rank_phase", epoch=epoch, phase="idle") == 1


# --------------------------------------------------------------------------- what is drawn and watched


def expressions(content: Any) -> Iterator[str]:
    """Every `expr` and `query` in it."""
    if isinstance(content, dict):
        for key, inner in content.items():
            if key in ("expr", "query") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(content, list):
        for inner in content:
            yield from expressions(inner)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["alerts.yaml", "grafana-dashboard.json"])
def test_every_name_is_in_a_scrape(cluster: EchoCluster, file: str) -> None:
    ask(cluster, TEXT, {"prompt": "x", "max_tokens": -1})  # so that something was refused
    text = (MONITORING / file).read_text()
    content = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
    used = {name for one in expressions(content) for name in re.findall(r"\b(?:phalanx_|vllm:)\w+", one)}
    assert len(used) > 5
    families = scrape(cluster)
    there = {sample.name for family in families.values() for sample in family.samples}
    there |= set(families) | {
        f"{name}_total" for name, family in families.items() if family.type == "counter"
    }
    assert used <= there


def test_the_rules_are_rules(tmp_path: Path) -> None:
    content = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    rules = [rule for group in content["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "rules", str(MONITORING / "alerts.yaml")], check=True)


def test_the_dashboard_has_a_place_for_each_panel() -> None:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["targets"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
