"""Whose a request is among several fronts, what each has of a limit, and how their metrics become one."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.call_ids import new_call_id
from gateway.http.fronts_metrics import merge
from gateway.http.peers import home


def scope(path: str, method: str = "GET", key: str = "") -> dict[str, Any]:
    headers = [(b"idempotency-key", key.encode())] if key else []
    return {"type": "http", "path": path, "method": method, "headers": headers}


@pytest.mark.parametrize("front", [0, 1, 15, 63])
def test_an_id_names_its_front(front: int) -> None:
    call_id = f"chatcmpl-{new_call_id(front)}"
    assert len(call_id) == len("chatcmpl-") + 32
    for path in (f"/v1/requests/{call_id}", f"/openai/v1/requests/{call_id}/stream"):
        assert home(scope(path), 64) == front


def test_ids_grow_and_are_never_the_same() -> None:
    ids = [new_call_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    moments = [each[2:13] for each in ids]
    assert moments == sorted(moments)


def test_what_belongs_to_nobody_is_served_where_it_arrives() -> None:
    for path in (
        "/v1/requests/nonsense",
        f"/v1/requests/cmpl-{new_call_id(7)}",
        "/v1/chat/completions",
        "/health",
    ):
        assert home(scope(path), 2) is None
    assert home(scope("/v1/completions", "POST"), 2) is None
    assert home(scope("/v2/rerank", "POST"), 2) is None


def test_what_is_stored_is_with_the_first_front() -> None:
    for path in (
        "/v1/responses",
        "/v1/files/file-1/content",
        "/openai/v1/batches",
        "/v2/models/echo/infer",
        "/v2",
    ):
        assert home(scope(path, "POST"), 4) == 0


def test_a_key_is_always_of_the_same_front_and_keys_are_dealt_out() -> None:
    homes = [home(scope("/v1/completions", "POST", f"key {number}"), 2) for number in range(64)]
    assert homes == [home(scope("/v1/chat/completions", "POST", f"key {number}"), 2) for number in range(64)]
    assert set(homes) == {0, 1}


def exposition(accepted: int, live: int, bucket: int, preemptions: int, epoch: int) -> str:
    return f"""# HELP phalanx_requests_accepted_total Requests.
# TYPE phalanx_requests_accepted_total counter
phalanx_requests_accepted_total{{model="m"}} {accepted}.0
# TYPE phalanx_requests_live gauge
phalanx_requests_live{{model="m"}} {live}.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{model_name="m",engine="0"}} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{model_name="m",engine="0"}} {max(live - 3, 0)}.0
# TYPE phalanx_time_to_first_token_seconds histogram
phalanx_time_to_first_token_seconds_bucket{{le="0.5",model="m"}} {bucket}.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{model_name="m",engine="0"}} {preemptions}.0
# TYPE phalanx_serving_epoch gauge
phalanx_serving_epoch{{model="m"}} {epoch}.0
"""


def test_metrics_of_several_fronts_become_one() -> None:
    merged = merge([exposition(5, 2, 4, 9, 7), exposition(6, 4, 1, 9, 7)])
    assert merged == exposition(11, 6, 5, 9, 7)
    assert merge([merged]) == merged
