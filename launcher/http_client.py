"""The few HTTP calls of `status` and `chat`, over the standard library. Must turn every failure into one line
that names the next step."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, cast

from launcher.errors import LauncherError


def request(url: str, path: str, body: object = None, timeout_s: float = 10.0) -> http.client.HTTPResponse:
    """The open answer of GET, or of POST with a JSON body. Raises LauncherError."""
    address = url.rstrip("/") + path
    data = None if body is None else json.dumps(body).encode()
    try:
        call = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        return cast(http.client.HTTPResponse, urllib.request.urlopen(call, timeout=timeout_s))
    except urllib.error.HTTPError as error:
        raise LauncherError(f"{address}: {error.code} {_reason(error.read())}") from None
    except ValueError:
        raise LauncherError(f"--url {url}: not a URL; write it like http://127.0.0.1:8000") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise LauncherError(f"{url} does not answer ({reason}); is `phalanx serve` running there?") from None


def get_json(url: str, path: str) -> Any:
    """The JSON of a GET. Raises LauncherError."""
    with request(url, path) as answer:
        try:
            return json.load(answer)
        except (ValueError, OSError) as error:
            raise LauncherError(f"{url}{path} did not answer with JSON ({error})") from None


def _reason(body: bytes) -> str:
    try:
        content = json.loads(body)
        error = content["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:200]
