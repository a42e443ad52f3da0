"""Two small models that need no world: with them anybody can see whether a client and this server understand each
other. Their names and shapes are those of the models that Triton's client examples use.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from gateway.http.errors import ApiError
from gateway.inference.models import (
    InferRequest,
    ModelSpec,
    Part,
    TensorSpec,
    check_shape,
    choose_outputs,
    take_inputs,
)
from gateway.inference.tensors import BYTES, Tensor

MAX_BATCH = 8
MAX_ELEMENTS = 65_536
"""Of simple_identity."""
_PLATFORM = "phalanx_diagnostic"


class Simple:
    """OUTPUT0 is INPUT0 + INPUT1, OUTPUT1 is INPUT0 - INPUT1; INT32 [1, 16], up to 8 of them."""

    spec = ModelSpec(
        "simple",
        _PLATFORM,
        (TensorSpec("INPUT0", "INT32", (-1, 16)), TensorSpec("INPUT1", "INT32", (-1, 16))),
        (TensorSpec("OUTPUT0", "INT32", (-1, 16)), TensorSpec("OUTPUT1", "INT32", (-1, 16))),
        max_batch_size=MAX_BATCH,
    )

    def why_not_ready(self) -> str | None:
        return None

    async def infer(self, request: InferRequest) -> list[Tensor]:
        inputs = take_inputs(self.spec, request)
        first, second = inputs["INPUT0"], inputs["INPUT1"]
        check_shape(self.spec, first)
        check_shape(self.spec, second)
        if first.shape != second.shape:
            raise ApiError(400, f"INPUT0 has shape {first.shape}, INPUT1 {second.shape}; they must be equal")
        pairs = list(zip(first.values(), second.values(), strict=True))
        outputs = [
            Tensor("OUTPUT0", "INT32", first.shape, [_wrapped(one + two) for one, two in pairs]),
            Tensor("OUTPUT1", "INT32", first.shape, [_wrapped(one - two) for one, two in pairs]),
        ]
        return choose_outputs(self.spec, request, outputs)

    async def stream(self, request: InferRequest) -> AsyncGenerator[Part | None, None]:
        yield Part(await self.infer(request), is_last=True)


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


def _wrapped(value: int) -> int:
    """As 32 bits hold it."""
    return (value + 2**31) % 2**32 - 2**31
