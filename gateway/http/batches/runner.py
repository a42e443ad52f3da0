"""Runs batches: line by line through the server's own endpoints, a few at a time, behind everything interactive.

One front of a run folder does it, whoever holds the lock. A line is done when its result is in the store; what was
running when the front died is found again by its key in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from functools import partial
from pathlib import Path

import msgspec
from starlette.types import ASGIApp

from gateway.http.batches.lines import LineError, ask, check_lines, decode_line, read_lines
from gateway.http.batches.store import Batch, BatchStore, StorageFailed, StorageFull
from gateway.keys import KeyRing, current
from gateway.log import Logger

MAX_LINES_AT_ONCE = 32
"""Over all batches: enough to fill the batches of a world, few enough to leave room in its queue."""
POLL_S = 1.0
"""How often it looks for batches, and for those to be cancelled, that other fronts have written."""
MAX_RETRY_S = 10.0
_LIVE = ("validating", "in_progress")


class BatchRunner:
    """Everything that runs of batches in this front."""

    def __init__(self, store: BatchStore, log: Logger, keys: KeyRing | None = None) -> None:
        self._store = store
        self._log = log
        self._keys = keys
        self._app: ASGIApp | None = None
        self._slots = asyncio.Semaphore(MAX_LINES_AT_ONCE)
        self._wake = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._main: asyncio.Task[None] | None = None
        self._lock: int | None = None

    def start(self, app: ASGIApp) -> None:
        """Begins, with the application whose endpoints the lines ask."""
        self._app = app
        self._main = asyncio.get_running_loop().create_task(self._run())

    def wake(self) -> None:
        """There is something new in the store."""
        self._wake.set()

    async def close(self) -> None:
        """Stops. What is not done stays as it is for the next front."""
        tasks = [task for task in (self._main, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._lock is not None:
            os.close(self._lock)

    # ----------------------------------------------------------------------- inside

    async def _run(self) -> None:
        while True:
            try:
                if self._store.is_there and self._take_lock(self._store.folder / "batches.lock"):
                    self._look()
            except StorageFailed as error:
                self._log.error("batches", detail=str(error))
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    def _take_lock(self, path: Path) -> bool:
        if self._lock is not None:
            return True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageFailed(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        self._store.sweep()
        return True

    def _look(self) -> None:
        """Starts what is new, ends what is to be cancelled or is past its time."""
        self._store.tidy(time.time())
        loop = asyncio.get_running_loop()
        for batch in self._store.running_batches():
            task = self._running.get(batch.id)
            if task is None:
                task = self._running[batch.id] = loop.create_task(self._run_batch(batch))
                task.add_done_callback(partial(self._ended, batch.id))
            elif batch.status == "cancelling" or batch.expires_at <= time.time():
                task.cancel()  # it is found again, in its new state

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._running.pop(batch_id, None)
        self.wake()

    async def _run_batch(self, batch: Batch) -> None:
        store = self._store
        try:
            if batch.status == "cancelling":
                await self._finish(batch, "cancelled", "batch_cancelled", "the batch was cancelled")
                return
            if batch.status == "validating" and not await self._validate(batch):
                return
            if batch.expires_at > time.time():
                await self._run_lines(batch)
            is_done = len(store.done_lines(batch.id)) >= batch.total
            if is_done:
                await self._finish(batch, "completed")
            else:
                text = "the batch was not done within its completion window"
                await self._finish(batch, "expired", "batch_expired", text)
        except StorageFull as error:
            batch.errors = [{"code": "storage_full", "message": str(error), "line": None, "param": None}]
            await self._finish(batch, "failed", "storage_full", str(error))
        except Exception as error:  # the disk, most likely: nothing of the batch is lost by waiting
            self._log.error("batch waits", batch=batch.id, detail=repr(error))
            await asyncio.sleep(MAX_RETRY_S)

    async def _validate(self, batch: Batch) -> bool:
        """Whether the batch may run; if not, it has failed."""
        file = self._store.file(batch.input_file_id)
        if file is None:
            text = f"the file {batch.input_file_id} is not there any more"
            errors = [{"code": "invalid_file", "message": text, "line": None, "param": "input_file_id"}]
        else:
            path = self._store.path(file)
            batch.total, errors = await asyncio.to_thread(check_lines, path, batch.endpoint)
        if errors:
            batch.errors = errors
            self._store.finish(batch, "failed")
            return False
        return self._store.set_status(batch, "in_progress", ("validating",))

    async def _run_lines(self, batch: Batch) -> None:
        """Every line that is not done. Raises StorageFull, StorageFailed."""
        file = self._store.file(batch.input_file_id)
        if file is None:
            return  # it expired, or was deleted: what is left cannot be done
        done = self._store.done_lines(batch.id)
        try:
            async with asyncio.TaskGroup() as group:
                for number, content in read_lines(self._store.path(file)):
                    if number in done:
                        continue
                    await self._slots.acquire()
                    task = group.create_task(self._run_line(batch, number, content))
                    task.add_done_callback(lambda _: self._slots.release())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _run_line(self, batch: Batch, number: int, content: bytes) -> None:
        assert self._app is not None
        key = f"{batch.id}-{number}"
        try:
            line = decode_line(number, content, batch.endpoint)
        except LineError as error:  # it was good when the batch began
            self._store.add_result(
                batch.id, number, ok=False, content=_error_line(batch, number, "", "invalid_line", str(error))
            )
            return
        self._store.check_room(len(content))
        while True:
            if self._keys is not None and batch.owner:
                holder = self._keys.holder(batch.owner)
                if holder is None:
                    text = "the API key that made this batch is not good any more"
                    revoked = _error_line(batch, number, line.custom_id, "invalid_api_key", text)
                    self._store.add_result(batch.id, number, ok=False, content=revoked)
                    return
                if (refused := holder.take_request()) is not None:
                    await asyncio.sleep(min(MAX_RETRY_S, refused[1]))
                    continue
                current.set(holder)  # of this line's task alone
            answer = await ask(self._app, line, key)
            if answer.status not in (429, 503):
                break
            # Too much waits already, no world came, or the front is about to end: nothing is wrong with the line.
            await asyncio.sleep(min(MAX_RETRY_S, max(0.1, answer.retry_after_s)))
        result = {
            "id": f"batch_req_{batch.id.removeprefix('batch_')}{number:06x}",
            "custom_id": line.custom_id,
            "response": {
                "status_code": answer.status,
                "request_id": key,
                "body": msgspec.Raw(answer.body or b"null"),
            },
            "error": None,
        }
        encoded = msgspec.json.encode(result)
        ok = answer.status == 200
        tokens = _tokens(answer.body) if ok else (0, 0)
        self._store.add_result(batch.id, number, ok=ok, content=encoded, tokens=tokens)

    async def _finish(self, batch: Batch, status: str, code: str = "", text: str = "") -> None:
        """Writes the files of a batch that is done, or as far as it is; lines that are not done get an error."""
        store = self._store
        if batch.status != "cancelling":
            store.set_status(batch, "finalizing", ("in_progress", "finalizing"))
        if code:
            self._note_undone(batch, code, text)
        counts = store.counts(batch.id)
        batch.completed, batch.failed = counts.completed, counts.failed
        batch.input_tokens, batch.output_tokens = counts.input_tokens, counts.output_tokens
        after_s = batch.output_expires_after_s
        for ok, count, name in ((True, counts.completed, "output"), (False, counts.failed, "error")):
            if count:
                results = store.results(batch.id, ok=ok)
                file_id = f"file-{name}-{batch.id.removeprefix('batch_')}"
                await asyncio.to_thread(store.write_content, results, file_id)
                store.add_file(file_id, f"{batch.id}_{name}.jsonl", "batch_output", after_s, batch.owner)
                if ok:
                    batch.output_file_id = file_id
                else:
                    batch.error_file_id = file_id
        store.finish(batch, status)
        self._log.info("batch ended", batch=batch.id, status=status, **msgspec.to_builtins(counts))

    def _note_undone(self, batch: Batch, code: str, text: str) -> None:
        """An error for each line without a result, so that the error file names them."""
        file = self._store.file(batch.input_file_id)
        if file is None:
            return
        done = self._store.done_lines(batch.id)
        for number, content in read_lines(self._store.path(file)):
            if number not in done:
                try:
                    custom_id = decode_line(number, content, batch.endpoint).custom_id
                except LineError:
                    continue
                error = _error_line(batch, number, custom_id, code, text)
                self._store.add_result(batch.id, number, ok=False, content=error)


def _error_line(batch: Batch, number: int, custom_id: str, code: str, text: str) -> bytes:
    return msgspec.json.encode(
        {
            "id": f"batch_req_{batch.id.removeprefix('batch_')}{number:06x}",
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": text},
        }
    )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    """Beside `input_tokens`, at Anthropic's endpoint."""


class _WithUsage(msgspec.Struct):
    usage: _Usage


_decode_usage = msgspec.json.Decoder(_WithUsage).decode


def _tokens(body: bytes) -> tuple[int, int]:
    """Of the prompt and of the answer, as an endpoint's answer says."""
    try:
        usage = _decode_usage(body).usage
    except msgspec.MsgspecError:
        return 0, 0
    prompt_tokens = usage.prompt_tokens or usage.input_tokens + usage.cache_read_input_tokens
    return prompt_tokens, usage.completion_tokens or usage.output_tokens
