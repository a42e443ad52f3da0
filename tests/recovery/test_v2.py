"""Streams of the Open Inference Protocol V2, over HTTP and gRPC, while a rank of a real world is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import grpc
import httpx
import pytest

from gateway.inference.tensors import to_raw
from gateway.rpc import inference_pb2 as pb
from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

TEXT, MAX_TOKENS = "abc def ghi", 600


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny", max_model_len=2048)


def over_http(served: Served, pieces: list[str]) -> None:
    body = {"text_input": TEXT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    url = f"{served.url}/v2/models/{served.model}/generate_stream"
    with httpx.stream("POST", url, json=body, timeout=120) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                pieces.append(json.loads(line[6:])["text_output"])


def over_grpc(served: Served, address: str, pieces: list[str]) -> None:
    request = pb.ModelInferRequest(model_name=served.model)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(to_raw("BYTES", [TEXT.encode()]))
    request.parameters["max_tokens"].int64_param = MAX_TOKENS
    request.parameters["temperature"].double_param = 0
    request.parameters["ignore_eos"].bool_param = True
    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        for message in call(iter([request.SerializeToString()]), timeout=120):
            answer = pb.ModelStreamInferResponse.FromString(message)
            assert not answer.error_message, answer.error_message
            pieces.append(answer.infer_response.raw_output_contents[0][4:].decode(errors="replace"))


def test_streams_go_on_when_a_rank_dies(tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--tp", "2", "--dtype", "float32", "--spare", "none", "--kv-cache-memory", "16MiB")
    with Served(str(tiny_model), tmp_path / "run", *flags) as served:
        address = re.search(r"  grpc (\S+)$", served.ready_line)[1]  # type: ignore[index]
        undisturbed: list[str] = []
        over_http(served, undisturbed)
        told: list[list[str]] = [[], []]
        threads = [
            threading.Thread(target=over_http, args=(served, told[0])),
            threading.Thread(target=over_grpc, args=(served, address, told[1])),
        ]
        world = served.active_world()
        for thread in threads:
            thread.start()
        while not all(len(pieces) > 5 for pieces in told):
            assert any(thread.is_alive() for thread in threads)
        os.kill(world["ranks"][1]["pid"], signal.SIGKILL)
        for thread in threads:
            thread.join(120)
        assert served.active_world(above=world["epoch"])["epoch"] > world["epoch"]
        expected = "".join(undisturbed)
        assert ["".join(pieces) for pieces in told] == [expected, expected]
        served.stop()
