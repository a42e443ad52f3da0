"""The exceptions of the gateway's side: few classes, each message tells the caller the next step.

Raised by rank0, client, text and front; imports only the protocol.
"""

from __future__ import annotations

from gateway.protocol import ErrorCode


class GatewayError(Exception):
    """Base of all errors that `gateway` raises on its own account."""


class EndpointError(GatewayError):
    """A ZeroMQ endpoint that cannot be bound or connected: malformed, in use, or not of this host."""


class ConnectionLost(GatewayError):
    """The server did not answer, answers no more, or does not know this connection; requests in flight on it
    are gone. Connect again; a request may be submitted again with the tokens received so far as
    `output_token_ids`."""


class RequestTimeout(GatewayError, TimeoutError):
    """A request brought no token within the time that the caller allowed. It was cancelled."""


class RequestFailed(GatewayError):
    """The server refused or gave up a request. `code` says whose fault it is, see protocol.ErrorCode.
    `retry_after_s`: when a request that was refused as "overloaded" may be tried again."""

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class ModelFilesError(GatewayError):
    """A tokenizer, chat template or generation config that is missing or cannot be used; names the file."""
