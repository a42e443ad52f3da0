"""Errors as OpenAI's clients expect them: a status and {"error": {message, type, param, code}}.

Raised anywhere under gateway/http; app.py turns them into responses.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from gateway.errors import RequestFailed
from gateway.protocol import ErrorCode

RETRY_OVERLOADED_S = 1
RETRY_UNAVAILABLE_S = 5


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, also sent inside a stream that has begun."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body())

    def encoded_v2(self) -> bytes:
        """The body under /v2, as the Open Inference Protocol has it."""
        return msgspec.json.encode({"error": self.message})

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
            headers["retry-after-ms"] = str(self.retry_after_s * 1000)
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers


def from_failure(error: RequestFailed) -> ApiError:
    """How a request that the front or the engine refused or gave up looks over HTTP."""
    code: ErrorCode = error.code
    if code == "invalid_request":
        return ApiError(400, error.message, code=code)
    if code == "overloaded":
        wait_s = RETRY_OVERLOADED_S if error.retry_after_s is None else math.ceil(error.retry_after_s)
        return ApiError(
            429, error.message, type="rate_limit_error", code=code, retry_after_s=wait_s, should_retry=True
        )
    if code == "unavailable":
        wait_s = RETRY_UNAVAILABLE_S
        return ApiError(
            503,
            error.message,
            type="service_unavailable",
            code=code,
            retry_after_s=wait_s,
            should_retry=True,
        )
    if code == "timeout":
        # The SDK would try a 408 again: what the client did not want to wait for any longer.
        return ApiError(408, error.message, type="timeout_error", code=code, should_retry=False)
    # What ended worlds is not tried again, least of all by an SDK on its own.
    should_retry = False if code == "poisoned" else None
    return ApiError(500, error.message, type="server_error", code=code, should_retry=should_retry)
