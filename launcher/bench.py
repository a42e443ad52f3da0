"""`phalanx bench`: load on any server with OpenAI's HTTP API, and how it bore it. Streams every answer; takes a
stream up again where the server can do that, and counts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.bench_prompts import Ask, make_asks
from launcher.bench_report import Outcome, format_report, summarize
from launcher.display import choose_display
from launcher.errors import LauncherError, SettingsError
from launcher.http_client import first_model, key_or_default, reason_of
from launcher.http_stream import Answer, HttpPool, StreamBroken

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ID_HEADER = "x-phalanx-request-id"
RETRIED = (429, 502, 503, 504)
RETRY_S = 0.5
BUSY_CLIENT_PERCENT = 85


@dataclass(frozen=True)
class Load:
    """What `phalanx bench` was asked for."""

    url: str
    model: str | None
    endpoint: str
    concurrency: int
    requests: int
    rate: float
    """Requests a second, at random moments (Poisson); 0: as fast as `concurrency` lets them."""
    dataset: str
    dataset_path: Path | None
    input_len: int
    output_len: int | None
    ignore_eos: bool
    temperature: float
    seed: int
    retries: int
    warmup: int
    api_key: str | None
    json_path: Path | None

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests", "input_len"):
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be 1 or more")
        for name in ("rate", "retries", "warmup", "temperature"):
            if not getattr(self, name) >= 0:
                raise SettingsError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.output_len is not None and self.output_len < 1:
            raise SettingsError(f"--output-len {self.output_len}: must be 1 or more")


def bench(load: Load) -> int:
    """Runs it and prints what came out. 0 if every request succeeded, 1 if some failed. Raises LauncherError."""
    key = key_or_default(load.api_key)
    model = load.model or first_model(load.url, key)
    asks = make_asks(
        load.dataset, load.dataset_path, load.requests, load.input_len, load.output_len, load.seed
    )
    found = asyncio.run(_run(load, model, key, asks))
    print(format_report(found))
    if found["client_cpu_percent"] > BUSY_CLIENT_PERCENT:
        print("phalanx: warning: this client was busy; the server may be faster than that", file=sys.stderr)
    for error, count in found["errors"].items():
        print(f"phalanx: error: {count} requests failed: {error}", file=sys.stderr)
    if load.json_path is not None:
        try:
            load.json_path.write_text(json.dumps(found, indent=2) + "\n")
        except OSError as error:
            raise LauncherError(f"--json {load.json_path}: {error.strerror}") from None
    return 1 if found["failed"] else 0


async def _run(load: Load, model: str, key: str | None, asks: list[Ask]) -> dict[str, Any]:
    pool = HttpPool(load.url, key)
    client = _Client(load, model, pool)
    try:
        if load.warmup:
            warm = [asks[number % len(asks)] for number in range(load.warmup)]
            await asyncio.gather(*(client.ask(ask) for ask in warm))
        began, cpu_began = time.perf_counter(), time.process_time()
        outcomes = await _all(load, client, asks)
        duration_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    finally:
        await pool.close()
    about = {
        "backend": f"openai-{load.endpoint}",
        "base_url": load.url,
        "model_id": model,
        "dataset": load.dataset,
        "num_prompts": load.requests,
        "max_concurrency": load.concurrency,
        "request_rate": load.rate or None,
        "seed": load.seed,
    }
    return summarize(outcomes, duration_s, cpu_s, about)


async def _all(load: Load, client: _Client, asks: list[Ask]) -> list[Outcome]:
    """At most `concurrency` at once, and no more in a second than `rate`."""
    turns = asyncio.Semaphore(load.concurrency)
    generator = random.Random(load.seed)
    done = 0
    with choose_display() as display:

        async def one(ask: Ask) -> Outcome:
            nonlocal done
            try:
                return await client.ask(ask)
            finally:
                turns.release()
                done += 1
                display.update("requests", done, len(asks), "requests")

        tasks = []
        due = time.perf_counter()
        for ask in asks:
            if load.rate:
                due += generator.expovariate(load.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await turns.acquire()
            tasks.append(asyncio.create_task(one(ask)))
        return list(await asyncio.gather(*tasks))


class _Client:
    def __init__(self, load: Load, model: str, pool: HttpPool) -> None:
        self._load = load
        self._model = model
        self._pool = pool

    async def ask(self, ask: Ask) -> Outcome:
        """One request to its end, whatever becomes of it."""
        outcome = Outcome()
        reading = _Reading(outcome)
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        while True:
            try:
                answer = await self._open(ask, reading, headers)
                if answer.status == 204:
                    await answer.body()
                    return outcome
                if answer.status != 200:
                    text = f"{answer.status} {reason_of(await answer.body())}"
                    if answer.status not in RETRIED or outcome.retries >= self._load.retries:
                        outcome.error = text
                        return outcome
                    outcome.retries += 1
                    await asyncio.sleep(_wait_s(answer))
                    continue
                reading.call_id = answer.headers.get(ID_HEADER, reading.call_id)
                if await reading.read(answer):
                    return outcome
                problem = "the stream ended too early"
            except (StreamBroken, OSError) as error:
                problem = str(error) or type(error).__name__
            if outcome.retries + outcome.resumes >= self._load.retries:
                outcome.error = problem
                return outcome
            if reading.call_id is not None:
                outcome.resumes += 1
            elif reading.has_begun:  # what it brought cannot be brought again
                outcome.error = problem
                return outcome
            else:
                outcome.retries += 1
            await asyncio.sleep(RETRY_S)

    async def _open(self, ask: Ask, reading: _Reading, headers: dict[str, str]) -> Answer:
        reading.start()
        if reading.call_id is not None:
            last = {"Last-Event-ID": reading.last_event} if reading.last_event else {}
            return await self._pool.get(f"/v1/requests/{reading.call_id}/stream", last)
        return await self._pool.post(PATHS[self._load.endpoint], self._body(ask), headers)

    def _body(self, ask: Ask) -> dict[str, Any]:
        load = self._load
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": ask.output_len,
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if load.ignore_eos:
            body["ignore_eos"] = True
        if load.endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": ask.prompt}]}
        return {**body, "prompt": ask.prompt}


class _Reading:
    """How far one answer has come, over all its connections."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._last_at: float | None = None
        self._began: float | None = None
        self.call_id: str | None = None
        self.last_event: str | None = None

    @property
    def has_begun(self) -> bool:
        return self._last_at is not None

    def start(self) -> None:
        if self._began is None:
            self._began = time.perf_counter()

    async def read(self, answer: Answer) -> bool:
        """Whether the answer has ended, well or with an error that it names. Raises StreamBroken."""
        async with contextlib.aclosing(answer.events()) as events:
            ended = False
            async for event_id, data in events:
                if not ended:
                    ended = self._take(data)
                    self.last_event = event_id
            return ended

    def _take(self, data: bytes) -> bool:
        now = time.perf_counter()
        outcome = self._outcome
        if data == b"[DONE]":
            assert self._began is not None
            outcome.latency_s = (self._last_at or now) - self._began
            if not outcome.output_tokens and self.has_begun:  # a server that counts nothing: a token a chunk
                outcome.output_tokens = len(outcome.inter_token_s) + 1
            return True
        chunk = json.loads(data)
        if "error" in chunk:
            outcome.error = reason_of(data)
            return True
        if usage := chunk.get("usage"):
            outcome.input_tokens = usage.get("prompt_tokens", 0)
            outcome.output_tokens = usage.get("completion_tokens", 0)
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta", {})
            if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
                assert self._began is not None
                if self._last_at is None:
                    outcome.time_to_first_token_s = now - self._began
                else:
                    outcome.inter_token_s.append(now - self._last_at)
                self._last_at = now
        return False


def _wait_s(answer: Answer) -> float:
    try:
        return min(10.0, max(0.0, float(answer.headers.get("retry-after", RETRY_S))))
    except ValueError:  # a date
        return RETRY_S
