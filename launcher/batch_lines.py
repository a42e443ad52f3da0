"""The files of `phalanx batch run`: requests in, answers out, in the format of OpenAI's batches. Reads and writes;
asks nobody."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from launcher.errors import LauncherError, SettingsError

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/rerank",
    "/v1/score",
)


@dataclass(frozen=True)
class Line:
    """One request."""

    custom_id: str
    path: str
    body: dict[str, Any]

    def key(self, salt: str) -> str:
        """The same for the same line of the same batch: a run that goes on finds what an earlier one asked."""
        content = json.dumps([salt, self.custom_id, self.path, self.body], sort_keys=True)
        return "batch-" + hashlib.sha256(content.encode()).hexdigest()[:40]


def read_lines(path: Path) -> list[Line]:
    """All requests of a file. Raises SettingsError that names the line."""
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        line = _line(f"{path}:{number}", text)
        if line.custom_id in seen:
            first = seen[line.custom_id]
            raise SettingsError(f"{path}:{number}: custom_id {line.custom_id!r} is that of line {first}, too")
        seen[line.custom_id] = number
        lines.append(line)
    if not lines:
        raise SettingsError(f"{path}: it holds no request")
    return lines


def _line(where: str, text: str) -> Line:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{where}: must be an object with custom_id, method, url and body")
    custom_id, path, body = content.get("custom_id"), content.get("url"), content.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise SettingsError(f"{where}: custom_id must be a text that names the line")
    if content.get("method", "POST") != "POST":
        raise SettingsError(f"{where}: method {content['method']!r}: must be POST")
    if path not in PATHS:
        raise SettingsError(f"{where}: url {path!r}: must be one of {', '.join(PATHS)}")
    if not isinstance(body, dict):
        raise SettingsError(f"{where}: body must be an object")
    if body.get("stream"):
        raise SettingsError(f"{where}: stream is not for batches; leave it out")
    return Line(custom_id, str(path), body)


def open_output(path: Path) -> tuple[TextIO, set[str]]:
    """The file of answers, at its end, and the lines that it answers already; a line that was cut off when an earlier
    run was killed is taken out. Raises LauncherError."""
    done: set[str] = set()
    try:
        file = path.open("a+b")
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            entry = json.loads(line)
            if entry["response"]["status_code"] == 200:
                done.add(entry["custom_id"])
        file.truncate(len(whole))
        file.close()
        return path.open("a"), done
    except OSError as error:
        raise LauncherError(f"--output {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        text = f"--output {path}: it is there, and no output of a batch; name another file"
        raise SettingsError(text) from None


def answer_line(line: Line, request_id: str, body: Any) -> str:
    """One line of the file of answers."""
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return _encode(line, response, None)


def error_line(line: Line, status: int | None, request_id: str, message: str) -> str:
    """One line of the file of errors; `status` is None where no answer came."""
    response = None
    if status is not None:
        response = {"status_code": status, "request_id": request_id, "body": {"error": {"message": message}}}
    code = "request_failed" if status is not None else "no_answer"
    return _encode(line, response, {"code": code, "message": message})


def _encode(line: Line, response: object, error: object) -> str:
    entry = {
        "id": f"batch_req_{os.urandom(12).hex()}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(entry, ensure_ascii=False) + "\n"
