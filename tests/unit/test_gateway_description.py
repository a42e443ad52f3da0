"""/openapi.json says what the routes are, and /docs loads from nobody else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, ask


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run")) as cluster:
        cluster.wait(lambda: bool(cluster.states))
        yield cluster


@pytest.fixture(scope="module")
def document(cluster: EchoCluster) -> Any:
    status, _, document = ask(cluster, "/openapi.json", method="GET")
    assert status == 200
    return document


def test_every_route_that_it_describes_is_there(cluster: EchoCluster, document: Any) -> None:
    assert document["openapi"].startswith("3.") and len(document["paths"]) > 60
    for path, operations in document["paths"].items():
        for method in operations:
            # Nothing is asked of a world: a body that is none, or an id that is not there, tells enough.
            body = b"{" if method == "post" else None
            if "{" not in path and method == "get" and "/v2" not in path:
                assert ask(cluster, path, method="GET")[0] in (200, 503), path
            elif method == "post":
                asked = re.sub(r"\{\w+\}", "x", path)
                status, _, answer = ask(cluster, asked, body, method="POST")
                assert status != 405 and "Invalid URL" not in str(answer), path


def test_bodies_and_answers_have_their_types(document: Any) -> None:
    for prefix in ("", "/openai"):
        operation = document["paths"][prefix + CHAT]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": "#/components/schemas/ChatRequest"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "default" in operation["responses"]
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert "max_output_tokens" in schemas["ResponseRequest"]["properties"]
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references <= set(schemas)
    upload = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    assert list(upload) == ["multipart/form-data"]
    names = [
        parameter["name"]
        for parameter in document["paths"]["/v1/responses/{response_id}"]["get"]["parameters"]
    ]
    assert names == ["response_id", "stream", "starting_after"]


def test_the_page_loads_from_this_server_alone(cluster: EchoCluster) -> None:
    status, page = cluster.get("/docs")
    assert status == 200 and b"://" not in page
    for name in re.findall(rb'(?:src|href)="([^"]+)"', page):
        status, content = cluster.get(f"/{name.decode()}")
        assert status == 200 and len(content) > 1000
