"""inference.GRPCInferenceService: each method turns its message into a question to the repository and back.

Made by server.py. Messages are parsed here, so that bytes that are none are the client's error, not the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError

from gateway.http.errors import ApiError
from gateway.inference.models import NO_SETTINGS, NO_SHARED_MEMORY
from gateway.inference.repository import Repository, server_metadata
from gateway.log import Logger
from gateway.rpc import inference_pb2 as pb
from gateway.rpc.messages import FINAL, answer, read_request

SERVICE: str = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
MAX_REQUESTS_OF_A_STREAM = 64
"""That run at once; the next is read when one of them has ended."""

_CODES = {
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_VERBS = ("Status", "Register", "Unregister")
_UNSERVED = {
    **{f"{kind}SharedMemory{verb}": NO_SHARED_MEMORY for kind in ("System", "Cuda") for verb in _VERBS},
    "TraceSetting": NO_SETTINGS,
    "LogSettings": NO_SETTINGS,
}
"""Methods of Triton's extensions that are not served, and what their callers are told."""
_FAILED = "the server failed; its log says why"

Unary = Callable[[Any], Awaitable[Any]]
Context = Any


def code_of(error: ApiError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    if error.status in _CODES:
        return _CODES[error.status]
    return grpc.StatusCode.INVALID_ARGUMENT if error.status < 500 else grpc.StatusCode.INTERNAL


class InferenceService:
    """The methods, see inference.proto."""

    def __init__(self, repository: Repository, log: Logger) -> None:
        self._repository = repository
        self._log = log

    def handler(self) -> grpc.GenericRpcHandler:
        """For `add_generic_rpc_handlers`."""
        methods: dict[str, tuple[type[Any], Unary]] = {
            "ServerLive": (pb.ServerLiveRequest, self.server_live),
            "ServerReady": (pb.ServerReadyRequest, self.server_ready),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self.model_metadata),
            "ModelInfer": (pb.ModelInferRequest, self.model_infer),
            "ModelConfig": (pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self.load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self.unload),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(kind, method))
            for name, (kind, method) in methods.items()
        }
        for name, text in _UNSERVED.items():
            handlers[name] = grpc.unary_unary_rpc_method_handler(_refusal(text))
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.model_stream_infer)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    # ----------------------------------------------------------------------- server and repository

    async def server_live(self, request: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._repository.is_ready)

    async def server_metadata(self, request: Any) -> Any:
        return pb.ServerMetadataResponse(**server_metadata())

    async def repository_index(self, request: Any) -> Any:
        models = self._repository.index(only_ready=request.ready)
        return pb.RepositoryIndexResponse(models=models)

    async def load(self, request: Any) -> Any:
        self._repository.load(request.model_name, with_parameters=bool(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def unload(self, request: Any) -> Any:
        self._repository.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    # ----------------------------------------------------------------------- models

    async def model_ready(self, request: Any) -> Any:
        ready = self._repository.is_model_ready(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready)

    async def model_metadata(self, request: Any) -> Any:
        spec = self._repository.find(request.name, request.version).spec
        return pb.ModelMetadataResponse(**spec.metadata)

    async def model_config(self, request: Any) -> Any:
        spec = self._repository.find(request.name, request.version).spec
        return ParseDict({"config": spec.config}, pb.ModelConfigResponse())

    async def model_statistics(self, request: Any) -> Any:
        found = self._repository.statistics(request.name, request.version)
        return pb.ModelStatisticsResponse(**found)

    async def model_infer(self, request: Any) -> Any:
        asked = read_request(request)
        outputs = await self._repository.infer(request.model_name, request.model_version, asked)
        return answer(request.model_name, request.id, outputs)

    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Requests of one stream run side by side; each has its responses in their order, the last of them marked.
        An error is a response, too, and ends nothing but its request."""
        room = asyncio.Semaphore(MAX_REQUESTS_OF_A_STREAM)
        writing = asyncio.Lock()

        async def write(response: Any) -> None:
            async with writing:
                await context.write(response.SerializeToString())

        client_gone = False
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in requests:
                    await room.acquire()
                    task = tasks.create_task(self._answer_in_stream(message, write))
                    task.add_done_callback(lambda _: room.release())
        except* grpc.aio.InternalError:
            client_gone = True
        if client_gone:
            raise asyncio.CancelledError  # what the library makes of it when it is the first to know

    # ----------------------------------------------------------------------- inside

    async def _answer_in_stream(self, message: bytes, write: Unary) -> None:
        request = pb.ModelInferRequest()
        try:
            _parse(request, message)
            asked = read_request(request)
            name, version = request.model_name, request.model_version
            async with contextlib.aclosing(self._repository.stream(name, version, asked)) as parts:
                async for part in parts:
                    if part is not None:
                        response = answer(name, request.id, part.outputs)
                        response.parameters[FINAL].bool_param = part.is_last
                        await write(pb.ModelStreamInferResponse(infer_response=response))
        except ApiError as error:
            await write(_stream_error(request, error.message))
        except grpc.aio.InternalError:
            raise  # the client is gone
        except Exception as error:
            self._log.error("grpc", method="ModelStreamInfer", exc_info=error)
            await write(_stream_error(request, _FAILED))

    def _guarded(self, kind: type[Any], method: Unary) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """A method of bytes, whose errors have their status."""

        async def call(message: bytes, context: Context) -> bytes:
            request = kind()
            try:
                _parse(request, message)
                response = await method(request)
                return bytes(response.SerializeToString())
            except ApiError as error:
                code, text = code_of(error), error.message
            except Exception as error:
                self._log.error("grpc", method=method.__name__, exc_info=error)
                code, text = grpc.StatusCode.INTERNAL, _FAILED
            await context.abort(code, text)
            raise AssertionError("abort raises")

        return call


def _refusal(text: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def call(message: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
        raise AssertionError("abort raises")

    return call


def _parse(message: Any, data: bytes) -> None:
    """Raises ApiError."""
    try:
        message.ParseFromString(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the bytes are no {message.DESCRIPTOR.name}: {error}") from None


def _stream_error(request: Any, text: str) -> Any:
    response = answer(request.model_name, request.id, [])
    response.parameters[FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=text, infer_response=response)
