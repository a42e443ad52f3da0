"""The gRPC server of a real front over an echo world: methods, errors, streams, health, reflection, and its port."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.inference.tensors import from_raw, to_raw
from gateway.rpc import inference_pb2 as pb
from tests.echo_world import ROOT, EchoCluster

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
FIRST, SECOND = list(range(16)), [1] * 16


class Stub:
    """The service's methods, made from its descriptor."""

    def __init__(self, channel: grpc.Channel) -> None:
        for method in SERVICE.methods:
            kind = "stream_stream" if method.client_streaming else "unary_unary"
            response = getattr(pb, method.output_type.name)
            call = getattr(channel, kind)(
                f"/{SERVICE.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--grpc", "127.0.0.1:0")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002, front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def channel(cluster: EchoCluster) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Stub:
    return Stub(channel)


def simple_request(**fields: Any) -> Any:
    request = pb.ModelInferRequest(model_name="simple", **fields)
    for name, data in (("INPUT0", FIRST), ("INPUT1", SECOND)):
        tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        tensor.contents.int_contents.extend(data)
    return request


def text_request(text: str, **parameters: int | str | bool | float) -> Any:
    request = pb.ModelInferRequest(model_name="echo", id="7")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(to_raw("BYTES", [text.encode()]))
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in parameters.items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def outputs_of(response: Any) -> dict[str, list[Any]]:
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    found = {}
    for output, raw in pairs:
        count = 1
        for size in output.shape:
            count *= size
        found[output.name] = from_raw(output.datatype, count, raw)
    return found


def refusal(call: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=20)
    return caught.value.code(), caught.value.details()


# --------------------------------------------------------------------------- methods


def test_server_and_models(stub: Stub) -> None:
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="echo", version="1")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "phalanx"
    model = stub.ModelMetadata(pb.ModelMetadataRequest(name="simple"))
    assert [(tensor.name, list(tensor.shape)) for tensor in model.inputs] == [
        ("INPUT0", [-1, 16]),
        ("INPUT1", [-1, 16]),
    ]
    config = stub.ModelConfig(pb.ModelConfigRequest(name="echo")).config
    assert config.model_transaction_policy.decoupled and config.input[0].data_type == pb.TYPE_STRING
    index = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
    assert [row.name for row in index.models] == [
        "echo",
        "simple",
        "simple_int8",
        "simple_string",
        "simple_identity",
    ]


def test_sum_and_difference(stub: Stub) -> None:
    expected = {"OUTPUT0": [n + 1 for n in FIRST], "OUTPUT1": [n - 1 for n in FIRST]}
    typed = simple_request(id="mine")
    response = stub.ModelInfer(typed)
    assert (response.id, response.model_version) == ("mine", "1") and outputs_of(response) == expected
    raw = simple_request()
    for tensor, data in zip(raw.inputs, (FIRST, SECOND), strict=True):
        tensor.ClearField("contents")
        raw.raw_input_contents.append(to_raw("INT32", data))
    assert outputs_of(stub.ModelInfer(raw)) == expected
    raw.outputs.add(name="OUTPUT1")
    assert list(outputs_of(stub.ModelInfer(raw))) == ["OUTPUT1"]
    counted = stub.ModelStatistics(pb.ModelStatisticsRequest(name="simple")).model_stats[0]
    assert counted.inference_stats.success.count >= 3


def test_load_and_unload(stub: Stub) -> None:
    stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="simple_identity"))
    assert not stub.ModelReady(pb.ModelReadyRequest(name="simple_identity")).ready
    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="simple_identity"))
    assert stub.ModelReady(pb.ModelReadyRequest(name="simple_identity")).ready


def test_errors_have_their_status(stub: Stub) -> None:
    code, text = refusal(stub.ModelMetadata, pb.ModelMetadataRequest(name="nothing"))
    assert code is grpc.StatusCode.NOT_FOUND and "Request for unknown model: 'nothing'" in text
    wrong = simple_request()
    wrong.inputs[0].shape[:] = [16, 1]
    assert refusal(stub.ModelInfer, wrong)[0] is grpc.StatusCode.INVALID_ARGUMENT
    short = simple_request()
    short.raw_input_contents.append(b"x")
    code, text = refusal(stub.ModelInfer, short)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "raw_input_contents" in text
    shared = simple_request()
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    assert "shared memory" in refusal(stub.ModelInfer, shared)[1]
    code, text = refusal(stub.ModelInfer, text_request("a", max_tokens=0))
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "max_tokens" in text
    unload = pb.RepositoryModelUnloadRequest(model_name="echo")
    assert refusal(stub.RepositoryModelUnload, unload)[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_a_version_is_a_number(stub: Stub) -> None:
    wrong = simple_request(model_version="wrong_specification")
    code, text = refusal(stub.ModelInfer, wrong)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "failed to get model version from specified version string 'wrong_specification'" in text


def test_what_is_not_served_says_what_to_do(channel: grpc.Channel) -> None:
    for method, word in (
        ("SystemSharedMemoryStatus", "send the data itself"),
        ("CudaSharedMemoryRegister", "send the data itself"),
        ("LogSettings", "phalanx serve"),
        ("TraceSetting", "phalanx serve"),
    ):
        call = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        code, text = refusal(call, b"")
        assert code is grpc.StatusCode.UNIMPLEMENTED and word in text


def damaged(at: int, value: int) -> bytes:
    """A good request with one byte changed, or cut short there."""
    message = simple_request(id="x").SerializeToString()
    at %= len(message)
    return message[:at] + (bytes([value]) + message[at + 1 :] if value < 256 else b"")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["ModelInfer", "ModelStreamInfer", *(method.name for method in SERVICE.methods)]),
    st.binary(max_size=60) | st.builds(damaged, st.integers(0, 1000), st.integers(0, 300)),
)
def test_any_bytes_are_answered_or_refused(channel: grpc.Channel, method: str, message: bytes) -> None:
    path = f"/{SERVICE.full_name}/{method}"
    if method == "ModelStreamInfer":
        [answer] = channel.stream_stream(path)(iter([message]), timeout=20)
        assert pb.ModelStreamInferResponse.FromString(answer).infer_response.parameters
        return
    try:
        channel.unary_unary(path)(message, timeout=20)
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


# --------------------------------------------------------------------------- the language model


def test_text_in_and_out(stub: Stub) -> None:
    response = stub.ModelInfer(text_request("abcd", max_tokens=6, temperature=0.5))
    assert response.id == "7"
    assert outputs_of(response) == {
        "text_output": [b"abcdab"],
        "finish_reason": [b"length"],
        "num_output_tokens": [6],
    }


def test_a_stream_of_tokens(stub: Stub) -> None:
    requests = [text_request("abcd", max_tokens=6), simple_request(id="8"), text_request("a", max_tokens=0)]
    told, failed, finals = [], [], []
    for answer in stub.ModelStreamInfer(iter(requests), timeout=20):
        response = answer.infer_response
        final = response.parameters["triton_final_response"].bool_param
        finals += [final] * final
        if answer.error_message:
            failed.append(answer.error_message)
        elif response.id == "7":
            told.append((outputs_of(response)["text_output"][0], final))
        else:
            assert response.id == "8" and outputs_of(response)["OUTPUT0"][0] == 1 and final
    assert b"".join(text for text, _ in told) == b"abcdab" and len(told) > 1
    assert [final for _, final in told] == [False] * (len(told) - 1) + [True]
    assert len(failed) == 1 and "max_tokens" in failed[0] and len(finals) == 3


def test_a_stream_goes_on_in_the_next_world(cluster: EchoCluster, stub: Stub) -> None:
    text, told = "abcdefgijk", []
    for answer in stub.ModelStreamInfer(iter([text_request(text, max_tokens=600)]), timeout=60):
        assert not answer.error_message
        told.append(outputs_of(answer.infer_response)["text_output"][0])
        if len(told) == 20:
            cluster.kill_world()
            cluster.start_world()
    assert b"".join(told).decode() == text * 60


def test_a_client_that_leaves_ends_its_request(cluster: EchoCluster, stub: Stub) -> None:
    def live() -> int:
        return int(cluster.get("/cluster")[1].split(b'"requests_live":')[1].split(b",")[0])

    call = stub.ModelStreamInfer(iter([text_request("abcd", max_tokens=3000)]), timeout=60)
    next(call)
    cluster.wait(lambda: live() == 1)
    call.cancel()
    cluster.wait(lambda: live() == 0)
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert "Traceback" not in cluster.front_log.read_text()


# --------------------------------------------------------------------------- health, reflection, the port


def test_health_follows_the_world(cluster: EchoCluster, channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING

    def status() -> int:
        return int(health.Check(health_pb2.HealthCheckRequest(service=SERVICE.full_name)).status)

    cluster.wait(lambda: status() == serving)
    cluster.kill_world()
    cluster.wait(lambda: status() != serving)
    assert not Stub(channel).ServerReady(pb.ServerReadyRequest()).ready
    cluster.start_world()
    cluster.wait(lambda: status() == serving)


def test_reflection_describes_the_service(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE.full_name in database.get_services()
    file = database.FindFileContainingSymbol(SERVICE.full_name)
    assert file.package == "inference" and len(file.service[0].method) == len(SERVICE.methods)


def test_the_next_front_has_the_same_port(cluster: EchoCluster, stub: Stub) -> None:
    before = cluster.grpc
    cluster.restart_front()
    assert cluster.grpc == before
    cluster.wait_serving(cluster.epoch)
    response = stub.ModelInfer(text_request("abcd", max_tokens=2), wait_for_ready=True, timeout=20)
    assert outputs_of(response)["text_output"] == [b"ab"]


def test_a_port_that_is_taken_is_had_later(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with EchoCluster(tmp_path, front_options=("--grpc", address)) as cluster:
            cluster.wait_serving(cluster.start_world())
            cluster.wait(lambda: "no gRPC yet" in cluster.front_log.read_text())
            assert cluster.get("/v2/health/ready")[0] == 200 and cluster.states[-1].grpc is None
            taken.close()
            assert cluster.grpc == address


def test_the_module_is_made_from_the_proto_file(tmp_path: Path) -> None:
    """Made with: python -m grpc_tools.protoc -I. --python_out=. gateway/rpc/inference.proto"""
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}"]
    subprocess.run([*command, "gateway/rpc/inference.proto"], cwd=ROOT, check=True)
    made, kept = (
        [
            line
            for line in (root / "gateway/rpc/inference_pb2.py").read_text().splitlines()
            if "Serialized" in line
        ]
        for root in (tmp_path, ROOT)
    )
    assert made == kept and len(kept) == 1
