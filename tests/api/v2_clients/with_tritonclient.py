"""Uses tritonclient[http,grpc] as its users do, against a server that runs. Started by test_v2_clients.py in an
environment of its own; fails with an AssertionError.

Arguments: host:port of HTTP, host:port of gRPC, name of the language model."""

from __future__ import annotations

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException

FIRST = np.arange(16, dtype=np.int32).reshape(1, 16)
SECOND = np.ones((1, 16), dtype=np.int32)


def refused(call: object, word: str) -> None:
    try:
        call()  # type: ignore[operator]
    except InferenceServerException as error:
        assert word in error.message(), error.message()
    else:
        raise AssertionError("it was not refused")


def metadata(client: object, library: object, model: str) -> None:
    as_json = {"as_json": True} if library is grpcclient else {}
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(model)
    assert client.get_server_metadata(**as_json)["name"] == "phalanx"
    assert client.get_model_metadata("simple", **as_json)["inputs"][0]["name"] == "INPUT0"
    config = client.get_model_config(model, **as_json)
    config = config.get("config", config)
    assert config["model_transaction_policy"]["decoupled"] is True
    index = client.get_model_repository_index(**as_json)
    rows = index["models"] if library is grpcclient else index
    diagnostic = {"simple", "simple_int8", "simple_string", "simple_identity"}
    assert {row["name"] for row in rows} == {model, *diagnostic}
    refused(client.get_system_shared_memory_status, "shared memory is not supported")
    refused(lambda: client.get_model_metadata("simple", "newest"), "from specified version string")
    refused(lambda: client.get_model_metadata("wrong_model_name"), "Request for unknown model")
    assert client.get_inference_statistics("simple", **as_json)["model_stats"][0]["name"] == "simple"


def control(client: object) -> None:
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    client.load_model("simple")
    assert client.is_model_ready("simple")
    refused(lambda: client.load_model("wrong_model_name"), "failed to load 'wrong_model_name'")


def diagnostics(client: object, library: object) -> None:
    for binary in (True, False):
        inputs = [library.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        outputs = [library.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        if library is httpclient:
            inputs[0].set_data_from_numpy(FIRST, binary_data=binary)
            inputs[1].set_data_from_numpy(SECOND, binary_data=not binary)
            outputs[0] = library.InferRequestedOutput("OUTPUT0", binary_data=binary)
            outputs[1] = library.InferRequestedOutput("OUTPUT1", binary_data=False)
        else:
            inputs[0].set_data_from_numpy(FIRST)
            inputs[1].set_data_from_numpy(SECOND)
        result = client.infer("simple", inputs, outputs=outputs, request_id="17")
        assert (result.as_numpy("OUTPUT0") == FIRST + SECOND).all()
        assert (result.as_numpy("OUTPUT1") == FIRST - SECOND).all()
        response = result.get_response()
        assert (response.id if library is grpcclient else response["id"]) == "17"
    inputs[0] = library.InferInput("INPUT0", [1, 15], "INT32")
    inputs[0].set_data_from_numpy(FIRST[:, :15])
    refused(lambda: client.infer("simple", inputs), "shape")

    for name, datatype in (("simple_int8", "INT8"), ("simple_string", "BYTES")):
        inputs = [library.InferInput(each, [1, 16], datatype) for each in ("INPUT0", "INPUT1")]
        for given, data in zip(inputs, (FIRST, SECOND), strict=True):
            in_type = data.astype(np.int8) if datatype == "INT8" else data.astype(str).astype(object)
            given.set_data_from_numpy(in_type)
        found = client.infer(name, inputs)
        assert (found.as_numpy("OUTPUT0").astype(np.int32) == FIRST + SECOND).all()
        assert (found.as_numpy("OUTPUT1").astype(np.int32) == FIRST - SECOND).all()

    texts = np.array([["plain", "h\u00e9", ""]], dtype=object)
    given = library.InferInput("INPUT0", [1, 3], "BYTES")
    given.set_data_from_numpy(texts)
    found = client.infer("simple_identity", [given]).as_numpy("OUTPUT0")
    assert [value.decode() for value in found[0]] == list(texts[0])


def text_inputs(library: object, text: str, **parameters: object) -> list[object]:
    given = library.InferInput("text_input", [1], "BYTES")
    given.set_data_from_numpy(np.array([text.encode()], dtype=object))
    packed = library.InferInput("sampling_parameters", [1], "BYTES")
    packed.set_data_from_numpy(np.array([json.dumps(parameters).encode()], dtype=object))
    return [given, packed]


def language(client: object, library: object, model: str) -> str:
    inputs = text_inputs(library, "Once upon a time", max_tokens="12", temperature="0")
    result = client.infer(model, inputs)
    assert result.as_numpy("num_output_tokens")[0] == 12
    return str(result.as_numpy("text_output")[0].decode())


def stream(client: object, model: str) -> str:
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    inputs = text_inputs(grpcclient, "Once upon a time", max_tokens=12, temperature=0)
    client.async_stream_infer(model, inputs, request_id="5", enable_empty_final_response=True)
    pieces = []
    while True:
        result, error = answers.get(timeout=60)
        assert error is None, error
        pieces.append(result.as_numpy("text_output")[0].decode())
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.async_stream_infer("wrong_model_name", inputs)
    result, error = answers.get(timeout=60)
    assert result is None and "unknown model" in error.message()
    client.stop_stream()
    assert len(pieces) > 1
    return "".join(pieces)


def main() -> None:
    http_address, grpc_address, model = sys.argv[1:]
    with httpclient.InferenceServerClient(http_address) as http:
        with grpcclient.InferenceServerClient(grpc_address) as rpc:
            for client, library in ((http, httpclient), (rpc, grpcclient)):
                metadata(client, library, model)
                control(client)
                diagnostics(client, library)
            told = {language(http, httpclient, model), language(rpc, grpcclient, model), stream(rpc, model)}
            assert len(told) == 1, told
        inputs = [httpclient.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        for given, data in zip(inputs, (FIRST, SECOND), strict=True):
            given.set_data_from_numpy(data)
        answer = http.infer("simple", inputs, request_compression_algorithm="gzip")
        assert (answer.as_numpy("OUTPUT0") == FIRST + SECOND).all()
        answer = http.infer("simple", inputs, response_compression_algorithm="gzip")
        assert (answer.as_numpy("OUTPUT1") == FIRST - SECOND).all()
        waiting = [http.async_infer("simple", inputs) for _ in range(3)]
        assert all((each.get_result().as_numpy("OUTPUT1") == FIRST - SECOND).all() for each in waiting)


if __name__ == "__main__":
    main()
