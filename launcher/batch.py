"""`phalanx batch run FILE`: every request of a file of OpenAI's batch format, against a server that runs or one of
its own. A run that was ended goes on where it was."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from launcher.batch_lines import Line, answer_line, error_line, open_output, read_lines
from launcher.display import Display, choose_display
from launcher.errors import LauncherError, SettingsError
from launcher.http_client import first_model, key_or_default, reason_of
from launcher.http_stream import HttpPool, StreamBroken
from launcher.watch import die_with_parent

RETRIED = (429, 500, 502, 503, 504)
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 15.0


@dataclass(frozen=True)
class Batch:
    """What `phalanx batch run` was asked for."""

    file: Path
    output: Path | None
    url: str
    model: str | None
    serve_arguments: Sequence[str]
    concurrency: int
    retries: int
    api_key: str | None


def run_batch(batch: Batch) -> int:
    """0 if every line has its answer, 1 if some failed: they are in the file of errors, and asked again by the next
    run. Raises LauncherError; SettingsError before anything was asked."""
    if batch.concurrency < 1:
        raise SettingsError(f"--concurrency {batch.concurrency}: must be 1 or more")
    if batch.serve_arguments and batch.model is None:
        raise SettingsError("flags behind -- are for a server of its own: name its model with --model")
    lines = read_lines(batch.file)
    output = batch.output or batch.file.with_suffix(".out.jsonl")
    errors = output.with_suffix(".errors.jsonl")
    if output.resolve() == batch.file.resolve():
        raise SettingsError(f"--output {output}: that is the input")
    answers, done = open_output(output)
    with answers:
        left = [line for line in lines if line.custom_id not in done]
        failed = 0
        if left and batch.model is not None:
            with _own_server(batch.model, batch.serve_arguments) as url:
                failed = _run(batch, url, lines, left, answers, errors)
        elif left:
            failed = _run(batch, batch.url, lines, left, answers, errors)
        else:
            errors.unlink(missing_ok=True)
    again = f", {len(lines) - len(left)} of them by an earlier run" if len(left) < len(lines) else ""
    print(f"{len(lines) - failed} of {len(lines)} requests answered{again}: {output}")
    if failed:
        print(
            f"phalanx: error: {failed} requests failed: {errors}; run it again to try them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _run(batch: Batch, url: str, lines: list[Line], left: list[Line], answers: TextIO, errors: Path) -> int:
    """Asks what is left; returns how many failed."""
    key = key_or_default(batch.api_key)
    model = first_model(url, key)
    errors.unlink(missing_ok=True)
    salt = str(Path(answers.name).resolve())
    with choose_display() as display:
        work = _Work(batch, model, key, salt, answers, errors, display, len(lines), len(lines) - len(left))
        return asyncio.run(work.run(url, left))


class _Work:
    def __init__(
        self,
        batch: Batch,
        model: str,
        key: str | None,
        salt: str,
        answers: TextIO,
        errors: Path,
        display: Display,
        total: int,
        done: int,
    ) -> None:
        self._batch = batch
        self._model = model
        self._key = key
        self._salt = salt
        self._answers = answers
        self._errors = errors
        self._display = display
        self._total = total
        self._done = done
        self._failed = 0

    async def run(self, url: str, lines: list[Line]) -> int:
        pool = HttpPool(url, self._key)
        waiting = iter(lines)
        self._display.update("batch", self._done, self._total, "requests")
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._batch.concurrency, len(lines))):
                    group.create_task(self._worker(pool, waiting))
        finally:
            await pool.close()
        return self._failed

    async def _worker(self, pool: HttpPool, waiting: Iterator[Line]) -> None:
        for line in waiting:
            await self._one(pool, line)
            self._display.update("batch", self._done + self._failed, self._total, "requests")

    async def _one(self, pool: HttpPool, line: Line) -> None:
        body = {"model": self._model, **line.body}
        headers = {"Idempotency-Key": line.key(self._salt)}
        status: int | None = None
        request_id, message = "", ""
        wait_s = FIRST_RETRY_S
        for attempt in range(self._batch.retries + 1):
            if attempt:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LAST_RETRY_S)
            try:
                answer = await pool.post(line.path, body, headers)
                status, request_id = answer.status, answer.headers.get("x-request-id", "")
                content = await answer.body()
                if status == 200:
                    self._write(answer_line(line, request_id, json.loads(content)))
                    self._done += 1
                    return
            except (StreamBroken, OSError, ValueError) as error:
                status, message = None, str(error) or type(error).__name__
                continue
            message = reason_of(content)
            if status not in RETRIED or answer.headers.get("x-should-retry") == "false":
                break
            wait_s = max(wait_s, _retry_after_s(answer.headers))
        self._failed += 1
        with self._errors.open("a") as file:
            file.write(error_line(line, status, request_id, message))

    def _write(self, text: str) -> None:
        self._answers.write(text)
        self._answers.flush()


def _retry_after_s(headers: dict[str, str]) -> float:
    try:
        return min(60.0, float(headers.get("retry-after", "0")))
    except ValueError:  # a date
        return 0.0


@contextmanager
def _own_server(model: str, arguments: Sequence[str]) -> Iterator[str]:
    """`phalanx serve` on free ports, for as long as the context lasts; its URL. Raises LauncherError."""
    with tempfile.TemporaryDirectory(prefix="phalanx-batch-") as folder:
        command = [sys.executable, "-m", "launcher.cli", "serve", model, "--port", "0", "--grpc-port", "0"]
        command += ["--zmq", "tcp://127.0.0.1:*", "--run-dir", f"{folder}/run", *arguments]
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends the batch first, then the server is told
            preexec_fn=die_with_parent,  # what the supervisor leaves then waits for another one, and ends
        )
        try:
            assert server.stdout is not None
            ready = server.stdout.readline().split()
            if ready[:1] != ["ready"]:
                raise LauncherError(f"phalanx serve {model} did not start; its error is above")
            yield ready[1]
        finally:
            server.send_signal(signal.SIGINT if sys.exc_info()[0] else signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
