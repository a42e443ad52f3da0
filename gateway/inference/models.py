"""What a model of the Open Inference Protocol V2 is, what it is asked and what it answers.

language_model.py and diagnostic_models.py have the models; repository.py has all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.http.errors import ApiError
from gateway.inference.tensors import BYTES, GivenTensor, Tensor

VERSION = "1"
"""Every model has one version."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model; -1 in `shape` is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """What metadata and configuration say of a model."""

    name: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    """Above 0, the first size of each shape is the batch."""
    decoupled: bool = False
    """Whether a request may have many responses."""

    @property
    def metadata(self) -> dict[str, Any]:
        """The JSON object of `GET /v2/models/NAME`."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": self.platform,
            "inputs": [_tensor_metadata(tensor) for tensor in self.inputs],
            "outputs": [_tensor_metadata(tensor) for tensor in self.outputs],
        }

    @property
    def config(self) -> dict[str, Any]:
        """The JSON object of `GET /v2/models/NAME/config`, as far as it means anything here."""
        return {
            "name": self.name,
            "platform": self.platform,
            "backend": "phalanx",
            "max_batch_size": self.max_batch_size,
            "input": [self._tensor_config(tensor) for tensor in self.inputs],
            "output": [self._tensor_config(tensor) for tensor in self.outputs],
            "model_transaction_policy": {"decoupled": self.decoupled},
        }

    def _tensor_config(self, tensor: TensorSpec) -> dict[str, Any]:
        kind = "STRING" if tensor.datatype == BYTES else tensor.datatype
        dims = tensor.shape[1:] if self.max_batch_size else tensor.shape
        found: dict[str, Any] = {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(dims)}
        if tensor.optional:
            found["optional"] = True
        return found


@dataclass(frozen=True)
class InferRequest:
    """What a client asks of a model."""

    inputs: Sequence[GivenTensor]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    """Names of the outputs that are wanted; none: all of them."""


@dataclass(frozen=True)
class Part:
    """One of the responses to a request."""

    outputs: list[Tensor]
    is_last: bool


class Model(Protocol):
    """A model. Whoever asks may cancel: the request ends then."""

    @property
    def spec(self) -> ModelSpec: ...

    def why_not_ready(self) -> str | None:
        """Why it cannot answer now; None if it can."""

    async def infer(self, request: InferRequest) -> list[Tensor]:
        """All outputs. Raises ApiError."""

    def stream(self, request: InferRequest) -> AsyncGenerator[Part | None, None]:
        """The responses, one by one; None where there has been nothing to say for a while. Raises ApiError."""


def take_inputs(spec: ModelSpec, request: InferRequest) -> dict[str, GivenTensor]:
    """The inputs by name, with the types that the model takes; shapes are the model's business. Raises ApiError."""
    known = {tensor.name: tensor for tensor in spec.inputs}
    found: dict[str, GivenTensor] = {}
    for given in request.inputs:
        wanted = known.get(given.name)
        if wanted is None:
            text = f"unexpected inference input '{given.name[:64]}' for model '{spec.name}'"
            raise ApiError(400, f"{text}; allowed: {', '.join(known)}")
        if given.name in found:
            raise ApiError(400, f"input '{given.name}' for model '{spec.name}' is given twice")
        given.check()
        if given.datatype != wanted.datatype:
            text = f"inference input '{given.name}' has datatype {given.datatype}"
            raise ApiError(400, f"{text}; model '{spec.name}' takes {wanted.datatype}")
        found[given.name] = given
    missing = [name for name, tensor in known.items() if not tensor.optional and name not in found]
    if missing:
        raise ApiError(400, f"model '{spec.name}' needs the input '{missing[0]}', which is missing")
    return found


def check_shape(spec: ModelSpec, given: GivenTensor) -> None:
    """Refuses a shape that the metadata does not allow. Raises ApiError."""
    wanted = next(tensor.shape for tensor in spec.inputs if tensor.name == given.name)
    fits = len(wanted) == len(given.shape)
    fits = fits and all(size in (-1, real) for size, real in zip(wanted, given.shape, strict=True))
    fits = fits and (not spec.max_batch_size or 1 <= given.shape[0] <= spec.max_batch_size)
    if not fits:
        batch = f", with a batch of 1 to {spec.max_batch_size} first" if spec.max_batch_size else ""
        text = f"unexpected shape for input '{given.name}' for model '{spec.name}'"
        raise ApiError(400, f"{text}: got {given.shape}, allowed: {list(wanted)}{batch}")


def choose_outputs(spec: ModelSpec, request: InferRequest, outputs: list[Tensor]) -> list[Tensor]:
    """Those that were asked for, in the order in which they were."""
    if not request.outputs:
        return outputs
    by_name = {tensor.name: tensor for tensor in outputs}
    return [by_name[name] for name in request.outputs]


def check_outputs(spec: ModelSpec, request: InferRequest) -> None:
    """Refuses outputs that the model has not. Raises ApiError."""
    known = [tensor.name for tensor in spec.outputs]
    for number, name in enumerate(request.outputs):
        if name not in known:
            text = f"unexpected inference output '{name[:64]}' for model '{spec.name}'"
            raise ApiError(400, f"{text}; allowed: {', '.join(known)}")
        if name in request.outputs[:number]:
            raise ApiError(400, f"output '{name}' for model '{spec.name}' is asked for twice")


NO_SHARED_MEMORY = "shared memory is not supported by this server; send the data itself"
NO_SETTINGS = (
    "settings of traces and logs are not served here; they are given to `phalanx serve` at its start"
)


def refuse_unserved(parameters: Mapping[str, Any] | None, where: str) -> None:
    """Raises ApiError for parameters that would change the answer and are not served."""
    for name in parameters or {}:
        if name.startswith("shared_memory"):
            raise ApiError(400, f"{where}: {name}: shared memory is not supported; send the data itself")
    if (parameters or {}).get("classification"):
        raise ApiError(400, f"{where}: classification is not supported; leave it out")


def _tensor_metadata(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
