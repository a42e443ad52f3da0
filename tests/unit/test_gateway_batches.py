"""Files and batches over an echo world: forms, progress, cancel, expiry, and what kills."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.http.batches.store import Batch, BatchStore, StorageFull
from tests.echo_world import EchoCluster
from tests.unit.http_asking import CHAT, TEXT, ask, chat

FILES, BATCHES = "/v1/files", "/v1/batches"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.002, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def api(cluster: EchoCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=3, timeout=30)


def lines_of(bodies: list[dict[str, Any]], url: str = TEXT) -> bytes:
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}
        for number, body in enumerate(bodies)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def begin(api: openai.OpenAI, content: bytes, url: Any = TEXT, **fields: Any) -> Any:
    file = api.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = fields.pop("completion_window", "24h")
    return api.batches.create(input_file_id=file.id, endpoint=url, completion_window=window, **fields)


def ended(api: openai.OpenAI, batch_id: str, timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        batch = api.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.05)
    raise AssertionError(batch)


def results(api: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in api.files.content(file_id).text.splitlines()]


def test_a_file_comes_back_as_it_was(cluster: EchoCluster, api: openai.OpenAI) -> None:
    content = lines_of([{"prompt": "é"}])
    file = api.files.create(
        file=("in.jsonl", content),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.filename, file.bytes, file.purpose, file.object) == (
        "in.jsonl",
        len(content),
        "batch",
        "file",
    )
    assert file.expires_at == file.created_at + 3600
    assert api.files.retrieve(file.id) == file
    assert api.files.content(file.id).content == content
    assert file.id in [entry.id for entry in api.files.list(purpose="batch", limit=1)]
    kept = cluster.run_dir / "files" / file.id
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE((cluster.run_dir / "batches.sqlite").stat().st_mode) == 0o600
    assert api.files.delete(file.id).deleted and not kept.exists()
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(file.id)


def test_a_batch_to_its_end(api: openai.OpenAI) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": f"abc{n}", "max_tokens": 5} for n in range(40)]
    bodies[7] = {"prompt": "abc", "max_tokens": -1}
    batch = begin(api, lines_of(bodies), metadata={"a": "b"})
    assert batch.status == "validating" and batch.metadata == {"a": "b"}
    batch = ended(api, batch.id)
    assert batch.status == "completed" and batch.completed_at >= batch.in_progress_at >= batch.created_at
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (40, 39, 1)
    assert batch.usage.output_tokens == 39 * 5
    answers = results(api, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(40) if n != 7]
    for answer in answers:
        number = int(answer["custom_id"].removeprefix("line-"))
        assert answer["response"]["status_code"] == 200 and answer["error"] is None
        assert answer["response"]["body"]["choices"][0]["text"] == f"abc{number}abc"[:5]
    [failed] = results(api, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("line-7", 400)
    assert failed["response"]["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        (CHAT, chat("abc"), "user\nabc"),
        ("/v1/embeddings", {"input": "abc"}, '"embedding"'),
        ("/v1/responses", {"input": "abc"}, "user\\nabc"),
    ],
)
def test_every_endpoint(api: openai.OpenAI, url: str, body: dict[str, Any], says: str) -> None:
    batch = ended(api, begin(api, lines_of([body], url), url).id)
    [answer] = results(api, batch.output_file_id)
    assert says.replace("\n", "\\n") in json.dumps(answer["response"]["body"])
    assert batch.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\n\n", "empty_file"),
        (b"{\n", "invalid_json_line"),
        (b'{"custom_id": "a"}\n', "invalid_json_line"),
        (b"\xff\n", "invalid_json_line"),
        (lines_of([{}]).replace(b"POST", b"GET"), "invalid_method"),
        (lines_of([{}], CHAT), "mismatched_url"),
        (lines_of([{}]) * 2, "duplicate_custom_id"),
        (lines_of([{"stream": True}]), "invalid_request"),
    ],
)
def test_an_input_that_is_none_fails(api: openai.OpenAI, content: bytes, code: str) -> None:
    batch = ended(api, begin(api, content).id)
    assert batch.status == "failed" and batch.output_file_id is None
    assert batch.errors.data[0].code == code, batch.errors


def test_a_batch_is_cancelled(cluster: EchoCluster, api: openai.OpenAI) -> None:
    bodies = [{"prompt": "abc", "max_tokens": 4}] * 5
    bodies += [{"prompt": "abc", "max_tokens": 450, "ignore_eos": True}] * 60
    batch = begin(api, lines_of(bodies))
    cluster.wait(lambda: api.batches.retrieve(batch.id).request_counts.completed >= 5)
    assert api.batches.cancel(batch.id).status == "cancelling"
    batch = ended(api, batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at is not None
    counts = batch.request_counts
    assert counts.total == 65 == counts.completed + counts.failed and counts.failed > 0
    assert len(results(api, batch.output_file_id)) == counts.completed >= 5
    errors = results(api, batch.error_file_id)
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}
    cluster.wait(lambda: b'phalanx_requests_live{model="echo"} 0.0' in cluster.get("/metrics")[1])
    assert api.batches.cancel(batch.id).status == "cancelled"


@pytest.mark.slow
def test_a_batch_expires(api: openai.OpenAI) -> None:
    bodies = [{"prompt": "abc", "max_tokens": 3}]
    bodies += [{"prompt": "abc", "max_tokens": 450, "ignore_eos": True}] * 100
    batch = ended(api, begin(api, lines_of(bodies), completion_window="2s").id)
    assert batch.status == "expired" and batch.expired_at is not None
    assert batch.request_counts.total == batch.request_counts.completed + batch.request_counts.failed
    assert "batch_expired" in {entry["error"]["code"] for entry in results(api, batch.error_file_id)}


def test_lists_come_in_pages(cluster: EchoCluster, api: openai.OpenAI) -> None:
    batches = [begin(api, lines_of([{"prompt": "abc"}])) for _ in range(3)]
    for batch in batches:
        ended(api, batch.id)
    found = [batch.id for batch in api.batches.list(limit=2)]  # the SDK follows `after`
    assert found[:3] == [batch.id for batch in reversed(batches)] and len(found) == len(set(found))
    page = ask(cluster, f"{BATCHES}?limit=1", method="GET")[2]
    assert page["has_more"] and page["first_id"] == page["last_id"] == batches[-1].id


def test_a_file_in_use_stays(api: openai.OpenAI) -> None:
    batch = begin(api, lines_of([{"prompt": "abc", "max_tokens": 450, "ignore_eos": True}] * 40))
    with pytest.raises(openai.BadRequestError, match="runs; cancel that first"):
        api.files.delete(batch.input_file_id)
    api.batches.cancel(batch.id)
    ended(api, batch.id)
    assert api.files.delete(batch.input_file_id).deleted


def test_lines_wait_behind_everything_interactive(cluster: EchoCluster, api: openai.OpenAI) -> None:
    seen = ended(api, begin(api, lines_of([chat("abc", logprobs=True)], CHAT), CHAT).id)
    assert seen.status == "completed"
    # What the world is told of a line is in the journal, with its priority.
    log = cluster.run_dir / "journal.sqlite-wal"
    assert log.exists() and (1_000_000).to_bytes(4, "big") in log.read_bytes()


@pytest.mark.slow
def test_finished_lines_are_not_done_again(cluster: EchoCluster, api: openai.OpenAI) -> None:
    bodies = [{"prompt": f"abc{n}", "max_tokens": 100, "ignore_eos": True} for n in range(100)]
    batch = begin(api, lines_of(bodies))
    cluster.wait(lambda: api.batches.retrieve(batch.id).request_counts.completed >= 20)
    cluster.restart_front()
    first = api.batches.retrieve(batch.id)
    assert first.status == "in_progress" and 20 <= first.request_counts.completed < 100
    store = BatchStore(cluster.run_dir)
    before = [json.loads(line)["response"] for line in store.results(batch.id, ok=True)]
    assert 20 <= len(before) < 100
    cluster.kill_world()
    cluster.start_world()
    done = ended(api, batch.id, 60)
    assert done.status == "completed" and done.request_counts.completed == 100
    answers = results(api, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(100)]
    for number, answer in enumerate(answers):
        assert answer["response"]["body"]["choices"][0]["text"].startswith(f"abc{number}abc{number}")
    after = {answer["response"]["request_id"]: answer["response"] for answer in answers}
    assert all(after[answer["request_id"]] == answer for answer in before)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"endpoint": "/v1/images"}, "endpoint", "/v1/chat/completions"),
        ({"completion_window": "1y"}, "completion_window", "24h"),
        ({"completion_window": "31d"}, "completion_window", "30d"),
        ({"input_file_id": "file-x"}, "input_file_id", "No such File"),
        ({"metadata": {"x" * 65: "y"}}, "metadata", "up to 64"),
        ({"output_expires_after": {"anchor": "x", "seconds": 3600}}, "output_expires_after.anchor", "created_at"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds", "3600"),
    ],
)  # fmt: skip
def test_batches_that_are_refused(
    cluster: EchoCluster, api: openai.OpenAI, fields: dict[str, Any], param: str, says: str
) -> None:
    file = api.files.create(file=("in.jsonl", b"x"), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": TEXT, "completion_window": "24h", **fields}
    status, _, answer = ask(cluster, BATCHES, body)
    assert status == 400 and answer["error"]["param"] == param and says in answer["error"]["message"], answer


def test_uploads_that_are_refused(cluster: EchoCluster, api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose 'assistants' is not supported"):
        api.files.create(file=("x", b"x"), purpose="assistants")
    assert ask(cluster, FILES, {"file": "x"})[0] == 400
    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert ask(cluster, FILES, b"nonsense", headers=kind)[0] == 400
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    status, _, answer = ask(cluster, FILES, form, headers=kind)
    assert (status, answer["error"]["param"]) == (400, "file")
    announced = {**kind, "content-length": str(2**40)}
    status, _, answer = ask(cluster, FILES, b"", headers=announced)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    for path in (f"{FILES}/file-x", f"{FILES}/file-x/content", f"{BATCHES}/batch_x"):
        assert ask(cluster, path, method="GET")[0] == 404


def test_the_store_is_bounded_and_forgets(tmp_path: Path) -> None:
    store = BatchStore(tmp_path, max_bytes=1000)
    store.check_room(1000)
    file = store.add_file(store.write_content([b"x" * 600]), "a", "batch", 3600, "")
    store.check_room(400)
    with pytest.raises(StorageFull, match="600 of 1000 bytes are in use"):
        store.check_room(401)
    store.add_result("batch_x", 1, ok=True, content=b"y" * 300)
    store.add_result("batch_x", 1, ok=False, content=b"z")  # it was done already
    assert store.used_bytes() == 900 and store.counts("batch_x").completed == 1
    left = store.write_content([b"of a front that was killed"])
    os.utime(tmp_path / "files" / left, (0, 0))
    store.sweep()
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [file.id]
    store.tidy(time.time() + 3601)
    assert store.files() == [] and not list((tmp_path / "files").iterdir())
    batch = Batch(id="batch_x", endpoint=TEXT, input_file_id="", completion_window="24h", status="in_progress",
                  created_at=1, expires_at=2)  # fmt: skip
    store.add_batch(batch)
    assert store.set_status(batch, "cancelling", ("in_progress",))
    assert not store.set_status(batch, "finalizing", ("in_progress",))
    store.finish(batch, "cancelled")
    store.close()
    again = BatchStore(tmp_path)
    assert again.batch("batch_x") == batch and again.running_batches() == [] and again.used_bytes() == 0
    again.close()


def test_without_a_run_folder_nothing_stays() -> None:
    store = BatchStore(None)
    assert not store.is_there
    store.check_room(1)
    folder = store.folder
    assert store.is_there and (folder / "batches.sqlite").exists()
    store.close()
    assert not folder.exists()
