"""API keys: the file, what is found by a key, and the limits of its holder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gateway import keys as keys_module
from gateway.key_file import KeyFileError, KeyRecord, load, make_key, save
from gateway.keys import Bucket, Holder, KeyRing
from gateway.log import Logger
from launcher.cli import main


class Log:
    """Remembers the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def error(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    debug = info = warning = error


@pytest.fixture
def log() -> Logger:
    return Log()


def write(path: Path, *records: KeyRecord) -> None:
    save(path, list(records))


def test_a_key_is_found_and_is_not_in_the_file(tmp_path: Path, log: Logger) -> None:
    path = tmp_path / "keys.json"
    key, record = make_key("alice")
    other, other_record = make_key("bob")
    write(path, record, other_record)
    secret = key.split("-", 2)[2]
    assert secret not in path.read_text() and path.stat().st_mode & 0o077 == 0
    ring = KeyRing(None, path, log)
    for _ in range(2):  # the second time out of memory
        holder = ring.find(key.encode())
        assert holder is not None and holder.name == "alice"
    assert ring.find(other.encode()) is not ring.find(key.encode())
    wrong = [b"", b"phx", key.encode()[:-1], key.encode() + b"x", b"x" * 10_000, other[:13].encode()]
    wrong.append(f"phx-{record.id}-{other.split('-', 2)[2]}".encode())
    assert [ring.find(one) for one in wrong] == [None] * len(wrong)


def test_one_given_key(log: Logger) -> None:
    ring = KeyRing("hush", None, log)
    holder = ring.find(b"hush")
    assert holder is not None and not holder.is_limited
    assert ring.find(b"hus") is None and ring.find(b"hush ") is None


def test_the_file_is_read_again(tmp_path: Path, log: Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "CHECK_FILE_S", 0.0)
    path = tmp_path / "keys.json"
    key, record = make_key("alice", tokens_per_minute=100)
    write(path, record)
    ring = KeyRing(None, path, log)
    holder = ring.find(key.encode())
    assert holder is not None and holder.tokens is not None
    holder.charge_tokens(60)
    added, added_record = make_key("bob")
    assert ring.find(added.encode()) is None
    write(path, record, added_record)
    assert ring.find(added.encode()) is not None
    assert ring.find(key.encode()) is holder  # what it has used is not forgotten
    path.write_text("{")
    assert ring.find(key.encode()) is holder
    assert "hold" in log.events[-1][0]  # type: ignore[attr-defined]
    write(path, added_record)
    assert ring.find(key.encode()) is None and ring.find(added.encode()) is not None


@pytest.mark.parametrize("text", ["", "{}", '{"keys": [{}]}', '{"keys": 3}', "\xff"])
def test_bad_files_are_refused_at_the_start(tmp_path: Path, log: Logger, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        KeyRing(None, path, log)


def test_a_bucket_fills_evenly_and_can_owe() -> None:
    bucket = Bucket(60)
    now = bucket._at
    assert bucket.level(now) == 60 and bucket.wait_s(1, now) == 0
    bucket.charge(100, now)
    assert bucket.level(now) == -40
    assert bucket.wait_s(1, now) == pytest.approx(41)
    assert bucket.level(now + 50) == pytest.approx(10)
    assert bucket.level(now + 1000) == 60


def test_limits_of_a_holder() -> None:
    holder = Holder(make_key("a", requests_per_minute=2, tokens_per_minute=10)[1])
    assert holder.take_request() is None and holder.take_request() is None
    kind, wait_s = holder.take_request() or ("", 0.0)
    assert kind == "requests" and 20 < wait_s <= 30
    holder.charge_tokens(25)
    kind, wait_s = holder.take_request() or ("", 0.0)
    assert kind == "tokens" and 90 < wait_s <= 96
    headers = dict(holder.headers())
    assert headers[b"x-ratelimit-limit-requests"] == b"2"
    assert headers[b"x-ratelimit-remaining-tokens"] == b"0"
    assert headers[b"x-ratelimit-reset-requests"] in (b"1m0s", b"60s", b"59.9s", b"59.8s")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], log: Logger) -> None:
    path = tmp_path / "deep" / "keys.json"
    where = ["--file", str(path)]
    assert main(["keys", "add", "alice", "--requests-per-minute", "5", *where]) == 0
    key = capsys.readouterr().out.strip()
    holder = KeyRing(None, path, log).find(key.encode())
    assert holder is not None and holder.requests is not None and holder.requests.limit == 5
    assert main(["keys", "add", "alice", *where]) == 1
    assert main(["keys", "add", "a b", *where]) == 1
    assert main(["keys", "add", "bob", "--tokens-per-minute", "0", *where]) == 1
    capsys.readouterr()
    assert main(["keys", "list", *where]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and key not in listed and len(listed.splitlines()) == 1
    assert main(["keys", "revoke", "nobody", *where]) == 1
    assert main(["keys", "revoke", "alice", *where]) == 0
    assert load(path) == [] and json.loads(path.read_text()) == {"keys": []}
    assert [name for name in os.listdir(path.parent) if name != "keys.json"] == []
