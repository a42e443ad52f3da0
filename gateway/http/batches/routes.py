"""OpenAI's files and batches: /v1/files and /v1/batches.

Made by front.py, mounted by app.py. What is kept is in store.py, what runs in runner.py.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from msgspec import Struct
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message

from gateway.http.batches.lines import ENDPOINTS
from gateway.http.batches.runner import BatchRunner
from gateway.http.batches.store import (
    RUNNING,
    Batch,
    BatchStore,
    Counts,
    StorageFailed,
    StorageFull,
    StoredFile,
)
from gateway.http.errors import ApiError
from gateway.http.openai import read_body
from gateway.http.responses.routes import page_of
from gateway.http.responses.schema import check_metadata, unsupported
from gateway.http.schema import check, decode_body
from gateway.keys import KeyRing, owner_id
from gateway.log import Logger

MAX_FILE_BYTES = 256 * 2**20
MAX_BODY_BYTES = 2**20
_FORM_BYTES = 2**16
"""Of a form beside its file."""
_EXPIRY_S = (3600, 2_592_000)
_MAX_WINDOW_S = 30 * 86_400
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_PIECE_BYTES = 2**20

_T = TypeVar("_T")


class ExpiresAfter(Struct, kw_only=True):
    anchor: str
    seconds: int


class BatchRequest(Struct, kw_only=True):
    """OpenAI's fields."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class Batches:
    """The endpoints, and the batches that run behind them."""

    def __init__(self, run_dir: Path | None, log: Logger, keys: KeyRing | None = None) -> None:
        """To be made in the running loop. Without a run folder everything ends with this front. With `keys`, lines
        count for whoever made the batch, and nobody else sees it or its files."""
        self._store = BatchStore(run_dir)
        self._runner = BatchRunner(self._store, log, keys)

    def start(self, app: ASGIApp) -> None:
        """Runs batches, whose lines ask this application."""
        self._runner.start(app)

    async def close(self) -> None:
        """What is not done stays for the next front. To be called when no request runs any more."""
        await self._runner.close()
        self._store.close()

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/files", self.upload, methods=["POST"])
        router.add_api_route("/v1/files", self.list_files, methods=["GET"])
        router.add_api_route("/v1/files/{file_id}", self.show_file, methods=["GET"])
        router.add_api_route("/v1/files/{file_id}", self.delete_file, methods=["DELETE"])
        router.add_api_route("/v1/files/{file_id}/content", self.content, methods=["GET"])
        router.add_api_route("/v1/batches", self.create, methods=["POST"])
        router.add_api_route("/v1/batches", self.list_batches, methods=["GET"])
        router.add_api_route("/v1/batches/{batch_id}", self.show, methods=["GET"])
        router.add_api_route("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"])
        return router

    # ----------------------------------------------------------------------- files

    async def upload(self, http: Request) -> Response:
        """POST /v1/files: a form with `file` and `purpose`."""
        form = await _form(http)
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "the form has no file of the name `file`", param="file")
            if purpose != "batch":
                raise unsupported("purpose", ("batch",), str(purpose))
            expires_after_s = _expiry_of_form(form)
            name = (file.filename or "file.jsonl")[:256]
            _kept(lambda: self._store.check_room(file.size or 0))
            pieces = _pieces(file.file)
            try:
                file_id = await asyncio.to_thread(self._store.write_content, pieces)
            except StorageFailed as error:
                raise _unavailable(error) from None
            return _json(
                _file(
                    _kept(lambda: self._store.add_file(file_id, name, "batch", expires_after_s, owner_id()))
                )
            )
        finally:
            await form.close()

    async def list_files(self, http: Request) -> Response:
        """GET /v1/files."""
        purpose = http.query_params.get("purpose")
        owner = owner_id()
        files = [
            file
            for file in _kept(self._store.files)
            if purpose in (None, file.purpose) and file.owner == owner
        ]
        order = http.query_params.get("order", "desc")
        check(order in ("asc", "desc"), "order", repr(order[:20]), "asc, desc")
        shown = [_file(file) for file in (files if order == "asc" else reversed(files))]
        return _json(_page(shown, http, default=10_000, most=10_000))

    async def show_file(self, file_id: str) -> Response:
        """GET /v1/files/{id}."""
        return _json(_file(self._file(file_id)))

    async def content(self, file_id: str) -> Response:
        """GET /v1/files/{id}/content."""
        path = self._store.path(self._file(file_id))
        return FileResponse(path, media_type="application/octet-stream")

    async def delete_file(self, file_id: str) -> Response:
        """DELETE /v1/files/{id}."""
        self._file(file_id)
        for batch in _kept(self._store.running_batches):
            if batch.input_file_id == file_id:
                text = f"the file is the input of {batch.id}, which runs; cancel that first"
                raise ApiError(400, text, param="file_id", code="file_in_use")
        _kept(lambda: self._store.delete_file(file_id))
        return _json({"id": file_id, "object": "file", "deleted": True})

    # ----------------------------------------------------------------------- batches

    async def create(self, http: Request) -> Response:
        """POST /v1/batches."""
        request = decode_body(await read_body(http, MAX_BODY_BYTES), BatchRequest)
        check(request.endpoint in ENDPOINTS, "endpoint", repr(request.endpoint[:64]), ", ".join(ENDPOINTS))
        window_s = _window_s(request.completion_window)
        check_metadata(request.metadata)
        expiry = request.output_expires_after
        if expiry is not None:
            _check_expiry("output_expires_after", expiry.anchor, expiry.seconds)
        file = self._file(request.input_file_id, status=400)
        if file.purpose != "batch":
            text = f"the file has the purpose {file.purpose!r}; allowed: batch"
            raise ApiError(400, text, param="input_file_id", code="invalid_value")
        now = int(time.time())
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            completion_window=request.completion_window,
            status="validating",
            created_at=now,
            expires_at=now + window_s,
            owner=owner_id(),
            metadata=request.metadata,
            output_expires_after_s=expiry.seconds if expiry is not None else None,
        )
        _kept(lambda: self._store.add_batch(batch))
        self._runner.wake()
        return _json(self._shown(batch))

    async def list_batches(self, http: Request) -> Response:
        """GET /v1/batches: the newest first."""
        owner = owner_id()
        batches = {batch.id: batch for batch in _kept(self._store.batches) if batch.owner == owner}
        page = _page([{"id": name} for name in batches], http, default=20, most=100)
        page["data"] = [self._shown(batches[entry["id"]]) for entry in page["data"]]
        return _json(page)

    async def show(self, batch_id: str) -> Response:
        """GET /v1/batches/{id}."""
        return _json(self._shown(self._batch(batch_id)))

    async def cancel(self, batch_id: str) -> Response:
        """POST /v1/batches/{id}/cancel: what is done stays, what runs is ended."""
        batch = self._batch(batch_id)
        before = ("validating", "in_progress")
        if not _kept(lambda: self._store.set_status(batch, "cancelling", before)):
            batch = self._batch(batch_id)
            if batch.status not in ("cancelling", "cancelled"):
                text = f"the batch has ended or is about to ({batch.status}); it cannot be cancelled"
                raise ApiError(400, text, code="invalid_state")
        self._runner.wake()
        return _json(self._shown(batch))

    # ----------------------------------------------------------------------- inside

    def _file(self, file_id: str, status: int = 404) -> StoredFile:
        file = _kept(lambda: self._store.file(file_id))
        if file is None or file.owner != owner_id():
            text = f"No such File object: {file_id[:64]}"
            param = "id" if status == 404 else "input_file_id"
            raise ApiError(status, text, param=param, code="file_not_found")
        return file

    def _batch(self, batch_id: str) -> Batch:
        batch = _kept(lambda: self._store.batch(batch_id))
        if batch is None or batch.owner != owner_id():
            text = f"No batch found with id '{batch_id[:64]}'"
            raise ApiError(404, text, param="id", code="batch_not_found")
        return batch

    def _shown(self, batch: Batch) -> dict[str, Any]:
        counts = Counts(batch.completed, batch.failed, batch.input_tokens, batch.output_tokens)
        if batch.status in RUNNING:
            counts = _kept(lambda: self._store.counts(batch.id))
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        errors = [{"code": None, "line": None, "param": None, **error} for error in batch.errors]
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": batch.input_file_id,
            "completion_window": batch.completion_window,
            "status": batch.status,
            "output_file_id": batch.output_file_id,
            "error_file_id": batch.error_file_id,
            "created_at": batch.created_at,
            "expires_at": batch.expires_at,
            **{f"{name}_at": batch.times.get(f"{name}_at") for name in names},
            "request_counts": {
                "total": batch.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "usage": {
                "input_tokens": counts.input_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counts.output_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts.input_tokens + counts.output_tokens,
            },
            "metadata": batch.metadata,
        }


async def _form(http: Request) -> FormData:
    """The form of an upload, its file in a temporary one. Raises ApiError."""
    limit = MAX_FILE_BYTES + _FORM_BYTES
    too_long = ApiError(413, f"the file is longer than {MAX_FILE_BYTES} bytes", code="body_too_large")
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_long
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send a form (multipart/form-data) with `file` and `purpose`", param="file")
    size = 0

    async def receive() -> Message:
        nonlocal size
        message = await http.receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise too_long
        return message

    try:
        return await Request(http.scope, receive).form(max_files=1, max_fields=8, max_part_size=1024)
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}", param="file") from None


def _expiry_of_form(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    text = seconds if isinstance(seconds, str) else ""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    return _check_expiry("expires_after", str(anchor), number)


def _check_expiry(param: str, anchor: str, seconds: int) -> int:
    check(anchor == "created_at", f"{param}.anchor", repr(anchor[:20]), "created_at")
    low, high = _EXPIRY_S
    check(low <= seconds <= high, f"{param}.seconds", seconds, f"from {low} to {high}")
    return seconds


def _window_s(window: str) -> int:
    match = re.fullmatch(r"(\d{1,7})([smhd])", window, re.ASCII)
    window_s = int(match[1]) * _UNITS_S[match[2]] if match else 0
    allowed = "24h, or a number of s, m, h or d, up to 30d"
    check(1 <= window_s <= _MAX_WINDOW_S, "completion_window", repr(window[:20]), allowed)
    return window_s


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece


def _file(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _page(entries: list[dict[str, Any]], http: Request, *, default: int, most: int) -> dict[str, Any]:
    page, has_more = page_of(entries, http, default=default, most=most)
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return {"object": "list", "data": page, "has_more": has_more, **ends}


def _kept(action: Callable[[], _T]) -> _T:
    """What the store says. Raises ApiError."""
    try:
        return action()
    except StorageFull as error:
        raise ApiError(400, str(error), code="storage_full") from None
    except StorageFailed as error:
        raise _unavailable(error) from None


def _unavailable(error: StorageFailed) -> ApiError:
    return ApiError(503, str(error), type="service_unavailable", code="unavailable", retry_after_s=5)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
