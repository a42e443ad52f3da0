"""Runs `engine.models.prepare`, which brings the model to this machine, and passes its progress on. Called by
`serve` and `pull` before any world is there; a signal ends it at once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.children import child_environment, python_module
from launcher.errors import LauncherError
from launcher.watch import die_with

END_GRACE_S = 3.0
"""How long it may take to end in order; libraries that download in threads may wait for these."""


@dataclass(frozen=True)
class PreparedModel:
    """A model that lies ready in Hugging Face format."""

    path: Path
    name: str
    dtype: str
    max_model_len: int
    license: str | None = None
    """Of a model of the catalog."""


@dataclass(frozen=True)
class PreparationProgress:
    """`task` is download or import; `total` is None while it is unknown."""

    task: str
    done: int
    total: int | None
    unit: str


class Stopped(Exception):
    """The user ended it."""


class PreparationError(LauncherError):
    """The model cannot be had, or not in this shape; the message is prepare's own."""

    exit_code = 2


class ModelNotHere(PreparationError):
    """It would have to be fetched or imported first."""


def prepare(
    model: str,
    tp: int,
    pp: int,
    dtype: str,
    cache_dir: Path,
    on_progress: Callable[[PreparationProgress], None],
    stop_requested: Callable[[], bool] = lambda: False,
    backend: str = "auto",
    expert_parallel: bool = False,
    fetch: bool = True,
) -> PreparedModel:
    """Downloads and imports as far as needed; without `fetch` it raises ModelNotHere where it would have to. Waits as
    long as that takes, and looks at `stop_requested` ten times a second. Raises PreparationError, or Stopped."""
    command = [*python_module("engine.models.prepare"), model]
    command += ["--tp", str(tp), "--pp", str(pp), "--dtype", dtype, "--cache", str(cache_dir)]
    command += ["--backend", backend]
    if expert_parallel:
        command.append("--expert-parallel")
    if not fetch:
        command.append("--no-fetch")
    with subprocess.Popen(
        command,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # In order, too, if this process is killed: nobody would want its download any more.
        preexec_fn=partial(die_with, os.getpid(), signal.SIGTERM),
    ) as process:
        try:
            return _follow(process, model, on_progress, stop_requested)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """In order at first: it may have a pip of its own, and files that are half made."""
    process.terminate()
    try:
        process.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _follow(
    process: subprocess.Popen[bytes],
    model: str,
    on_progress: Callable[[PreparationProgress], None],
    stop_requested: Callable[[], bool],
) -> PreparedModel:
    assert process.stdout is not None and process.stderr is not None
    outputs = {process.stdout: bytearray(), process.stderr: bytearray()}
    ready: PreparedModel | None = None
    while outputs:
        if stop_requested():
            raise Stopped
        for stream in select.select(list(outputs), [], [], 0.1)[0]:
            chunk = stream.read1(65536)  # type: ignore[attr-defined]
            buffer = outputs[stream]
            buffer += chunk
            if stream is process.stdout:
                *lines, rest = bytes(buffer).split(b"\n")
                buffer[:] = rest
                for line in lines:
                    ready = _on_event(line, on_progress) or ready
            else:
                del buffer[:-8192]
                errors = bytes(buffer)
            if not chunk:
                del outputs[stream]
    code = process.wait()
    if ready is None or code != 0:
        reason = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"it exited with code {code}"]
        raise PreparationError(f"cannot prepare {model}: {reason[0]}")
    return ready


def _on_event(line: bytes, on_progress: Callable[[PreparationProgress], None]) -> PreparedModel | None:
    try:
        event: dict[str, Any] = json.loads(line)
        kind = event["event"]
        if kind == "progress":
            on_progress(
                PreparationProgress(
                    event["task"], int(event["done"]), event.get("total"), event.get("unit", "")
                )
            )
        elif kind == "absent":
            raise ModelNotHere(str(event["message"]))
        elif kind == "error":
            raise PreparationError(str(event["message"]))
        elif kind == "ready":
            return PreparedModel(
                path=Path(event["path"]),
                name=str(event["name"]),
                dtype=str(event["dtype"]),
                max_model_len=int(event["max_model_len"]),
                license=event.get("license"),
            )
    except (ValueError, KeyError, TypeError):
        pass  # a library's own words on standard output
    return None
