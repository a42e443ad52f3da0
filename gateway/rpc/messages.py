"""Between the messages of inference.proto and what models read and answer. Used by service.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.http.errors import ApiError
from gateway.inference.models import VERSION, InferRequest, refuse_unserved
from gateway.inference.tensors import BYTES, GivenTensor, Tensor, to_raw
from gateway.rpc import inference_pb2 as pb

FINAL = "triton_final_response"
"""The parameter of a stream's response that says whether it is the last to its request."""

_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


def read_request(message: Any) -> InferRequest:
    """Of a ModelInferRequest. Raises ApiError."""
    raws = message.raw_input_contents
    if raws and len(raws) != len(message.inputs):
        text = f"raw_input_contents has {len(raws)} elements, there are {len(message.inputs)} inputs"
        raise ApiError(400, f"{text}; give one for each, or none")
    parameters = _parameters(message.parameters)
    refuse_unserved(parameters, "the request")
    inputs = []
    for index, tensor in enumerate(message.inputs):
        refuse_unserved(_parameters(tensor.parameters), f"input '{tensor.name}'")
        shape = list(tensor.shape)
        if not raws:
            data = _contents(tensor)
            inputs.append(GivenTensor(tensor.name, tensor.datatype, shape, data=data))
        elif tensor.HasField("contents"):
            text = f"input '{tensor.name}' has contents beside raw_input_contents; allowed: one of them"
            raise ApiError(400, text)
        else:
            inputs.append(GivenTensor(tensor.name, tensor.datatype, shape, raw=raws[index]))
    for output in message.outputs:
        refuse_unserved(_parameters(output.parameters), f"output '{output.name}'")
    return InferRequest(inputs, message.id, parameters, [output.name for output in message.outputs])


def answer(model: str, request_id: str, outputs: Sequence[Tensor]) -> Any:
    """A ModelInferResponse; its tensors are raw, as Triton's are."""
    response = pb.ModelInferResponse(model_name=model, model_version=VERSION, id=request_id)
    for tensor in outputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(to_raw(tensor.datatype, tensor.values))
    return response


def _contents(tensor: Any) -> list[Any]:
    name = _CONTENTS.get(tensor.datatype)
    if name is None:
        text = f"input '{tensor.name}': datatype {tensor.datatype[:20]!r} has no typed contents"
        raise ApiError(400, f"{text}; allowed: {', '.join(_CONTENTS)}, or raw_input_contents")
    return list(getattr(tensor.contents, name))


def _parameters(messages: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: getattr(message, choice)
        for name, message in messages.items()
        if (choice := message.WhichOneof("parameter_choice")) is not None
    }
