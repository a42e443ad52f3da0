"""Small models that need no world: with them anybody can see whether a client and this server understand each other.
Their names and shapes are those of the models that Triton's client examples use.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

from gateway.http.errors import ApiError
from gateway.inference.models import (
    InferRequest,
    Model,
    ModelSpec,
    Part,
    TensorSpec,
    check_shape,
    choose_outputs,
    take_inputs,
)
from gateway.inference.tensors import BYTES, GivenTensor, Tensor

MAX_BATCH = 8
MAX_ELEMENTS = 65_536
"""Of simple_identity."""
_PLATFORM = "phalanx_diagnostic"


class Simple:
    """OUTPUT0 is INPUT0 + INPUT1, OUTPUT1 is INPUT0 - INPUT1; [1, 16], up to 8 of them. Numbers wrap around as those
    of their type do; with BYTES each element is a decimal number of 32 bits."""

    def __init__(self, name: str = "simple", datatype: str = "INT32") -> None:
        """`datatype`: INT32, INT8 or BYTES."""
        tensors = [(TensorSpec(f"{end}PUT{n}", datatype, (-1, 16))) for end in ("IN", "OUT") for n in (0, 1)]
        self.spec = ModelSpec(
            name, _PLATFORM, tuple(tensors[:2]), tuple(tensors[2:]), max_batch_size=MAX_BATCH
        )
        self._wrap = _wrapping(8 if datatype == "INT8" else 32)

    def why_not_ready(self) -> str | None:
        return None

    async def infer(self, request: InferRequest) -> list[Tensor]:
        inputs = take_inputs(self.spec, request)
        first, second = inputs["INPUT0"], inputs["INPUT1"]
        check_shape(self.spec, first)
        check_shape(self.spec, second)
        if first.shape != second.shape:
            raise ApiError(400, f"INPUT0 has shape {first.shape}, INPUT1 {second.shape}; they must be equal")
        pairs = list(zip(self._numbers(first), self._numbers(second), strict=True))
        outputs = [
            self._output("OUTPUT0", first.shape, [self._wrap(one + two) for one, two in pairs]),
            self._output("OUTPUT1", first.shape, [self._wrap(one - two) for one, two in pairs]),
        ]
        return choose_outputs(self.spec, request, outputs)

    async def stream(self, request: InferRequest) -> AsyncGenerator[Part | None, None]:
        yield Part(await self.infer(request), is_last=True)

    def _numbers(self, given: GivenTensor) -> list[int]:
        values = given.values()
        return [_number(given.name, value) for value in values] if given.datatype == BYTES else values

    def _output(self, name: str, shape: list[int], numbers: list[int]) -> Tensor:
        datatype = self.spec.outputs[0].datatype
        values: list[Any] = [str(n).encode() for n in numbers] if datatype == BYTES else numbers
        return Tensor(name, datatype, shape, values)


class SimpleIdentity:
    """OUTPUT0 is INPUT0; BYTES."""

    spec = ModelSpec(
        "simple_identity",
        _PLATFORM,
        (TensorSpec("INPUT0", BYTES, (-1, -1)),),
        (TensorSpec("OUTPUT0", BYTES, (-1, -1)),),
        max_batch_size=MAX_BATCH,
    )

    def why_not_ready(self) -> str | None:
        return None

    async def infer(self, request: InferRequest) -> list[Tensor]:
        given = take_inputs(self.spec, request)["INPUT0"]
        check_shape(self.spec, given)
        if given.num_elements > MAX_ELEMENTS:
            raise ApiError(400, f"INPUT0 has {given.num_elements} elements; allowed: up to {MAX_ELEMENTS}")
        output = Tensor("OUTPUT0", BYTES, given.shape, given.values())
        return choose_outputs(self.spec, request, [output])

    async def stream(self, request: InferRequest) -> AsyncGenerator[Part | None, None]:
        yield Part(await self.infer(request), is_last=True)


def diagnostic_models() -> list[Model]:
    """All of them, as a server has them at its start."""
    return [Simple(), Simple("simple_int8", "INT8"), Simple("simple_string", BYTES), SimpleIdentity()]


def _wrapping(num_bits: int) -> Callable[[int], int]:
    """What so many bits, with a sign, hold of a number."""
    half = 2 ** (num_bits - 1)
    return lambda value: (value + half) % (2 * half) - half


def _number(name: str, text: bytes) -> int:
    if not re.fullmatch(rb"[+-]?[0-9]{1,10}", text) or not -(2**31) <= int(text) < 2**31:
        shown = text[:20].decode(errors="replace")
        raise ApiError(400, f"input '{name}': an element is {shown!r}, which is no decimal number of 32 bits")
    return int(text)
