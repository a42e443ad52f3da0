"""API keys in the front: whose key a client sent, and how much its holder may still ask for.

Asked by the HTTP gate and the gRPC interceptor once a request; charged by requests.py. A key is never logged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from contextvars import ContextVar
from pathlib import Path

from gateway.key_file import KeyFileError, KeyRecord, id_of, load, matches
from gateway.log import Logger
from gateway.shared_counts import SharedBucket, SharedCounts

GIVEN_ID = "given"
"""Holder of the key of --api-key."""
CHECK_FILE_S = 1.0
_MAX_KEY_BYTES = 512
_MOST_KNOWN = 4096


class Bucket:
    """So many a minute: full after a minute's rest, filled evenly. It may be charged below nothing; then nobody is
    let through before that is paid off.

    With several fronts each keeps a bucket of its own, from which it takes what the others charged, too. It has to
    look (`level`) every second: what others charge between two looks counts as if it had come with the second one, so
    that a bucket that was full is taken for emptier than it is by what flows in meanwhile, never for fuller."""

    __slots__ = ("_at", "_charged", "_level", "_shared", "limit")

    def __init__(self, limit: int, shared: SharedBucket | None = None) -> None:
        self.limit = limit
        now = time.monotonic()
        known = None if shared is None else shared.last_level(now)
        self._level, self._at = known or (float(limit), now)
        self._shared = shared
        self._charged = 0.0 if shared is None else shared.total()
        """By all fronts, as far as it is taken from the level."""

    def level(self, now: float) -> float:
        """What is left at `now`, on the monotonic clock."""
        self._level = min(float(self.limit), self._level + (now - self._at) * self.limit / 60)
        self._at = now
        if self._shared is not None and (charged := self._shared.total()) != self._charged:
            self._level -= charged - self._charged
            self._charged = charged
        return self._level

    def charge(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount
        if self._shared is not None:
            self._charged += amount
            self._shared.charge(amount, self._level, now)

    def wait_s(self, wanted: float, now: float) -> float:
        """Until it holds as much; 0 if it does."""
        return max(0.0, (wanted - self.level(now)) * 60 / self.limit)

    def reset_s(self, now: float) -> float:
        """Until it is full."""
        return self.wait_s(self.limit, now)


class Holder:
    """Who has a key. The same object as long as its limits stay."""

    __slots__ = ("id", "name", "requests", "tokens")

    def __init__(self, record: KeyRecord, shared: SharedCounts | None = None) -> None:
        self.id = record.id
        self.name = record.name

        def bucket(kind: str, limit: int | None) -> Bucket | None:
            if not limit:
                return None
            return Bucket(limit, None if shared is None else shared.bucket(f"{record.id} {kind}"))

        self.requests = bucket("requests", record.requests_per_minute)
        self.tokens = bucket("tokens", record.tokens_per_minute)

    @property
    def is_limited(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def take_request(self) -> tuple[str, float] | None:
        """Counts a request; or says which limit is against it, and after how many seconds it is not."""
        now = time.monotonic()
        waits = []
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None and (wait_s := bucket.wait_s(1, now)) > 0:
                waits.append((kind, wait_s))
        if waits:
            return max(waits, key=lambda wait: wait[1])
        if self.requests is not None:
            self.requests.charge(1, now)
        return None

    def look(self) -> None:
        """Takes note of what other fronts have charged."""
        now = time.monotonic()
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.level(now)

    def charge_tokens(self, count: int) -> None:
        """Of a prompt that was accepted, or of an answer as it comes."""
        if self.tokens is not None:
            self.tokens.charge(count, time.monotonic())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """x-ratelimit-*, as OpenAI's clients read them."""
        now = time.monotonic()
        headers = []
        for kind, bucket in ((b"requests", self.requests), (b"tokens", self.tokens)):
            if bucket is not None:
                left = max(0, int(bucket.level(now)))
                headers += [
                    (b"x-ratelimit-limit-" + kind, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + kind, b"%d" % left),
                    (b"x-ratelimit-reset-" + kind, _duration(bucket.reset_s(now))),
                ]
        return headers


current: ContextVar[Holder | None] = ContextVar("current", default=None)
"""Whose request is being answered; None where no keys are asked for."""


def owner_id() -> str:
    """What is stored with things that only their maker may see; empty where no keys are asked for."""
    holder = current.get()
    return "" if holder is None else holder.id


class KeyRing:
    """All keys that are good now."""

    def __init__(
        self, given: str | None, path: Path | None, log: Logger, shared: SharedCounts | None = None
    ) -> None:
        """`given`: one key of its own, without limits. `shared`: where several fronts count together. Raises
        KeyFileError if the file cannot be read now; later a bad one is reported, and what it said before holds."""
        self._shared = shared
        self._secret = secrets.token_bytes(32)
        self._path = path
        self._log = log
        self._known: dict[bytes, Holder] = {}
        """By the HMAC of a key that was found good: the next time costs one hash."""
        self._records: dict[str, KeyRecord] = {}
        self._holders: dict[str, Holder] = {}
        self._given: tuple[bytes, Holder] | None = None
        if given:
            record = KeyRecord(id=GIVEN_ID, name=GIVEN_ID, salt="", hash="")
            self._given = (self._digest(given.encode()), Holder(record))
        self._state: tuple[int, ...] | None = None
        self._checked_at = time.monotonic()
        if path is not None:
            self._state = _state_of(path)
            self._take(load(path))

    def find(self, key: bytes) -> Holder | None:
        """Whose key this is; None if it is nobody's."""
        self._look_at_file()
        if not 0 < len(key) <= _MAX_KEY_BYTES:
            return None
        digest = self._digest(key)
        holder = self._known.get(digest)
        if holder is not None:
            return holder
        if self._given is not None and hmac.compare_digest(digest, self._given[0]):
            holder = self._given[1]
        else:
            record = self._records.get(id_of(key) or "")
            if record is None or not matches(record, key):
                return None
            holder = self._holders[record.id]
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[digest] = holder
        return holder

    def look(self) -> None:
        """To be called every second where several fronts count together."""
        if self._shared is not None:
            for holder in self._holders.values():
                holder.look()

    def holder(self, holder_id: str) -> Holder | None:
        """Who had a key once, by what `owner_id` said; None if that key is worthless now."""
        self._look_at_file()
        if self._given is not None and holder_id == GIVEN_ID:
            return self._given[1]
        return self._holders.get(holder_id)

    # ----------------------------------------------------------------------- inside

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, hashlib.sha256)

    def _look_at_file(self) -> None:
        now = time.monotonic()
        if self._path is None or now < self._checked_at + CHECK_FILE_S:
            return
        self._checked_at = now
        state = _state_of(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._take(load(self._path))
        except KeyFileError as error:
            self._log.error("API keys not read again; the ones from before hold", detail=str(error))
            return
        self._log.info("API keys read again", keys=len(self._records))

    def _take(self, records: list[KeyRecord]) -> None:
        holders = {}
        for record in records:
            before = self._records.get(record.id)
            holder = self._holders.get(record.id)
            if before is None or holder is None or _limits(before) != _limits(record):
                holder = Holder(record, self._shared)
            holder.name = record.name
            holders[record.id] = holder
        self._records = {record.id: record for record in records}
        self._holders = holders
        self._known.clear()


def _limits(record: KeyRecord) -> tuple[int | None, int | None]:
    return record.requests_per_minute, record.tokens_per_minute


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _duration(seconds: float) -> bytes:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    if seconds < 60:
        return f"{seconds:.3g}s".encode()
    minutes, rest = divmod(round(seconds), 60)
    return b"%dm%ds" % (minutes, rest)
