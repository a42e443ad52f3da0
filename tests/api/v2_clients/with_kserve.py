"""Uses the kserve package's clients as its users do, against a server that runs. Started by test_v2_clients.py in an
environment of its own; fails with an AssertionError.

Arguments: host:port of HTTP, host:port of gRPC, name of the language model."""

from __future__ import annotations

import asyncio
import sys

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

FIRST = np.arange(16, dtype=np.int32).reshape(1, 16)
SECOND = np.ones((1, 16), dtype=np.int32)


def simple_request(name: str, binary: bool) -> InferRequest:
    inputs = [InferInput("INPUT0", [1, 16], "INT32"), InferInput("INPUT1", [1, 16], "INT32")]
    inputs[0].set_data_from_numpy(FIRST, binary_data=binary)
    inputs[1].set_data_from_numpy(SECOND, binary_data=binary)
    return InferRequest(model_name=name, infer_inputs=inputs, request_id="17")


def text_request(model: str) -> InferRequest:
    given = InferInput("text_input", [1], "BYTES", data=["Once upon a time"])
    parameters = {"max_tokens": 12, "temperature": 0}
    return InferRequest(model_name=model, infer_inputs=[given], parameters=parameters)


def check_simple(response: object) -> None:
    found = {output.name: output.as_numpy() for output in response.outputs}
    assert response.id == "17"
    assert (found["OUTPUT0"] == FIRST + SECOND).all() and (found["OUTPUT1"] == FIRST - SECOND).all()


def text_of(response: object) -> str:
    [value] = next(out for out in response.outputs if out.name == "text_output").as_numpy()
    return value.decode() if isinstance(value, bytes) else str(value)


async def over_rest(url: str, model: str) -> str:
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
        assert await client.is_server_live(url) and await client.is_server_ready(url)
        assert await client.is_model_ready(url, model)
        for binary in (True, False):
            check_simple(await client.infer(url, simple_request("simple", binary), model_name="simple"))
        try:
            await client.infer(url, simple_request("nothing", False), model_name="nothing")
        except httpx.HTTPStatusError as error:
            assert "unknown model" in str(error)
        else:
            raise AssertionError("it was not refused")
        return text_of(await client.infer(url, text_request(model), model_name=model))


async def over_grpc(address: str, model: str) -> str:
    async with InferenceGRPCClient(address, timeout=60) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready(model)
        for binary in (True, False):
            check_simple(await client.infer(simple_request("simple", binary)))
        try:
            await client.infer(simple_request("nothing", True))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND
        else:
            raise AssertionError("it was not refused")
        return text_of(await client.infer(text_request(model)))


async def main() -> None:
    http_address, grpc_address, model = sys.argv[1:]
    told = await over_rest(f"http://{http_address}", model)
    assert told == await over_grpc(grpc_address, model), told


if __name__ == "__main__":
    asyncio.run(main())
