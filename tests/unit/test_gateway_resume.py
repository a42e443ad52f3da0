"""Calls over echo worlds that outlive their connections, and fronts that are killed and started again."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.client import Client, RequestFailed, SamplingParams
from gateway.inflight import Inflight
from gateway.protocol import Submit
from tests.echo_world import EchoCluster, echo_logprobs, echo_tokens
from tests.unit.disks import fill, small_disk
from tests.unit.http_asking import CHAT, TEXT, ask, chat, events, parse_events

PROMPT = list(range(40, 63))
LONG: dict[str, Any] = {"prompt": "abcdefgh", "max_tokens": 400, "stream": True, "ignore_eos": True}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--disconnect-grace-s", "1")
    with EchoCluster(tmp_path_factory.mktemp("shared"), front_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


class OpenStream:
    """A stream that is read by hand, and left when the test wants."""

    def __init__(
        self, cluster: EchoCluster, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=30)
        content = None if body is None else json.dumps(body).encode()
        self._connection.request(
            "GET" if body is None else "POST",
            path,
            content,
            {"accept": "text/event-stream", **(headers or {})},
        )
        self.response = self._connection.getresponse()
        self.id = self.response.getheader("x-phalanx-request-id") or ""
        self._data = b""

    def read(self, count: int) -> list[tuple[str, bytes]]:
        """The first events; what else has come by then is lost."""
        while len(parse_events(self._data)) < count:
            line = self.response.readline()
            assert line, "the stream ended"
            self._data += line
        return parse_events(self._data)[:count]

    def read_until_lost(self) -> list[tuple[str, bytes]]:
        """Every event that comes before the connection breaks."""
        try:
            while line := self.response.readline():
                self._data += line
        except (http.client.HTTPException, OSError):
            pass
        return parse_events(self._data)

    def leave(self) -> None:
        self._connection.close()
        self.response.close()


def rest(
    cluster: EchoCluster, request_id: str, last: str, *, in_query: bool = False
) -> list[tuple[str, bytes]]:
    path = f"/v1/requests/{request_id}/stream" + (f"?last_event_id={last}" if in_query else "")
    status, headers, data = ask(
        cluster, path, method="GET", headers={} if in_query else {"last-event-id": last}
    )
    assert status == 200 and headers["x-phalanx-request-id"] == request_id, data
    return parse_events(data)


def text_of(chunks: list[tuple[str, bytes]], index: int = 0) -> str:
    text = ""
    for _, data in chunks:
        for choice in json.loads(data)["choices"] if data != b"[DONE]" else []:
            if choice["index"] == index:
                text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return text


def status_of(cluster: EchoCluster, request_id: str) -> str:
    found: str = ask(cluster, f"/v1/requests/{request_id}", method="GET")[2]["status"]
    return found


# --------------------------------------------------------------------------- taken up


@pytest.mark.parametrize("in_query", [False, True])
def test_a_stream_is_taken_up_where_it_was_left(shared: EchoCluster, in_query: bool) -> None:
    stream = OpenStream(shared, TEXT, {**LONG, "stream_options": {"include_usage": True}})
    seen = stream.read(20)
    assert json.loads(seen[0][1])["id"] == stream.id
    stream.leave()
    all_events = seen + rest(shared, stream.id, seen[-1][0], in_query=in_query)
    assert text_of(all_events) == "abcdefgh" * 50
    assert all_events[-1] == ("400e.done", b"[DONE]")
    usage = json.loads(all_events[-2][1])
    assert usage["usage"]["completion_tokens"] == 400 and all_events[-2][0] == "400e.usage"
    # It has ended; what is behind each of its events can still be read.
    assert rest(shared, stream.id, "399")[-3:] == all_events[-3:]
    assert rest(shared, stream.id, "400e") == all_events[-2:]
    assert rest(shared, stream.id, "400e.usage") == all_events[-1:]
    path = f"/v1/requests/{stream.id}/stream"
    assert ask(shared, path, method="GET", headers={"last-event-id": "400e.done"})[0] == 204
    assert status_of(shared, stream.id) == "completed"


def test_choices_logprobs_and_chats_are_taken_up(shared: EchoCluster) -> None:
    body = chat("h\u00e9llo", n=3, max_tokens=40, stream=True, logprobs=True, top_logprobs=1, seed=1)
    whole = parse_events(ask(shared, CHAT, body)[2])
    stream = OpenStream(shared, CHAT, body)
    seen = stream.read(25)
    stream.leave()
    resumed = seen + rest(shared, stream.id, seen[-1][0])
    for index in range(3):
        assert text_of(resumed, index) == text_of(whole, index) != ""
        assert _logprobs(resumed, index) == _logprobs(whole, index) != []
        assert sum(b'"role"' in data and b'"index":%d' % index in data for _, data in resumed) == 1


def _logprobs(chunks: list[tuple[str, bytes]], index: int) -> list[Any]:
    found = []
    for _, data in chunks:
        for choice in json.loads(data)["choices"] if data != b"[DONE]" else []:
            if choice["index"] == index and choice["logprobs"]:
                found += choice["logprobs"]["content"]
    return found


def test_many_may_read_one_request(shared: EchoCluster) -> None:
    stream = OpenStream(shared, TEXT, LONG)
    stream.read(1)
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(rest, shared, stream.id, "") for _ in range(4)]
        assert {text_of(other.result()) for other in others} == {"abcdefgh" * 50}
    stream.leave()


def test_unknown_requests_and_ids_are_refused(shared: EchoCluster) -> None:
    for path in ("/v1/requests/cmpl-nobody", "/v1/requests/cmpl-nobody/stream"):
        status, _, answer = ask(shared, path, method="GET")
        assert (status, answer["error"]["code"]) == (404, "request_not_found")
        assert answer["error"]["type"] == "invalid_request_error"
    _, headers, _ = ask(shared, TEXT, {"prompt": "ab", "max_tokens": 3, "stream": True})
    path = f"/v1/requests/{headers['x-phalanx-request-id']}/stream"
    for last in ("nonsense", "1.2", "4", "-1"):
        status, _, answer = ask(shared, path, method="GET", headers={"last-event-id": last})
        assert (status, answer["error"]["code"]) == (400, "invalid_event_id"), last


def test_a_whole_answer_can_be_read_again(shared: EchoCluster) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 5, "logprobs": 2, "echo": True, "seed": 3}
    _, headers, answer = ask(shared, TEXT, body)
    assert headers["x-phalanx-request-id"] == answer["id"]
    _, _, shown = ask(shared, f"/v1/requests/{answer['id']}", method="GET")
    assert shown["response"] == answer and shown["status"] == "completed"
    assert shown["endpoint"] == TEXT and shown["object"] == "request" and shown["error"] is None
    assert [choice["completion_tokens"] for choice in shown["choices"]] == [5] * 4
    assert text_of(rest(shared, answer["id"], ""), 2) == "xyzxyzxy"


# --------------------------------------------------------------------------- clients that leave


def test_a_stream_that_nobody_takes_up_is_cancelled(shared: EchoCluster) -> None:
    stream = OpenStream(shared, TEXT, {**LONG, "max_tokens": 4000})
    stream.read(2)
    stream.leave()
    time.sleep(0.4)
    assert status_of(shared, stream.id) == "running"
    shared.wait(lambda: status_of(shared, stream.id) == "cancelled", 5)


@pytest.mark.parametrize("wish", ["continue", "cancel"])
def test_the_client_may_say_what_becomes_of_it(shared: EchoCluster, wish: str) -> None:
    stream = OpenStream(shared, TEXT, {**LONG, "max_tokens": 600}, {"x-on-disconnect": wish})
    stream.read(2)
    stream.leave()
    outcome = {"continue": "completed", "cancel": "cancelled"}[wish]
    shared.wait(lambda: status_of(shared, stream.id) != "running", 20)
    assert status_of(shared, stream.id) == outcome


def test_a_request_can_be_ended_by_its_id(shared: EchoCluster) -> None:
    stream = OpenStream(shared, TEXT, {**LONG, "max_tokens": 4000}, {"x-on-disconnect": "continue"})
    stream.read(2)
    _, _, answer = ask(shared, f"/v1/requests/{stream.id}", method="DELETE")
    assert answer == {"id": stream.id, "object": "request", "status": "cancelled"}
    seen = stream.read_until_lost()
    assert seen[-1][1] == b"[DONE]"
    assert json.loads(seen[-2][1])["choices"][0]["finish_reason"] == "abort"
    shown = ask(shared, f"/v1/requests/{stream.id}", method="GET")[2]
    assert shown["choices"][0]["finish_reason"] == "abort"
    assert shown["response"]["choices"][0]["finish_reason"] == "abort"


def test_a_wish_that_is_none_is_refused(shared: EchoCluster) -> None:
    status, _, answer = ask(shared, TEXT, LONG, headers={"x-on-disconnect": "explode"})
    assert status == 400 and "continue, cancel" in answer["error"]["message"]


# --------------------------------------------------------------------------- keys


def test_a_key_leads_to_the_request_that_has_it(shared: EchoCluster) -> None:
    key = {"idempotency-key": "one"}
    body = {**LONG, "max_tokens": 200, "temperature": 1}
    first = OpenStream(shared, TEXT, body, key)
    first.read(3)
    again = {name: body[name] for name in reversed(body)}  # the same in another order
    status, headers, data = ask(shared, TEXT, again, headers=key)
    assert status == 200 and headers["x-phalanx-request-id"] == first.id
    assert text_of(parse_events(data)) == "abcdefgh" * 25
    first.leave()
    for _ in range(2):  # after its end
        assert events(ask(shared, TEXT, body, headers=key)[2])[0]["id"] == first.id


def test_a_key_for_something_else_is_refused(shared: EchoCluster) -> None:
    key = {"idempotency-key": "two"}
    _, _, answer = ask(shared, TEXT, {"prompt": "ab", "max_tokens": 3}, headers=key)
    assert ask(shared, TEXT, {"prompt": "ab", "max_tokens": 3}, headers=key)[2] == answer
    for path, body in ((TEXT, {"prompt": "ab", "max_tokens": 4}), (CHAT, chat("ab", max_tokens=3))):
        status, _, answer = ask(shared, path, body, headers=key)
        assert (status, answer["error"]["code"]) == (422, "idempotency_key_reused")
    status, _, _ = ask(shared, TEXT, {"prompt": "ab"}, headers={"idempotency-key": "k" * 300})
    assert status == 400


@pytest.mark.slow
def test_a_request_with_a_key_outlives_its_client(shared: EchoCluster) -> None:
    key = {"idempotency-key": "three"}
    body = {"prompt": "abcd", "max_tokens": 600, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=30)
    connection.request("POST", TEXT, json.dumps(body), key)
    time.sleep(0.5)
    connection.close()
    time.sleep(2)
    began = time.monotonic()
    _, _, answer = ask(shared, TEXT, body, headers=key)
    assert answer["choices"][0]["text"] == "abcd" * 150
    assert time.monotonic() - began < 20


def test_zmq_requests_with_one_key_are_one(shared: EchoCluster) -> None:
    with Client(shared.zmq) as one, Client(shared.zmq) as two:
        params = SamplingParams(max_tokens=60, logprobs=1)
        stream = one.submit(PROMPT, params)
        outputs = [next(stream) for _ in range(10)]
        [inflight] = one._client._requests.values()
        received = [token for output in outputs for token in output.token_ids]
        # Another connection, as if the first were lost.
        two._client._keys = "other"
        submit = inflight.message

        def again(**changes: Any) -> Any:
            collected: list[Any] = []
            message = msgspec.structs.replace(submit, request_id="x", **changes)
            two._call(lambda: _send(two, message, collected))
            deadline = time.monotonic() + 20
            while not collected or not _is_last(collected[-1]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return collected

        resumed = again(output_token_ids=received)
        tokens = received + [token for output in resumed for token in output.token_ids]
        assert tokens == echo_tokens(PROMPT, 60) and resumed[0].position == len(received)
        logprobs = [entry for output in resumed for entry in output.logprobs or []]
        assert logprobs == [echo_logprobs(token, 1) for token in tokens[len(received) :]]
        assert stream.collect().token_ids == tokens[len(received) :]
        [whole] = again()  # it has ended
        assert whole.token_ids == tokens and whole.finish_reason == "length"
        [failed] = again(output_token_ids=[1, 2, 3])
        assert isinstance(failed, RequestFailed) and "not what the request" in failed.message
        [failed] = again(priority=3)
        assert isinstance(failed, RequestFailed) and "another request" in failed.message


def _send(client: Client, message: Submit, collected: list[Any]) -> None:
    assert client._client._connection is not None
    client._client._requests[message.request_id] = Inflight(collected.append, message)
    client._client._connection.send(message)


def _is_last(event: Any) -> bool:
    return isinstance(event, Exception) or event.finish_reason is not None


# --------------------------------------------------------------------------- fronts that are killed


class Streams:
    """Streams over HTTP and ZeroMQ whose clients come back after every loss."""

    BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
        (TEXT, {"prompt": "http one", "stop": ["|never|", "neo"]}),
        (TEXT, {"prompt": "\u00e9t\u00e9 \u00e0 deux", "n": 2, "logprobs": 1}),
        (CHAT, chat("three", n=3, logprobs=True, top_logprobs=2)),
        (CHAT, chat("four \u2603")),
    )

    def __init__(self, cluster: EchoCluster, max_tokens: int, num_zmq: int = 4) -> None:
        self._cluster = cluster
        self._max_tokens = max_tokens
        self.losses = 0
        self._client = Client(cluster.zmq)
        self._client.connect()
        self._threads = ThreadPoolExecutor(16)
        self._http = [self._threads.submit(self._follow, path, body) for path, body in self.BODIES]
        self._zmq = [self._threads.submit(self._collect, number) for number in range(num_zmq)]
        time.sleep(1)

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"include_usage": True}
        more = {"max_tokens": self._max_tokens, "ignore_eos": True, "seed": 7, "stream_options": usage}
        return {**body, **more, "stream": True}

    def _follow(self, path: str, body: dict[str, Any]) -> list[tuple[str, bytes]]:
        stream = OpenStream(self._cluster, path, self._body(body))
        request_id = stream.id
        seen = stream.read_until_lost()
        while not seen or seen[-1][1] != b"[DONE]":
            self.losses += 1
            time.sleep(0.05)
            last = {"last-event-id": seen[-1][0]} if seen else {}
            try:
                stream = OpenStream(self._cluster, f"/v1/requests/{request_id}/stream", None, last)
                assert stream.response.status == 200, stream.response.read()
                seen += stream.read_until_lost()
            except (http.client.HTTPException, OSError):
                continue
        return seen

    def _collect(self, number: int) -> tuple[str, list[int], list[int], Any]:
        params = SamplingParams(max_tokens=self._max_tokens, logprobs=1 if number % 2 else None, seed=1)
        tokens: list[int] = []
        positions: list[int] = []
        logprobs: list[Any] = []
        text = ""
        # Text and token ids in turn: an "a" is token 67 of the test's tokenizer.
        prompt = [70 + number, *PROMPT] if number % 2 else "a" * (number + 1)
        for output in self._client.submit(prompt, params):
            positions.append(output.position - len(tokens))
            tokens += output.token_ids
            logprobs += output.logprobs or []
            text += output.text or ""
        return text, tokens, positions, logprobs

    def check(self) -> None:
        """Waits for all of them; each is what an undisturbed one is."""
        for future, (path, body) in zip(self._http, self.BODIES, strict=True):
            seen = future.result(90)
            whole = parse_events(ask(self._cluster, path, self._body(body))[2])
            for index in range(body.get("n", 1)):
                assert text_of(seen, index) == text_of(whole, index) != "", path
            assert _all_logprobs(seen) == _all_logprobs(whole)
            assert seen[-1] == whole[-1]
            assert json.loads(seen[-2][1])["usage"] == json.loads(whole[-2][1])["usage"]
            finishes = [data for _, data in seen if b'finish_reason":"' in data]
            assert len(finishes) == body.get("n", 1)
        for number, following in enumerate(self._zmq):
            text, tokens, positions, logprobs = following.result(90)
            prompt = [70 + number, *PROMPT] if number % 2 else [67] * (number + 1)
            expected = echo_tokens(prompt, self._max_tokens)
            assert tokens == expected and set(positions) == {0}
            assert len(text) == self._max_tokens
            assert logprobs == ([echo_logprobs(token, 1) for token in expected] if number % 2 else [])
        self._client.close()
        self._threads.shutdown()


def _all_logprobs(chunks: list[tuple[str, bytes]]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for _, data in chunks:
        for choice in json.loads(data)["choices"] if data != b"[DONE]" else []:
            logprobs = choice["logprobs"]
            if logprobs and "content" in logprobs:
                found.setdefault(choice["index"], []).extend(logprobs["content"])
            elif logprobs:
                entries = zip(*(logprobs[name] for name in sorted(logprobs)), strict=True)
                found.setdefault(choice["index"], []).extend(entries)
    return found


def test_a_front_may_be_killed_twice_in_the_middle_of_streams(cluster: EchoCluster) -> None:
    streams = Streams(cluster, 600)
    for _ in range(2):
        cluster.restart_front()
        cluster.wait_serving(cluster.epoch)
        time.sleep(0.5)
    streams.check()
    assert streams.losses >= 8
    log = cluster.front_log.read_text()
    assert log.count('"event": "calls taken up"') == 2 and "moved aside" not in log


@pytest.mark.slow
def test_a_front_may_be_killed_while_there_is_no_world(cluster: EchoCluster) -> None:
    streams = Streams(cluster, 500)
    cluster.kill_world()
    cluster.wait_serving(None)
    cluster.restart_front()
    cluster.wait(lambda: bool(cluster.states))
    time.sleep(0.5)
    cluster.restart_front()
    cluster.wait_serving(cluster.start_world())
    streams.check()


def test_rank_0_forgets_the_requests_of_a_dead_front(cluster: EchoCluster) -> None:
    body = {**LONG, "max_tokens": 4000}
    streams = [OpenStream(cluster, TEXT, body) for _ in range(3)]
    for stream in streams:
        stream.read(1)
    cluster.restart_front()
    cluster.wait_serving(cluster.epoch)

    def blocks_used() -> float:
        text = cluster.get("/metrics")[1].decode()
        line = next(line for line in text.splitlines() if line.startswith("phalanx_kv_blocks_used{"))
        return float(line.split()[-1])

    cluster.wait(lambda: blocks_used() == 3)
    for stream in streams:
        ask(cluster, f"/v1/requests/{stream.id}", method="DELETE")
    cluster.wait(lambda: blocks_used() == 0)


def test_keys_and_deadlines_outlive_a_front(cluster: EchoCluster) -> None:
    key = {"idempotency-key": "k"}
    body = {"prompt": "abcd", "max_tokens": 300, "ignore_eos": True}
    _, _, done = ask(cluster, TEXT, {**body, "max_tokens": 5}, headers={"idempotency-key": "done"})
    with ThreadPoolExecutor(1) as thread:
        lost = thread.submit(ask, cluster, TEXT, body, headers=key)
        limited = OpenStream(cluster, TEXT, {**LONG, "max_tokens": 4000, "timeout": 4})
        began = time.monotonic()
        seen = limited.read(2)
        cluster.restart_front()
        with pytest.raises((http.client.HTTPException, OSError)):
            lost.result(10)
    cluster.wait_serving(cluster.epoch)
    _, headers, answer = ask(cluster, TEXT, body, headers=key)
    assert answer["choices"][0]["text"] == "abcd" * 75
    assert ask(cluster, TEXT, {**body, "max_tokens": 5}, headers={"idempotency-key": "done"})[2] == done
    status, _, refused = ask(cluster, TEXT, {**body, "max_tokens": 7}, headers=key)
    assert (status, refused["error"]["code"]) == (422, "idempotency_key_reused")
    _, _, shown = ask(cluster, f"/v1/requests/{headers['x-phalanx-request-id']}", method="GET")
    assert shown["response"] == answer
    # The deadline counts from the acceptance, whatever happened meanwhile. On a busy machine it may be over by now.
    status, _, left = ask(
        cluster, f"/v1/requests/{limited.id}/stream?last_event_id={seen[-1][0]}", method="GET"
    )
    ending = left if status == 408 else json.loads(parse_events(left)[-2][1])
    assert ending["error"]["code"] == "timeout"
    assert 3.5 < time.monotonic() - began < 12


@pytest.mark.slow
def test_a_front_killed_without_a_journal_on_disk_leaves_nothing(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, front_options=("--journal", "off")) as cluster:
        cluster.wait_serving(cluster.start_world())
        stream = OpenStream(cluster, TEXT, LONG)
        seen = stream.read(5)
        stream.leave()
        taken_up = seen + rest(cluster, stream.id, seen[-1][0])
        assert text_of(taken_up) == "abcdefgh" * 50  # in the life of the front
        assert not list(tmp_path.glob("journal*"))
        cluster.restart_front()
        cluster.wait_serving(cluster.epoch)
        assert ask(cluster, f"/v1/requests/{stream.id}", method="GET")[0] == 404


def test_zmq_goes_on_by_itself_even_if_the_journal_is_lost(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, front_options=("--journal", "off")) as cluster:
        cluster.wait_serving(cluster.start_world())
        with Client(cluster.zmq) as client:
            stream = client.submit(PROMPT, SamplingParams(max_tokens=300))
            tokens = list(next(stream).token_ids)
            cluster.restart_front()
            tokens += stream.collect().token_ids
            assert tokens == echo_tokens(PROMPT, 300)


def test_a_damaged_journal_does_not_keep_a_front_from_starting(cluster: EchoCluster) -> None:
    cluster.front.kill()
    cluster.front.wait()
    path = cluster.run_dir / "journal.sqlite"
    path.write_bytes(b"damage" * 5000)
    path.with_name("journal.sqlite-wal").unlink()  # it would heal it
    cluster.restart_front()
    cluster.wait_serving(cluster.epoch)
    assert ask(cluster, TEXT, {"prompt": "ab", "max_tokens": 3})[0] == 200
    assert '"event": "journal moved aside"' in cluster.front_log.read_text()


def test_a_tokenizer_that_is_written_again_costs_no_call(cluster: EchoCluster) -> None:
    stream = OpenStream(cluster, TEXT, LONG)
    stream.read(20)
    file = cluster.model_dir / "tokenizer.json"
    content = json.loads(file.read_bytes())
    file.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    cluster.restart_front()
    seen = stream.read_until_lost()
    cluster.wait_serving(cluster.epoch)
    assert text_of(seen + rest(cluster, stream.id, seen[-1][0])) == "abcdefgh" * 50
    # Where its tokens mean something else, whoever asks is told what became of the journal.
    content["added_tokens"][0]["content"] = "<|another|>"
    file.write_text(json.dumps(content))
    cluster.restart_front()
    cluster.wait_serving(cluster.epoch)
    status, _, answer = ask(cluster, f"/v1/requests/{stream.id}", method="GET")
    assert status == 404 and "had to put its journal aside" in answer["error"]["message"]
    assert "another model's tokenizer" in cluster.front_log.read_text()
    assert "had to put its journal aside" in (cluster.states[-1].notice or ""), "the supervisor tells it"


def test_requests_without_a_call_do_not_confuse_the_next_front(cluster: EchoCluster) -> None:
    for _ in range(4):  # these are counted, too, and are in no journal
        assert ask(cluster, "/v1/embeddings", {"input": "abc"})[0] == 200
    stream = OpenStream(cluster, TEXT, LONG)
    seen = stream.read(20)
    cluster.restart_front()
    seen = stream.read_until_lost() or seen
    cluster.wait_serving(cluster.epoch)
    for _ in range(6):
        assert ask(cluster, TEXT, {"prompt": "abc", "max_tokens": 2})[0] == 200
    assert text_of(seen + rest(cluster, stream.id, seen[-1][0])) == "abcdefgh" * 50


def test_two_fronts_of_one_run_folder_are_one_too_many(cluster: EchoCluster) -> None:
    second = cluster._start_front()
    assert second.wait(20) == 1
    assert "is in use by another front" in cluster.front_log.read_text()
    assert ask(cluster, TEXT, {"prompt": "ab", "max_tokens": 3})[0] == 200


def test_a_full_disk_refuses_new_requests_and_finishes_old_ones(tmp_path: Path) -> None:
    with small_disk(tmp_path / "run") as folder, EchoCluster(folder) as cluster:
        cluster.wait_serving(cluster.start_world())
        stream = OpenStream(cluster, TEXT, {**LONG, "max_tokens": 1000})
        stream.read(2)
        fill(folder)
        big = {"prompt": [40] * 3000, "max_tokens": 1}

        def refused() -> bool:
            status, headers, answer = ask(cluster, TEXT, big)
            if status == 200:
                return False
            assert status == 503 and "retry-after" in headers
            assert answer["error"]["code"] == "unavailable"
            message = answer["error"]["message"]
            assert "refused, since the journal cannot be written" in message and "full" in message
            return True

        cluster.wait(refused)
        status, body = cluster.get("/health/ready")
        assert status == 503 and b"journal cannot be written" in body
        assert cluster.get("/health/live")[0] == 200
        assert "full" in json.loads(cluster.get("/cluster")[1])["front"]["journal_failing"]
        assert b'phalanx_journal_failing{model="echo"} 1.0' in cluster.get("/metrics")[1]
        chunks = stream.read_until_lost()
        assert chunks[-1][1] == b"[DONE]" and text_of(chunks) == "abcdefgh" * 125
        (folder / "filler").unlink()
        cluster.wait(lambda: ask(cluster, TEXT, big)[0] == 200)
        assert cluster.get("/health/ready")[0] == 200
        assert b'phalanx_journal_failing{model="echo"} 0.0' in cluster.get("/metrics")[1]
        log = cluster.front_log.read_text()
        # (The log itself lies on the disk that was full.)
        assert '"event": "journal can be written again"' in log
        assert status_of(cluster, stream.id) == "completed"
