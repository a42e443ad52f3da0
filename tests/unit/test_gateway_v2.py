"""The Open Inference Protocol V2 over HTTP, from a real front over an echo world: shapes, binary tensors, streams,
and what is refused, with what words."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.http.errors import ApiError
from gateway.http.v2.bodies import read_infer
from gateway.inference.diagnostic_models import Simple, SimpleIdentity
from gateway.inference.tensors import DATATYPES, GivenTensor, to_raw
from tests.echo_world import EchoCluster

INFER, IDENTITY = "/v2/models/simple/infer", "/v2/models/simple_identity/infer"
FIRST, SECOND = list(range(16)), [1] * 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def http(cluster: EchoCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=30) as client:
        yield client


def simple_input(name: str, data: object, **changes: object) -> dict[str, object]:
    return {"name": name, "shape": [1, 16], "datatype": "INT32", "data": data, **changes}


def simple_body(**changes: object) -> dict[str, object]:
    return {"inputs": [simple_input("INPUT0", FIRST), simple_input("INPUT1", SECOND)], **changes}


def texts_input(*texts: str) -> dict[str, object]:
    return {"name": "text_input", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}


def outputs_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {output["name"]: output["data"] for output in answer.json()["outputs"]}


def post_binary(
    http: httpx.Client, path: str, head: object, tail: bytes = b"", length: int | None = None
) -> httpx.Response:
    encoded = json.dumps(head).encode()
    header = {"Inference-Header-Content-Length": str(len(encoded) if length is None else length)}
    return http.post(path, content=encoded + tail, headers=header)


def split(answer: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """JSON and the bytes behind it."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.content[:length]), answer.content[length:]


# --------------------------------------------------------------------------- the server


@pytest.mark.parametrize("end", ["", "/"])
def test_server_and_models(http: httpx.Client, end: str) -> None:
    server = http.get(f"/v2{end}").json()
    assert server["name"] == "phalanx"
    assert {"binary_tensor_data", "model_repository", "statistics", "parameters", "generate"} <= set(
        server["extensions"]
    )
    assert http.get(f"/v2/health/live{end}").json() == {"live": True}
    assert http.get(f"/v2/health/ready{end}").json() == {"ready": True}
    for path in ("simple", "simple/versions/1"):
        model = http.get(f"/v2/models/{path}{end}").json()
        assert model["versions"] == ["1"] and model["name"] == "simple"
        assert model["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": [-1, 16]}
        assert http.get(f"/v2/models/{path}/ready{end}").json() == {"name": "simple", "ready": True}
        config = http.get(f"/v2/models/{path}/config{end}").json()
        assert config["input"][0] == {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16]}
    assert http.post(f"/v2/models/simple/versions/1/infer{end}", json=simple_body()).status_code == 200


def test_diagnostic_models_are_no_openai_models(http: httpx.Client) -> None:
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["echo"]
    index = http.post("/v2/repository/index").json()
    assert [(row["name"], row["state"]) for row in index] == [
        ("echo", "READY"),
        ("simple", "READY"),
        ("simple_int8", "READY"),
        ("simple_string", "READY"),
        ("simple_identity", "READY"),
    ]


def test_load_and_unload(http: httpx.Client) -> None:
    assert http.post("/v2/repository/models/simple/unload", json={}).status_code == 200
    assert http.get("/v2/models/simple/ready").status_code == 503
    assert http.post(INFER, json=simple_body()).status_code == 404
    states = {row["name"]: row["state"] for row in http.post("/v2/repository/index", json={}).json()}
    assert states["simple"] == "UNAVAILABLE"
    ready = http.post("/v2/repository/index", json={"ready": True}).json()
    assert "simple" not in [row["name"] for row in ready]
    assert http.post("/v2/repository/models/simple/load").status_code == 200
    assert http.post(INFER, json=simple_body()).status_code == 200
    refused = http.post("/v2/repository/models/echo/unload")
    assert refused.status_code == 400 and "phalanx stop" in refused.json()["error"]
    unknown = http.post("/v2/repository/models/nothing/load")
    assert unknown.status_code == 400 and "failed to load 'nothing'" in unknown.json()["error"]


def test_statistics_count(http: httpx.Client) -> None:
    def stats() -> dict[str, Any]:
        [found] = http.get("/v2/models/simple/stats").json()["model_stats"]
        return dict(found["inference_stats"])

    before = stats()
    assert http.post(INFER, json=simple_body()).status_code == 200
    assert http.post(INFER, json={"inputs": []}).status_code == 400
    after = stats()
    assert after["success"]["count"] == before["success"]["count"] + 1
    assert after["fail"]["count"] == before["fail"]["count"] + 1
    assert after["success"]["ns"] > before["success"]["ns"]
    names = [row["name"] for row in http.get("/v2/models/stats").json()["model_stats"]]
    assert names == ["echo", "simple", "simple_int8", "simple_string", "simple_identity"]


# --------------------------------------------------------------------------- infer


def test_sum_and_difference(http: httpx.Client) -> None:
    answer = http.post(INFER, json=simple_body(id="my id"))
    assert outputs_of(answer) == {"OUTPUT0": [n + 1 for n in FIRST], "OUTPUT1": [n - 1 for n in FIRST]}
    head = answer.json()
    assert (head["model_name"], head["model_version"], head["id"]) == ("simple", "1", "my id")


def test_numbers_of_other_types(http: httpx.Client) -> None:
    def ask(name: str, datatype: str, first: list[Any], second: list[Any]) -> httpx.Response:
        inputs = [simple_input("INPUT0", first), simple_input("INPUT1", second)]
        body = {"inputs": [{**tensor, "datatype": datatype} for tensor in inputs]}
        return http.post(f"/v2/models/{name}/infer", json=body)

    found = outputs_of(ask("simple_int8", "INT8", [127] * 16, SECOND))
    assert found == {"OUTPUT0": [-128] * 16, "OUTPUT1": [126] * 16}
    found = outputs_of(ask("simple_string", "BYTES", [str(n) for n in FIRST], ["1"] * 16))
    assert found == {"OUTPUT0": [str(n + 1) for n in FIRST], "OUTPUT1": [str(n - 1) for n in FIRST]}
    for wrong in ("", "x", "1.5", "1e3", "9999999999", "\u0661"):
        refused = ask("simple_string", "BYTES", [wrong] * 16, ["1"] * 16)
        assert refused.status_code == 400 and "decimal number" in refused.json()["error"]


def test_nested_data_means_the_same(http: httpx.Client) -> None:
    nested = {"inputs": [simple_input("INPUT0", [FIRST]), simple_input("INPUT1", [[[1]] * 16])]}
    assert outputs_of(http.post(INFER, json=nested)) == outputs_of(http.post(INFER, json=simple_body()))


def test_a_subset_of_outputs_in_the_order_asked(http: httpx.Client) -> None:
    assert list(outputs_of(http.post(INFER, json=simple_body(outputs=[{"name": "OUTPUT1"}])))) == ["OUTPUT1"]
    both = simple_body(outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}])
    assert list(outputs_of(http.post(INFER, json=both))) == ["OUTPUT1", "OUTPUT0"]


def test_binary_inputs_and_mixed_outputs(http: httpx.Client) -> None:
    raw = struct.pack("<16i", *FIRST)
    first: dict[str, object] = simple_input("INPUT0", None, parameters={"binary_data_size": 64})
    del first["data"]
    outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}]
    head = {"inputs": [first, simple_input("INPUT1", SECOND)], "outputs": outputs}
    answer, tail = split(post_binary(http, INFER, head, raw))
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 64}
    assert struct.unpack("<16i", tail) == tuple(n + 1 for n in FIRST)
    assert answer["outputs"][1]["data"] == [n - 1 for n in FIRST]


def test_binary_data_output_is_the_default_of_outputs(http: httpx.Client) -> None:
    body = simple_body(parameters={"binary_data_output": True})
    _, tail = split(http.post(INFER, json=body))
    assert len(tail) == 128
    body["outputs"] = [{"name": "OUTPUT0", "parameters": {"binary_data": False}}, {"name": "OUTPUT1"}]
    answer, tail = split(http.post(INFER, json=body))
    assert len(tail) == 64 and answer["outputs"][0]["data"][0] == 1


def test_bytes_of_any_kind_come_back(http: httpx.Client) -> None:
    values = [b"", b"\xff\x00\xfe", "h\u00e9".encode(), b"x" * 300]
    raw = to_raw("BYTES", values)
    tensor = {"name": "INPUT0", "datatype": "BYTES", "shape": [1, 4]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    assert split(post_binary(http, IDENTITY, head, raw))[1] == raw
    head["parameters"] = {}
    refused = post_binary(http, IDENTITY, head, raw)
    assert refused.status_code == 400 and "binary_data" in refused.json()["error"]


def test_a_raw_binary_request(http: httpx.Client) -> None:
    header = {"Inference-Header-Content-Length": "0"}
    answer, tail = split(http.post(IDENTITY, content=b"any\xffthing", headers=header))
    assert answer["outputs"][0]["shape"] == [1, 1] and tail == to_raw("BYTES", [b"any\xffthing"])
    assert http.post(INFER, content=b"x", headers=header).status_code == 400


def test_a_compressed_body(http: httpx.Client) -> None:
    packed = gzip.compress(json.dumps(simple_body()).encode())
    assert http.post(INFER, content=packed, headers={"content-encoding": "gzip"}).status_code == 200
    bomb = gzip.compress(b" " * (64 << 20))
    assert http.post(INFER, content=bomb, headers={"content-encoding": "gzip"}).status_code == 413
    assert http.post(INFER, content=packed[:-5], headers={"content-encoding": "gzip"}).status_code == 400


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shape": [1, 15]}, "shape"),
        ({"shape": [16]}, "shape"),
        ({"shape": [-1, 16]}, "shape"),
        ({"shape": [9, 16]}, "shape"),
        ({"datatype": "FP32"}, "INT32"),
        ({"datatype": "INT23"}, "allowed"),
        ({"data": FIRST[:15]}, "15 elements"),
        ({"data": [*FIRST, 1]}, "more than the 16"),
        ({"data": [2**31, *FIRST[1:]]}, "range"),
        ({"data": [0.5, *FIRST[1:]]}, "0.5"),
        ({"data": [True, *FIRST[1:]]}, "INT32"),
        ({"data": "text"}, "not a list"),
        ({"name": "INPUT7"}, "unexpected inference input"),
        ({"name": "INPUT1"}, "twice"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared memory"),
        ({"parameters": {"binary_data_size": 64}}, "both"),
    ],
)
def test_a_wrong_input_is_named(http: httpx.Client, change: dict[str, object], word: str) -> None:
    body = {"inputs": [simple_input("INPUT0", FIRST) | change, simple_input("INPUT1", SECOND)]}
    answer = http.post(INFER, json=body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"] and word in answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/v2/models/nothing", 404, "Request for unknown model: 'nothing' is not found"),
        ("/v2/models/nothing/ready", 404, "unknown model"),
        ("/v2/models/simple/versions/2", 404, "version 2"),
        ("/v2/nothing", 404, "Not Found"),
        ("/v2/models/simple/versions/latest", 400, "from specified version string 'latest'"),
        ("/v2/systemsharedmemory/status", 400, "shared memory"),
        ("/v2/logging", 400, "settings"),
        ("/v2/trace/setting", 400, "settings"),
        ("/v2/models/simple/trace/setting", 400, "settings"),
        ("/v2/cudasharedmemory/region/x/status", 400, "shared memory"),
        (INFER, 405, "Method"),
    ],
)
def test_errors_have_one_shape(http: httpx.Client, path: str, status: int, word: str) -> None:
    answer = http.get(path)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"] and word in answer.json()["error"]


# --------------------------------------------------------------------------- the language model


def test_texts_in_and_out(http: httpx.Client) -> None:
    body = {"inputs": [texts_input("abcd", "xyz")], "parameters": {"max_tokens": 3}}
    found = outputs_of(http.post("/v2/models/echo/infer", json=body))
    assert found == {
        "text_output": ["abc", "xyz"],
        "finish_reason": ["length", "length"],
        "num_output_tokens": [3, 3],
    }


def test_parameters_as_tensors(http: httpx.Client) -> None:
    """As clients of Triton's backends send them."""
    packed = json.dumps({"max_tokens": "5", "temperature": "0.1", "stop": ["d"]})
    inputs = [
        {**texts_input("abcdef"), "shape": [1, 1]},
        {"name": "sampling_parameters", "shape": [1], "datatype": "BYTES", "data": [packed]},
        {"name": "exclude_input_in_output", "shape": [1], "datatype": "BOOL", "data": [False]},
        {"name": "stream", "shape": [1], "datatype": "BOOL", "data": [False]},
    ]
    answer = http.post("/v2/models/echo/infer", json={"inputs": inputs})
    assert answer.json()["outputs"][0]["shape"] == [1, 1]
    found = outputs_of(answer)
    assert (found["text_output"], found["finish_reason"]) == (["abcdefabc"], ["stop"])


def test_generate(http: httpx.Client) -> None:
    body = {"text_input": "abcd", "max_tokens": 6, "id": "7", "somebody": "else's"}
    answer = http.post("/v2/models/echo/generate", json=body).json()
    assert answer == {
        "id": "7",
        "model_name": "echo",
        "model_version": "1",
        "text_output": "abcdab",
        "finish_reason": "length",
        "num_output_tokens": 6,
    }
    body = {"text_input": "abcd", "parameters": {"stop": "c", "max_tokens": 6}}
    answer = http.post("/v2/models/echo/versions/1/generate/", json=body).json()
    assert (answer["text_output"], answer["finish_reason"]) == ("ab", "stop")


def stream_events(http: httpx.Client, **fields: object) -> Iterator[dict[str, Any]]:
    with http.stream("POST", "/v2/models/echo/generate_stream", json=fields) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            assert line == "" or line.startswith(("data: {", ":"))
            if line.startswith("data: "):
                yield json.loads(line[6:])


def test_generate_stream(http: httpx.Client) -> None:
    events = list(stream_events(http, text_input="abcd", max_tokens=6))
    assert "".join(event["text_output"] for event in events) == "abcdab"
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + ["length"]
    assert sum(event["num_output_tokens"] for event in events) == 6 and len(events) > 1
    [whole] = stream_events(http, text_input="abcd", max_tokens=6, stream=False)
    assert whole["text_output"] == "abcdab"


def test_a_stream_goes_on_in_the_next_world(cluster: EchoCluster, http: httpx.Client) -> None:
    text, events = "abcdefgijk", []
    for event in stream_events(http, text_input=text, max_tokens=600):
        events.append(event)
        if len(events) == 20:
            cluster.kill_world()
            cluster.start_world()
    told = "".join(event["text_output"] for event in events)
    assert told == text * 60 and events[-1]["finish_reason"] == "length"


def test_a_client_that_leaves_ends_its_request(cluster: EchoCluster, http: httpx.Client) -> None:
    def live() -> int:
        return int(http.get("/cluster").json()["front"]["requests_live"])

    body = {"text_input": "abcd", "max_tokens": 3000}
    with http.stream("POST", "/v2/models/echo/generate_stream", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        cluster.wait(lambda: live() == 1)
    cluster.wait(lambda: live() == 0)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v2/models/echo/generate", json=body, timeout=0.5)
    cluster.wait(lambda: live() == 0)


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({}, 400, "text_input"),
        ({"text_input": ""}, 400, "empty"),
        ({"text_input": 5}, 400, "text_input"),
        ({"text_input": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"text_input": "a", "max_tokens": "many"}, 400, "max_tokens"),
        ({"text_input": "a", "temperature": 9}, 400, "temperature"),
        ({"text_input": "a", "max_tokens": 10**6}, 400, "maximum length"),
        ({"text_input": "a", "parameters": {"n": 2}}, 400, "n is not supported"),
        ({"text_input": "a", "sampling_parameters": "["}, 400, "sampling_parameters"),
        ({"text_input": "a", "stream": "perhaps"}, 400, "stream"),
    ],
)
def test_a_wrong_generate_is_named(
    http: httpx.Client, fields: dict[str, object], status: int, word: str
) -> None:
    for path in ("generate", "generate_stream"):
        answer = http.post(f"/v2/models/echo/{path}", json=fields)
        assert answer.status_code == status and word in answer.json()["error"], answer.text


def test_a_request_waits_for_a_world(cluster: EchoCluster, http: httpx.Client) -> None:
    cluster.kill_world()
    cluster.wait_serving(None)
    assert http.get("/v2/health/ready").status_code == 503
    assert http.get("/v2/models/echo/ready").json() == {"name": "echo", "ready": False}
    assert outputs_of(http.post(INFER, json=simple_body()))["OUTPUT0"][0] == 1  # needs no world
    timer = threading.Timer(0.3, cluster.start_world)
    timer.start()
    body = {"text_input": "abcd", "max_tokens": 4}
    assert http.post("/v2/models/echo/generate", json=body).json()["text_output"] == "abcd"
    timer.join()


# --------------------------------------------------------------------------- any bytes


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(DATATYPES), st.lists(st.integers(0, 5), max_size=4), st.binary(max_size=200))
def test_any_raw_tensor_is_read_or_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    given_tensor = GivenTensor("X", datatype, shape, raw=raw)
    try:
        values = given_tensor.values()
    except ApiError as error:
        assert error.status == 400
    else:
        assert len(values) == given_tensor.num_elements
        if datatype not in ("BOOL", "FP16", "FP32", "FP64"):  # there other bytes mean the same
            assert to_raw(datatype, values) == raw


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["INPUT0", "INPUT1"]) | st.text(max_size=4),
        "datatype": st.sampled_from(["INT32", "BYTES"]) | st.text(max_size=4),
        "shape": st.sampled_from([[1, 16], [1, 1]]) | st.lists(st.integers(), max_size=4) | JSON,
    },
    optional={
        "data": st.just(FIRST) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 80) | JSON}) | JSON,
    },
)
BODY = st.fixed_dictionaries(
    {"inputs": st.lists(TENSOR, max_size=3) | JSON},
    optional={"id": JSON, "outputs": JSON, "parameters": JSON},
)


@settings(max_examples=400, deadline=None)
@given(
    BODY.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=100),
    st.binary(max_size=100),
    st.none() | st.integers(-1, 200).map(str) | st.text(max_size=6),
    st.sampled_from([Simple, SimpleIdentity]),
)
async def test_any_body_is_answered_or_refused(
    head: bytes, tail: bytes, length: str | None, kind: type[Simple | SimpleIdentity]
) -> None:
    model = kind()
    for header in (length, str(len(head))):
        try:
            request, _ = read_infer(head + tail, header, model.spec)
            assert await model.infer(request)
        except ApiError as error:
            assert error.status == 400
