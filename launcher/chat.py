"""`phalanx chat`: a conversation in the terminal, streamed over HTTP. Ctrl-C stops an answer, Ctrl-D
leaves."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from typing import Any

from launcher.errors import LauncherError
from launcher.http_client import get_json, request

_STREAM_TIMEOUT_S = 300.0
"""How long a stream may be silent. A world that has to be replaced in mid-answer takes a part of it."""


def chat(url: str, model: str | None, system: str | None, max_tokens: int, temperature: float) -> int:
    """Talks until Ctrl-D. Raises LauncherError if nothing answers at the start."""
    if model is None:
        models = get_json(url, "/v1/models").get("data", [])
        if not models:
            raise LauncherError(f"{url} serves no model")
        model = str(models[0]["id"])
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history

    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{model} at {url}. Ctrl-C stops an answer, Ctrl-D leaves.")
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            question = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        answer = _answer(url, body)
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()  # neither question nor answer shall confuse what follows


def _answer(url: str, body: dict[str, Any]) -> str:
    """Prints the answer as it comes, and returns what came of it, if Ctrl-C stopped it too."""
    parts: list[str] = []
    try:
        with request(url, "/v1/chat/completions", body, _STREAM_TIMEOUT_S) as stream:
            for text in stream_text(stream):
                parts.append(text)
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        pass  # closing the connection cancels the request
    except LauncherError as error:
        print(f"phalanx: error: {error}", file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        print(f"\nphalanx: error: the stream broke off ({error})", file=sys.stderr)
    print()
    return "".join(parts)


def stream_text(stream: http.client.HTTPResponse) -> Iterator[str]:
    """The pieces of text in a stream of server-sent events. Raises LauncherError for an error in it."""
    for line in stream:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            error = chunk["error"]
            raise LauncherError(str(error.get("message", error) if isinstance(error, dict) else error))
        for choice in chunk.get("choices", []):
            if content := choice.get("delta", {}).get("content"):
                yield content
