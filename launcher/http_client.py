"""The few HTTP calls of the commands that talk to a server, over the standard library. Must turn every failure into
one line that names the next step."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any, cast

from launcher.errors import LauncherError

KEY_VARIABLES = ("PHALANX_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the key, where --api-key is not given: ours, and the one of OpenAI's own clients."""


class ServerError(LauncherError):
    """The server answered with an error."""

    def __init__(self, text: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.retry_after_s = retry_after_s


class NotReached(LauncherError):
    """Nothing answered."""


def key_or_default(api_key: str | None) -> str | None:
    """The key that was given, or the environment's."""
    return api_key or next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)


def base_url(url: str) -> str:
    """The server's address, also if it was given as OpenAI's clients want it, with /v1."""
    return url.rstrip("/").removesuffix("/v1")


def request(
    url: str,
    path: str,
    body: object = None,
    timeout_s: float = 10.0,
    *,
    api_key: str | None = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> http.client.HTTPResponse:
    """The open answer of GET, or of POST with a JSON body. Raises ServerError, NotReached, LauncherError."""
    address = base_url(url) + path
    data = None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    if api_key:
        sent["Authorization"] = f"Bearer {api_key}"
    try:
        call = urllib.request.Request(address, data, sent, method=method)
        return cast(http.client.HTTPResponse, urllib.request.urlopen(call, timeout=timeout_s))
    except urllib.error.HTTPError as error:
        said = reason_of(error.read())
        text = f"{address}: {error.code} {_why_no_key(api_key) if error.code == 401 else said}"
        raise ServerError(text, error.code, _seconds(error.headers.get("retry-after"))) from None
    except ValueError:
        raise LauncherError(f"--url {url}: not a URL; write it like http://127.0.0.1:8000") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NotReached(f"{url} does not answer ({reason}); is `phalanx serve` running there?") from None


def get_json(url: str, path: str, *, api_key: str | None = None) -> Any:
    """The JSON of a GET. Raises LauncherError."""
    with request(url, path, api_key=api_key) as answer:
        try:
            return json.load(answer)
        except (ValueError, OSError) as error:
            raise LauncherError(f"{url}{path} did not answer with JSON ({error})") from None


def first_model(url: str, api_key: str | None = None) -> str:
    """The model that the server serves; of several the first. Raises LauncherError."""
    models = get_json(url, "/v1/models", api_key=api_key).get("data", [])
    if not models:
        raise LauncherError(f"{url} serves no model")
    return str(models[0]["id"])


def check_key(url: str, api_key: str | None) -> None:
    """Raises LauncherError if nothing answers, or wants another key. Servers that list no models pass."""
    try:
        request(url, "/v1/models", api_key=api_key).close()
    except ServerError as error:
        if error.status in (401, 403):
            raise


def _why_no_key(api_key: str | None) -> str:
    """In the words of whoever typed the command; the server's are for those who write programs."""
    if api_key:
        return (
            "the server does not know this API key; correct --api-key, or PHALANX_API_KEY or OPENAI_API_KEY"
        )
    return "the server wants an API key; give one with --api-key or in PHALANX_API_KEY"


def reason_of(body: bytes) -> str:
    """The message in the body of an error."""
    try:
        content = json.loads(body)
        error = content["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200]


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # a date
        return None
