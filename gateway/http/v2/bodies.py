"""Bodies of `infer` in the Open Inference Protocol V2: JSON, and JSON with binary tensors behind it.

The binary extension puts the bytes of tensors behind the JSON, in their order; the header
Inference-Header-Content-Length says where the JSON ends. Used by routes.py alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from gateway.http.errors import ApiError
from gateway.http.schema import decode_body
from gateway.inference.models import VERSION, InferRequest, ModelSpec, refuse_unserved
from gateway.inference.tensors import BYTES, GivenTensor, Tensor, to_raw

HEADER_LENGTH = "inference-header-content-length"
Parameters = dict[str, Any]
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class InputBody(Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters | None = None
    data: Any = UNSET


class OutputBody(Struct):
    name: str
    parameters: Parameters | None = None


class InferBody(Struct):
    inputs: list[InputBody]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[OutputBody] | None = None


class GenerateBody(Struct):
    """What has a meaning for every model; other fields are parameters."""

    text_input: str | list[str]
    id: str | None = None
    parameters: Parameters | None = None


@dataclass(frozen=True)
class Wishes:
    """Which outputs the client wants as bytes."""

    by_default: bool = False
    by_name: Mapping[str, bool] = field(default_factory=dict)

    def binary(self, name: str) -> bool:
        return self.by_name.get(name, self.by_default)


def read_infer(body: bytes, header_length: str | None, spec: ModelSpec) -> tuple[InferRequest, Wishes]:
    """A request for a model. Raises ApiError."""
    if header_length is None:
        head, tail = body, b""
    else:
        length = _header_length(header_length, len(body))
        if length == 0:
            return _raw_request(body, spec), Wishes(by_default=True)
        head, tail = body[:length], body[length:]
    request = decode_body(head, InferBody)
    refuse_unserved(request.parameters, "the request")
    inputs = _inputs(request.inputs, tail)
    outputs = request.outputs or []
    for output in outputs:
        refuse_unserved(output.parameters, f"output '{output.name}'")
    by_name = {
        output.name: wish
        for output in outputs
        if (wish := _flag(output.parameters, "binary_data")) is not None
    }
    wishes = Wishes(bool(_flag(request.parameters, "binary_data_output")), by_name)
    names = [output.name for output in outputs]
    return InferRequest(inputs, request.id or "", request.parameters or {}, names), wishes


def read_generate(body: bytes) -> InferRequest:
    """A request for a language model. Raises ApiError."""
    request = decode_body(body, GenerateBody)
    fields = decode_body_fields(body)
    for name in GenerateBody.__struct_fields__:
        fields.pop(name, None)
    texts = [request.text_input] if isinstance(request.text_input, str) else request.text_input
    given = GivenTensor("text_input", BYTES, [len(texts)], data=texts)
    return InferRequest([given], request.id or "", {**fields, **(request.parameters or {})})


def decode_body_fields(body: bytes) -> dict[str, Any]:
    """All fields of a body that decode_body has accepted."""
    fields: dict[str, Any] = msgspec.json.decode(body)
    return fields


def infer_answer(
    name: str, request: InferRequest, outputs: Sequence[Tensor], wishes: Wishes
) -> tuple[bytes, dict[str, str]]:
    """Body and headers. Raises ApiError for bytes that JSON cannot hold."""
    shown, tail = [], []
    for tensor in outputs:
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if wishes.binary(tensor.name):
            raw = to_raw(tensor.datatype, tensor.values)
            described["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            described["data"] = json_values(tensor)
        shown.append(described)
    head = msgspec.json.encode({**answer_head(name, request), "outputs": shown})
    if not tail:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join([head, *tail]), headers


def generate_answer(name: str, request: InferRequest, outputs: Sequence[Tensor]) -> bytes:
    """The JSON object of one response: an output of one element is no list."""
    answer = answer_head(name, request)
    for tensor in outputs:
        values = json_values(tensor)
        answer[tensor.name] = values[0] if len(values) == 1 else values
    return msgspec.json.encode(answer)


def answer_head(name: str, request: InferRequest) -> dict[str, Any]:
    head = {"model_name": name, "model_version": VERSION}
    return {"id": request.id, **head} if request.id else head


def json_values(tensor: Tensor) -> list[Any]:
    """Raises ApiError for bytes that are no text."""
    if tensor.datatype != BYTES:
        return tensor.values
    try:
        return [value.decode() for value in tensor.values]
    except UnicodeDecodeError:
        text = f"output '{tensor.name}' is not valid UTF-8, so that JSON cannot hold it"
        raise ApiError(400, f"{text}; ask for it with binary_data: true") from None


def decompress(body: bytes, encoding: str, most: int) -> bytes:
    """A body with this Content-Encoding. Raises ApiError; never makes more than `most` bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise ApiError(415, f"Content-Encoding is {encoding[:20]!r}; allowed: gzip, deflate, identity")
    try:
        stream = zlib.decompressobj(_WINDOW_BITS[encoding])
        found = stream.decompress(body, most + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not valid {encoding}: {error}") from None
    if len(found) > most:
        raise ApiError(
            413, f"the body is longer than {most} bytes when it is unpacked", code="body_too_large"
        )
    if not stream.eof or stream.unused_data:
        raise ApiError(400, f"the body is not one whole piece of {encoding}")
    return found


def _header_length(text: str, body_size: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= body_size):
        problem = f"Inference-Header-Content-Length is {text[:20]!r}"
        raise ApiError(400, f"{problem}; allowed: 0 to the length of the body, here {body_size}")
    return int(text)


def _raw_request(body: bytes, spec: ModelSpec) -> InferRequest:
    """The whole body is the one element of the model's one input."""
    needed = [tensor for tensor in spec.inputs if not tensor.optional]
    if len(needed) != 1 or needed[0].datatype != BYTES:
        text = f"a raw binary request goes to a model with one input of BYTES; model '{spec.name}' has another form"
        raise ApiError(400, text)
    shape = [1] * len(needed[0].shape)
    return InferRequest([GivenTensor(needed[0].name, BYTES, shape, data=[body])])


def _inputs(bodies: list[InputBody], tail: bytes) -> list[GivenTensor]:
    inputs, at = [], 0
    for body in bodies:
        where = f"input '{body.name}'"
        refuse_unserved(body.parameters, where)
        size = (body.parameters or {}).get("binary_data_size")
        if size is None:
            if body.data is UNSET:
                raise ApiError(400, f"{where} has neither data nor binary_data_size")
            inputs.append(GivenTensor(body.name, body.datatype, body.shape, data=body.data))
            continue
        if body.data is not UNSET:
            raise ApiError(400, f"{where} has both data and binary_data_size; allowed: one of them")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(tail) - at:
            text = f"{where}: binary_data_size is {str(size)[:20]}"
            raise ApiError(400, f"{text}; allowed: 0 to {len(tail) - at}, what the body has left")
        inputs.append(GivenTensor(body.name, body.datatype, body.shape, raw=tail[at : at + size]))
        at += size
    if at != len(tail):
        raise ApiError(400, f"{len(tail) - at} bytes of the body belong to no input")
    return inputs


def _flag(parameters: Parameters | None, name: str) -> bool | None:
    value = (parameters or {}).get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} is {str(value)[:20]!r}; allowed: true, false")
    return value
