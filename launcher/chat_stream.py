"""One streamed answer, read to its end over as many connections as it takes, and what happens to it meanwhile: a
world that is replaced, a front that restarts. Used by `phalanx chat`; prints nothing itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from launcher.errors import LauncherError
from launcher.http_client import NotReached, ServerError, get_json, request

ID_HEADER = "x-phalanx-request-id"
STREAM_TIMEOUT_S = 60.0
"""How long a connection may be silent before it is made anew; a server of ours sends a comment every 5 s."""
OUTAGE_S = 120.0
"""How long a server that does not answer is asked again for an answer that has begun."""
RETRY_S = 0.5
LOOK_AFTER_S = 0.3
"""After so long without a token the cluster is asked why."""


class AnswerStream:
    """`tell` is called, from another thread, with what a person should know while no token comes."""

    def __init__(
        self, url: str, body: dict[str, Any], api_key: str | None, tell: Callable[[str], None]
    ) -> None:
        self._url = url
        self._body = body
        self._api_key = api_key
        self._tell = tell
        self._key = uuid.uuid4().hex
        self._id: str | None = None
        self._last_event: str | None = None
        self._first_at: float | None = None
        self._last_at = 0.0
        self._heard_at = time.monotonic()
        self.num_tokens = 0

    @property
    def speed(self) -> float | None:
        """Tokens per second behind the first; None while that cannot be said."""
        if self._first_at is None or self.num_tokens < 2 or self._last_at <= self._first_at:
            return None
        return (self.num_tokens - 1) / (self._last_at - self._first_at)

    def pieces(self) -> Iterator[str]:
        """The pieces of text. Raises LauncherError for what no further attempt mends."""
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        watcher.start()
        try:
            yield from self._read()
        finally:
            ended.set()
            watcher.join(timeout=1.0)

    def cancel(self) -> None:
        """The server shall not go on with it."""
        if self._id is not None:
            with contextlib.suppress(LauncherError):
                request(self._url, f"/v1/requests/{self._id}", api_key=self._api_key, method="DELETE").close()

    def _read(self) -> Iterator[str]:
        broken_at: float | None = None
        while True:
            try:
                with self._open() as stream:
                    self._id = stream.headers.get(ID_HEADER) or self._id
                    if stream.status == 204:
                        return
                    if broken_at is not None and self._id is not None:
                        self._tell("taken up again")
                    broken_at = None
                    yield from self._texts(stream)
                    if self._is_done:
                        return
                reason = "the connection was closed"
                if self._id is None:  # not one of our servers: there is nothing to take up
                    raise LauncherError("the stream broke off")
            except ServerError as error:
                if error.status < 500 or (self._id is None and error.status != 503):
                    raise
                reason = str(error)
            except NotReached as error:
                if self._id is None:
                    raise
                reason = str(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if self._id is None:
                    raise LauncherError(f"the stream broke off ({error or type(error).__name__})") from None
                reason = str(error) or type(error).__name__
            now = time.monotonic()
            if broken_at is None:
                broken_at = now
                self._tell(f"the stream stopped ({reason}); taking it up again")
            elif now - broken_at > OUTAGE_S:
                raise LauncherError(f"gave up after {OUTAGE_S:g} s: {reason}")
            time.sleep(RETRY_S)

    def _open(self) -> http.client.HTTPResponse:
        if self._id is None:
            headers = {"Idempotency-Key": self._key}
            path, body = "/v1/chat/completions", self._body
            return request(self._url, path, body, STREAM_TIMEOUT_S, api_key=self._api_key, headers=headers)
        headers = {"Last-Event-ID": self._last_event} if self._last_event else {}
        path = f"/v1/requests/{self._id}/stream"
        return request(self._url, path, None, STREAM_TIMEOUT_S, api_key=self._api_key, headers=headers)

    def _texts(self, stream: http.client.HTTPResponse) -> Iterator[str]:
        self._is_done = False
        for line in stream:
            if line.startswith(b"id:"):
                event_id = line[3:].strip().decode()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self._is_done = True
                return
            chunk = json.loads(data)
            if "error" in chunk:
                error = chunk["error"]
                raise LauncherError(str(error.get("message", error) if isinstance(error, dict) else error))
            if chunk.get("usage"):
                self.num_tokens = int(chunk["usage"]["completion_tokens"])
            for choice in chunk.get("choices", []):
                if text := choice.get("delta", {}).get("content"):
                    self._heard_at = self._last_at = time.monotonic()
                    self._first_at = self._first_at or self._last_at
                    yield text
            if self._id is not None:
                self._last_event = event_id

    # ----------------------------------------------------------------------- what happens meanwhile

    def _watch(self, ended: threading.Event) -> None:
        """Says that a world was lost, and that the next one took over, as /cluster shows it."""
        known = self._faults()
        told: tuple[int, float] | None = None
        while known is not None and not ended.wait(0.1):
            if told is None and time.monotonic() - self._heard_at < LOOK_AFTER_S:
                continue
            faults = self._faults() or {}
            if told is not None:
                fault = faults.get(told)
                if fault is not None and fault.get("recover_s") is not None:
                    self._tell(f"the next world took over after {fault['recover_s']:.2f} s; going on")
                    told = None
            for key in [key for key in faults if key not in known]:
                known[key] = fault = faults[key]
                self._tell(f"world {fault['epoch']} died ({fault['detail']}); it is being replaced")
                told = key
            self._heard_at = time.monotonic()

    def _faults(self) -> dict[tuple[int, float], dict[str, Any]] | None:
        """The last faults of worlds that served; None where there is no /cluster to ask."""
        try:
            faults = get_json(self._url, "/cluster", api_key=self._api_key).get("faults", [])
        except (LauncherError, AttributeError):
            return None
        return {
            (fault["epoch"], fault["at"]): fault
            for fault in faults
            if not str(fault["detail"]).startswith("spare: ")
        }
