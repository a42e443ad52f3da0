"""The page at `/` as HTTP: its headers, its policy, and the events that feed it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.http.page.routes import PAGE, content_security_policy
from tests.echo_world import EchoCluster
from tests.unit.http_asking import ask


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("front")) as cluster:
        cluster.start_world()
        cluster.wait_serving(1)
        yield cluster


def test_the_page_loads_nothing_from_elsewhere(cluster: EchoCluster) -> None:
    status, headers, body = ask(cluster, "/", method="GET")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and headers["x-content-type-options"] == "nosniff"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body
    assert b" style=" not in body and b" onclick=" not in body  # which the policy would refuse
    assert body.count(b"<script") == body.count(b"<style") == 1


def test_the_policy_follows_the_content() -> None:
    html = PAGE.read_text()
    assert content_security_policy(html) != content_security_policy(html.replace("</style>", " </style>"))


def test_a_page_that_is_known_is_not_sent_again(cluster: EchoCluster) -> None:
    tag = ask(cluster, "/", method="GET")[1]["etag"]
    for known in (tag, f'W/{tag}, "other"'):
        status, headers, body = ask(cluster, "/", method="GET", headers={"if-none-match": known})
        assert (status, body) == (304, b"") and headers["etag"] == tag
    assert ask(cluster, "/", method="GET", headers={"if-none-match": '"other"'})[0] == 200


def test_events_tell_of_a_world_that_dies(cluster: EchoCluster) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
    connection.request("GET", "/cluster/events")
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")

    def event() -> dict:
        while not (line := response.readline()).startswith(b"data: "):
            assert line
        return json.loads(line[6:])

    first = event()
    assert first["serving_epoch"] == 1 and [world["epoch"] for world in first["worlds"]] == [1]
    assert first["figures"]["model"] == "echo" and first["figures"]["ready"] is None
    cluster.kill_world(1)
    while (seen := event())["worlds"]:
        pass
    assert seen["figures"]["ready"] is not None
    cluster.start_world()
    while event()["serving_epoch"] != 2:
        pass
    before = event()["figures"]["generation_tokens"]
    ask(cluster, "/v1/completions", {"prompt": [7, 8, 9], "max_tokens": 5})
    while event()["figures"]["generation_tokens"] != before + 5:
        pass
    connection.close()


@pytest.mark.slow
def test_without_a_page(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, front_options=("--no-page",)) as cluster:
        cluster.wait(lambda: bool(cluster.states))
        assert ask(cluster, "/", method="GET")[0] == 404
        assert ask(cluster, "/cluster", method="GET")[0] == 200
