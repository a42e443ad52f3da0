"""The front as a real process over echo worlds: streams outlive their worlds, nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from gateway.client import Client, ConnectionLost, RequestFailed, SamplingParams
from gateway.protocol import Limits, Output, Submit, TokenLogprobs
from gateway.rank0 import Rank0Gateway
from tests.echo_world import END_TOKEN, ROOT, EchoCluster, echo_tokens, write_text_folder

PROMPT = list(range(10, 33))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path) as cluster:
        yield cluster


def api(cluster: EchoCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def serve(cluster: EchoCluster) -> int:
    epoch = cluster.start_world()
    cluster.wait_serving(epoch)
    return epoch


def num_running(cluster: EchoCluster) -> float:
    """Requests in the engine, as it reports itself."""
    text = cluster.get("/metrics")[1].decode()
    line = next(line for line in text.splitlines() if line.startswith("phalanx_kv_blocks_used{"))
    return float(line.split()[-1])


def post(cluster: EchoCluster, path: str, body: dict[str, object]) -> urllib.request.Request:
    return urllib.request.Request(cluster.url + path, json.dumps(body).encode())


class Streams:
    """Many HTTP and ZeroMQ streams at once, each with its own prompt, checked token by token."""

    def __init__(self, cluster: EchoCluster, num_http: int, num_zmq: int, max_tokens: int) -> None:
        self._api = api(cluster)
        self._max_tokens = max_tokens
        self._client = Client(cluster.zmq)
        self._client.connect()
        self._threads = ThreadPoolExecutor(num_http + num_zmq)
        self._begun = threading.Semaphore(0)
        self._futures = [self._threads.submit(self._http, number) for number in range(num_http)]
        self._futures += [self._threads.submit(self._zmq, number) for number in range(num_zmq)]
        for _ in self._futures:
            assert self._begun.acquire(timeout=30)

    @property
    def open(self) -> int:
        return sum(not future.done() for future in self._futures)

    def check(self) -> None:
        """Waits for all of them."""
        for future in self._futures:
            future.result(60)
        self._client.close()
        self._threads.shutdown()

    def _http(self, number: int) -> None:
        text = f"http {number:03}|"  # as many tokens as characters
        received = []
        for chunk in self._api.completions.create(
            model="echo", prompt=text, max_tokens=self._max_tokens, stream=True
        ):
            received.append(chunk.choices[0].text)
            if len(received) == 1:
                self._begun.release()
        assert "".join(received) == (text * self._max_tokens)[: self._max_tokens]

    def _zmq(self, number: int) -> None:
        prompt = [40 + number % 100, *PROMPT]
        outputs = []
        for output in self._client.submit(prompt, SamplingParams(max_tokens=self._max_tokens)):
            outputs.append(output)
            if len(outputs) == 1:
                self._begun.release()
        assert [t for output in outputs for t in output.token_ids] == echo_tokens(prompt, self._max_tokens)
        position = 0
        for output in outputs:
            assert output.position == position
            position += len(output.token_ids)


# --------------------------------------------------------------------------- worlds that end


def test_a_killed_world_is_not_seen_in_any_stream(cluster: EchoCluster) -> None:
    first = serve(cluster)
    streams = Streams(cluster, 32, 32, max_tokens=400)
    cluster.kill_world(first)
    assert streams.open == 64
    cluster.wait_serving(None)
    assert cluster.get("/health/ready")[0] == 503
    cluster.wait(lambda: b"no world is there" in cluster.get("/health/ready")[1])
    assert cluster.get("/health/live")[0] == 200 and cluster.get("/health")[0] == 503
    assert json.loads(cluster.get("/health/accepting")[1]) == {"accepting": True, "held": True}
    second = serve(cluster)
    streams.check()
    assert cluster.get("/health/ready")[0] == 200
    resumed = [state.resumed_at for state in cluster.states if state.serving_epoch == second]
    assert resumed[-1] is not None and time.time() - 30 < resumed[-1] < time.time()


def test_worlds_may_end_one_after_another(cluster: EchoCluster) -> None:
    serve(cluster)
    streams = Streams(cluster, 8, 8, max_tokens=600)
    for _ in range(4):
        time.sleep(0.3)
        cluster.kill_world()
        serve(cluster)
    streams.check()


def test_the_front_need_not_be_told_that_a_world_is_gone(cluster: EchoCluster) -> None:
    first = serve(cluster)
    streams = Streams(cluster, 4, 4, max_tokens=400)
    cluster.kill_world(first, announce=False)
    cluster.wait_serving(None)  # the table still calls it active
    cluster.forget_world(first)
    serve(cluster)
    streams.check()


def test_what_a_world_says_after_its_end_is_dropped(cluster: EchoCluster) -> None:
    first = serve(cluster)
    streams = Streams(cluster, 8, 8, max_tokens=600)
    cluster.freeze_world(first)
    frozen = cluster.forget_world(first)
    cluster.wait_serving(None)
    serve(cluster)
    frozen.send_signal(signal.SIGCONT)  # it goes on with its old requests
    streams.check()
    frozen.kill()
    frozen.wait()
    text = cluster.get("/metrics")[1].decode()
    assert 'phalanx_position_errors_total{model="echo"} 0.0' in text


def test_a_spare_is_not_used_and_an_older_world_gives_way(cluster: EchoCluster) -> None:
    first = serve(cluster)
    spare = cluster.start_world(state="spare")
    third = cluster.start_world()
    cluster.wait_serving(third)
    assert [state.serving_epoch for state in cluster.states][-1] == third
    cluster.kill_world(third)
    cluster.wait_serving(first)
    worlds = json.loads(cluster.get("/cluster")[1])["worlds"]
    assert [(world["epoch"], world["state"]) for world in worlds] == [(first, "active"), (spare, "spare")]


def test_a_gateway_of_another_epoch_is_not_believed(cluster: EchoCluster) -> None:
    with_old_port = Rank0Gateway("tcp://127.0.0.1:*", 4, "echo", 1, 1, Limits(100, 100, 8, 300), [2])
    cluster.announce_gateway(with_old_port.endpoint, 5)
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        with_old_port.receive(0.05)
    cluster.wait(lambda: bool(cluster.states))
    assert cluster.states[-1].serving_epoch is None
    assert cluster.get("/health/ready")[0] == 503
    assert cluster.get("/health/accepting")[0] == 503, "no world has served yet"
    with_old_port.close()


class DrivenWorld:
    """A real gateway whose tokens the test chooses."""

    def __init__(self, cluster: EchoCluster, epoch: int = 1) -> None:
        self.gateway = Rank0Gateway("tcp://127.0.0.1:*", epoch, "echo", 1, 1, Limits(500, 500, 8, 300), [2])
        cluster.announce_gateway(self.gateway.endpoint, epoch)
        self._submits: list[tuple[bytes, Submit]] = []
        deadline = time.monotonic() + 10
        while not cluster.states or cluster.states[-1].serving_epoch != epoch:
            assert time.monotonic() < deadline
            self._turn()

    def next_submit(self) -> tuple[bytes, Submit]:
        deadline = time.monotonic() + 10
        while not self._submits:
            assert time.monotonic() < deadline, "no request came"
            self._turn()
        return self._submits.pop(0)

    def _turn(self) -> None:
        for client, message in self.gateway.receive(0.05):
            if isinstance(message, Submit):
                self._submits.append((client, message))

    def send(self, client: bytes, *outputs: Output) -> None:
        self.gateway.send_tokens(1, [(client, output) for output in outputs])


def test_repeated_and_missing_positions_are_never_delivered(cluster: EchoCluster) -> None:
    world = DrivenWorld(cluster)
    with ThreadPoolExecutor(1) as thread:
        body = {"prompt": [70, 71], "max_tokens": 6, "seed": 9}
        answer = thread.submit(urllib.request.urlopen, post(cluster, "/v1/completions", body), timeout=20)
        client, first = world.next_submit()
        letters = [3 + 64 + n for n in range(6)]  # bytes 97 to 102 of the test's tokenizer
        world.send(client, Output(first.request_id, 0, letters[:2]))
        world.send(client, Output(first.request_id, 0, letters[:2]))  # repeated as a whole
        world.send(client, Output(first.request_id, 1, letters[1:4]))  # repeated in part
        world.send(client, Output(first.request_id, 5, letters[5:]))  # a gap
        client, second = world.next_submit()
        assert second.request_id != first.request_id
        assert (second.prompt_token_ids, second.output_token_ids) == ([70, 71], letters[:4])
        assert second.params == first.params and first.params.seed == 9
        world.send(client, Output(first.request_id, 4, [99]))  # late, of the submission that was given up
        world.send(client, Output(second.request_id, 4, letters[4:], "length"))
        choice = json.load(answer.result(20))["choices"][0]
    world.gateway.close()
    tokens = "".join(chr(letter - 67 + 97) for letter in letters)
    assert len(choice["text"]) == len(tokens) and choice["finish_reason"] == "length"
    text = cluster.get("/metrics")[1].decode()
    assert 'phalanx_position_errors_total{model="echo"} 3.0' in text
    assert cluster.front_log.read_text().count('"event": "position"') == 3


def test_a_request_without_a_seed_gets_one_and_keeps_it(cluster: EchoCluster) -> None:
    world = DrivenWorld(cluster, 1)
    with Client(cluster.zmq) as zmq_client:
        streams = [zmq_client.submit(PROMPT, SamplingParams(max_tokens=3)) for _ in range(2)]
        submits = [world.next_submit()[1] for _ in streams]
        seeds = [submit.params.seed for submit in submits]
        assert None not in seeds and seeds[0] != seeds[1]
        world.gateway.close()
        later = DrivenWorld(cluster, 2)
        again = [later.next_submit()[1].params.seed for _ in streams]
        assert again == seeds
        later.gateway.close()


def test_a_request_that_rank_0_cancels_by_itself_goes_on(cluster: EchoCluster) -> None:
    world = DrivenWorld(cluster)
    with Client(cluster.zmq) as zmq_client:
        stream = zmq_client.submit(PROMPT, SamplingParams(max_tokens=3))
        client, first = world.next_submit()
        world.send(client, Output(first.request_id, 0, [70]))
        world.send(client, Output(first.request_id, 1, [], "cancelled"))
        client, second = world.next_submit()
        assert second.output_token_ids == [70]
        world.send(client, Output(second.request_id, 1, [71, 72], "length"))
        assert stream.collect().token_ids == [70, 71, 72]
    world.gateway.close()


def test_what_the_front_does_not_use_itself_passes_through(cluster: EchoCluster) -> None:
    world = DrivenWorld(cluster)
    params = SamplingParams(max_tokens=4, seed=1, logprobs=2, frequency_penalty=0.5, logit_bias={5: 1.0})
    with Client(cluster.zmq) as zmq_client:
        stream = zmq_client.submit("ab", params, stop=["!#"])
        client, submit = world.next_submit()
        assert submit.params == params
        logprobs = [TokenLogprobs(3 + n, -0.5 - n, 1, [7], [-1.0]) for n in range(4)]
        prompt = [TokenLogprobs(68, -2.0, 3, [], [])]
        world.send(client, Output(submit.request_id, 0, [4], logprobs=logprobs[:1], prompt_logprobs=prompt))
        first = next(stream)
        assert (first.logprobs, first.prompt_logprobs) == (logprobs[:1], prompt)
        # The stop string is complete with the second of these; what follows never was.
        world.send(client, Output(submit.request_id, 1, [3, 5, 6], "length", logprobs=logprobs[1:]))
        last = next(stream)
        assert (last.token_ids, last.logprobs, last.finish_reason) == ([3, 5], logprobs[1:3], "stop")
    world.gateway.close()


def test_prompt_logprobs_that_came_are_not_asked_for_again(cluster: EchoCluster) -> None:
    world = DrivenWorld(cluster, 1)
    params = SamplingParams(max_tokens=3, seed=1, logprobs=0, prompt_logprobs=0)
    entries = [TokenLogprobs(71, -0.5, 1, [], [])]
    with Client(cluster.zmq) as zmq_client:
        streams = [zmq_client.submit([70, 71], params, priority=-4) for _ in range(2)]
        client, first = world.next_submit()
        world.next_submit()
        world.send(client, Output(first.request_id, 0, [70], logprobs=entries, prompt_logprobs=entries))
        assert next(streams[0]).prompt_logprobs == entries
        world.gateway.close()
        later = DrivenWorld(cluster, 2)
        again = [later.next_submit()[1] for _ in streams]
        assert [submit.params.prompt_logprobs for submit in again] == [0, None]  # the shorter one first
        assert all(submit.params.logprobs == 0 and submit.priority == -4 for submit in again)
        later.gateway.close()


def test_a_zmq_request_has_a_deadline(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as zmq_client:
        stream = zmq_client.submit(PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True), deadline_s=0.3)
        with pytest.raises(RequestFailed, match=r"timeout of 0\.3 s") as error:
            stream.collect()
        assert error.value.code == "timeout"
        cluster.wait(lambda: num_running(cluster) == 0)


# --------------------------------------------------------------------------- outages and admission


def test_new_requests_wait_for_a_world(cluster: EchoCluster) -> None:
    cluster.wait(lambda: bool(cluster.states))
    with ThreadPoolExecutor(3) as threads:
        plain = threads.submit(api(cluster).completions.create, model="echo", prompt="abc", max_tokens=4)
        stream = threads.submit(
            lambda: [
                chunk.choices[0].text
                for chunk in api(cluster).completions.create(
                    model="echo", prompt="abc", max_tokens=4, stream=True
                )
            ]
        )
        zmq_client = Client(cluster.zmq)
        connected = threads.submit(zmq_client.connect)
        time.sleep(0.5)
        assert not plain.done() and not stream.done() and not connected.done()
        serve(cluster)
        assert plain.result(10).choices[0].text == "abca"
        assert "".join(stream.result(10)) == "abca"
        assert connected.result(10).epoch == 0
        zmq_client.close()


@pytest.mark.parametrize("has_served", [False, True])
def test_a_request_that_no_world_comes_for_is_refused_with_503(tmp_path: Path, has_served: bool) -> None:
    with EchoCluster(tmp_path, max_wait_s=0.5) as cluster:
        cluster.wait(lambda: bool(cluster.states))
        if has_served:
            cluster.kill_world(serve(cluster))
            cluster.wait_serving(None)
        for stream in (False, True):
            start = time.monotonic()
            with pytest.raises(urllib.error.HTTPError) as error:
                body = {"prompt": "abc", "stream": stream}
                urllib.request.urlopen(post(cluster, "/v1/completions", body), timeout=10)
            assert 0.4 < time.monotonic() - start < 3
            assert error.value.code == 503
            assert int(error.value.headers["retry-after"]) >= 1
            assert json.load(error.value)["error"]["code"] == "unavailable"
        assert cluster.get("/health/accepting")[0] == 503, "away for longer than requests are held"
        if has_served:
            with Client(cluster.zmq) as client, pytest.raises(RequestFailed) as failure:
                client.generate("abc")
            assert failure.value.code == "unavailable"


def test_too_many_waiting_requests_are_refused_with_429(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, front_options=("--max-waiting", "4")) as cluster:
        cluster.kill_world(serve(cluster))
        cluster.wait_serving(None)
        with ThreadPoolExecutor(4) as threads:
            waiting = [
                threads.submit(api(cluster).completions.create, model="echo", prompt="abc", max_tokens=4)
                for _ in range(4)
            ]
            cluster.wait(lambda: b'requests_live{model="echo"} 4.0' in cluster.get("/metrics")[1])
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(post(cluster, "/v1/completions", {"prompt": "abc"}), timeout=10)
            assert error.value.code == 429 and int(error.value.headers["retry-after"]) >= 1
            with Client(cluster.zmq) as client, pytest.raises(RequestFailed) as failure:
                client.generate("abc")
            assert failure.value.code == "overloaded"
            serve(cluster)
            assert all(future.result(10).choices[0].text == "abca" for future in waiting)
            assert api(cluster).completions.create(model="echo", prompt="ab", n=4, max_tokens=1)
            with pytest.raises(openai.BadRequestError):
                api(cluster).completions.create(model="echo", prompt="ab", n=5)


def test_a_stream_in_an_outage_is_kept_alive_with_comments(cluster: EchoCluster) -> None:
    serve(cluster)
    body: dict[str, object] = {"prompt": "abcdefgh", "max_tokens": 300, "stream": True}
    asked = post(cluster, "/v1/completions", body)
    asked.add_header("accept", "text/event-stream")
    with (
        ThreadPoolExecutor(1) as thread,
        urllib.request.urlopen(asked, timeout=20) as response,
    ):
        # OpenAI's client must not stumble over them.
        client = api(cluster)
        chunks = client.completions.create(model="echo", prompt="abcdefgh", max_tokens=300, stream=True)
        text = thread.submit(lambda: "".join(chunk.choices[0].text for chunk in chunks))
        assert response.readline() == b"id: 1\n"
        cluster.kill_world()
        lines = iter(response.readline, b"")
        events = (b"id: ", b"data: ", b"\n")
        assert next(line for line in lines if not line.startswith(events)) == b": keep-alive\n"
        serve(cluster)
        *_, done = [line for line in lines if line.strip()]
        assert done == b"data: [DONE]\n"
        assert text.result(30) == ("abcdefgh" * 38)[:300]


# --------------------------------------------------------------------------- ends of requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_is_cancelled_in_the_engine(cluster: EchoCluster, stream: bool) -> None:
    serve(cluster)
    body = json.dumps({"prompt": "abc", "max_tokens": 4000, "n": 3, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", cluster.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        cluster.wait(lambda: num_running(cluster) == 3)
    cluster.wait(lambda: num_running(cluster) == 0)


def test_a_zmq_client_that_goes_away_is_cancelled_in_the_engine(cluster: EchoCluster) -> None:
    serve(cluster)
    client = Client(cluster.zmq)
    client.connect()
    for _ in range(3):
        client.submit(PROMPT, SamplingParams(max_tokens=4000))
    cluster.wait(lambda: num_running(cluster) == 3)
    client.close()
    cluster.wait(lambda: num_running(cluster) == 0)


def test_a_stop_string_ends_the_request_in_the_engine(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as client:
        generation = client.generate("one two ", SamplingParams(max_tokens=4000), stop=["e tw", "zzz"])
        assert (generation.text, generation.finish_reason, generation.stop_reason) == ("on", "stop", "e tw")
        assert len(generation.token_ids) == 6
        cluster.wait(lambda: num_running(cluster) == 0)


def test_a_stop_string_may_span_two_worlds(cluster: EchoCluster) -> None:
    text = "b" * 200 + "abcdefghij" * 20  # the match begins at 199, long after the first world is gone
    serve(cluster)
    with Client(cluster.zmq) as client:
        stream = client.submit(text, SamplingParams(max_tokens=3000), stop=["b" + "abcdefghij" * 20])
        first = next(stream)
        cluster.kill_world()
        serve(cluster)
        generation = stream.collect()
    assert generation.stop_reason == "b" + "abcdefghij" * 20
    assert (first.text or "") + generation.text == "b" * 199


# --------------------------------------------------------------------------- ZeroMQ clients


def test_zmq_clients_send_text_and_get_text(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as client:
        assert client.welcome.model == "echo" and client.welcome.epoch == 0
        assert client.welcome.limits.max_model_len == 4096
        generation = client.generate("héllo ", SamplingParams(max_tokens=11))
        assert generation.text == ("héllo " * 3)[: len(generation.text)] and len(generation.text) > 8
        outputs = list(client.submit("a", SamplingParams(max_tokens=3)))
        assert [output.text for output in outputs] == ["a", "a", "a"]


def test_zmq_clients_continue_what_they_have(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as client:
        stream = client.submit(PROMPT, SamplingParams(max_tokens=9), output_token_ids=echo_tokens(PROMPT, 4))
        assert stream.collect().token_ids == echo_tokens(PROMPT, 9)[4:]


def test_zmq_clients_cancel(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as client:
        stream = client.submit(PROMPT, SamplingParams(max_tokens=4000))
        next(stream)
        stream.cancel()
        assert stream.collect().finish_reason == "cancelled"
        cluster.wait(lambda: num_running(cluster) == 0)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        (PROMPT, {"params": SamplingParams(max_tokens=5000)}, "maximum length of this model is 4096"),
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([100_000], {}, "vocabulary"),
        (PROMPT, {"stop": ["a", ""]}, "stop string is empty"),
        (PROMPT, {"output_token_ids": PROMPT}, "max_tokens is 16"),
    ],
)
def test_zmq_clients_are_told_what_is_wrong(
    shared: EchoCluster, prompt: str | list[int], options: dict[str, object], says: str
) -> None:
    with Client(shared.zmq) as client:
        with pytest.raises(RequestFailed, match=says) as error:
            client.submit(prompt, **options).collect()  # type: ignore[arg-type]
        assert error.value.code == "invalid_request"


def test_long_texts_are_tokenized_aside_and_may_be_cancelled(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq) as client:
        # Not more characters than 4096 of the longest token could be: they have to be counted.
        stream = client.submit("z" * 40_000, SamplingParams(max_tokens=5))
        stream.cancel()
        assert stream.collect().finish_reason == "cancelled"
        with pytest.raises(RequestFailed, match="the prompt has 40000 tokens"):
            client.generate("z" * 40_000)
        start = time.monotonic()
        with pytest.raises(RequestFailed, match="5000000 characters, which are more than 4096 tokens"):
            client.generate("z" * 5_000_000)
        assert time.monotonic() - start < 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("shared")) as cluster:
        serve(cluster)
        yield cluster


def test_clients_learn_that_the_front_ended(cluster: EchoCluster) -> None:
    serve(cluster)
    with Client(cluster.zmq, reconnect_s=1.0) as client:
        stream = client.submit(PROMPT, SamplingParams(max_tokens=4000))
        next(stream)
        cluster.front.kill()
        with pytest.raises(ConnectionLost, match="did not come back within 1 s"):
            stream.collect()
    with pytest.raises(ConnectionLost):
        client.submit(PROMPT)
    cluster.front.wait()


# --------------------------------------------------------------------------- the process


def test_sigterm_ends_it_soon_and_open_streams_with_a_reason(cluster: EchoCluster) -> None:
    serve(cluster)
    body: dict[str, object] = {"prompt": "abcdefgh", "max_tokens": 4000, "stream": True}
    with urllib.request.urlopen(post(cluster, "/v1/completions", body), timeout=20) as response:
        response.readline()
        start = time.monotonic()
        cluster.front.terminate()
        lines = [line for line in response.read().splitlines() if line]
    assert lines[-1] == b"data: [DONE]"
    assert json.loads(lines[-2].removeprefix(b"data: "))["error"]["code"] == "unavailable"
    assert cluster.front.wait(5) == 0
    assert time.monotonic() - start < 3


def test_a_taken_zmq_endpoint_is_one_clear_line(tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = ["--model-dir", str(folder), "--served-model-name", "echo"]
        arguments += ["--http-fd", str(listener.fileno()), "--control", f"ipc://{tmp_path}/control.sock"]
        arguments += ["--zmq", f"tcp://127.0.0.1:{taken.getsockname()[1]}"]
        result = subprocess.run(
            [sys.executable, "-m", "gateway.front", *arguments],
            cwd=ROOT,
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert result.returncode == 78
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("phalanx: error: --zmq: cannot listen at tcp://127.0.0.1:")


def test_a_folder_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, model_dir=tmp_path / "empty") as cluster:
        assert cluster.front.wait(20) == 78
        log = cluster.front_log.read_text()
    assert log.startswith("phalanx: error: ") and "tokenizer.json is missing" in log


@pytest.mark.slow
def test_an_orphaned_front_ends_itself(tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path / "model")
    starter = (
        "import socket, subprocess, sys\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "front = subprocess.Popen([sys.executable, '-m', 'gateway.front', '--model-dir', sys.argv[1],"
        " '--served-model-name', 'echo', '--http-fd', str(listener.fileno()), '--zmq', 'tcp://127.0.0.1:*',"
        " '--control', sys.argv[2]], pass_fds=[listener.fileno()], stdout=2)\n"
        "print(front.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, str(folder), f"ipc://{tmp_path}/control.sock"],
        cwd=ROOT,
        env={**os.environ, "PHALANX_ADOPTION_WAIT_S": "4"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    front = int(parent.stdout.readline())
    time.sleep(2)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{front}").exists() and "State:\tZ" not in Path(f"/proc/{front}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_front_whose_supervisor_ends_during_its_imports_is_orphaned(tmp_path: Path) -> None:
    """Its parent is another process by the time it can look, and that one may live for ever."""
    folder = write_text_folder(tmp_path / "model")
    supervisor = (
        "import os, socket, sys, zmq\n"
        "from pathlib import Path\n"
        "from launcher.front_process import FrontProcess\n"
        "folder, run_dir = map(Path, sys.argv[1:])\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "control = run_dir / 'control.sock'\n"
        "command = [sys.executable, '-m', 'gateway.front', '--model-dir', str(folder),"
        " '--served-model-name', 'echo', '--http-fd', str(listener.fileno()), '--zmq', 'tcp://127.0.0.1:*',"
        " '--control', f'ipc://{control}', '--run-dir', str(run_dir)]\n"
        "front = FrontProcess(zmq.Context(), command, dict(os.environ), listener, control, run_dir / 'front.log')\n"
        "front.start()\n"
        "print(front.process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    started = subprocess.run(
        [sys.executable, "-c", supervisor, str(folder), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PHALANX_ADOPTION_WAIT_S": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    front = int(started.stdout)
    status = Path(f"/proc/{front}/status")
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():
        if time.monotonic() > deadline:
            os.kill(front, signal.SIGKILL)
            pytest.fail("the front runs on without a supervisor")
        time.sleep(0.05)
    log = (tmp_path / "front.log").read_text()
    assert "supervisor gone" in log and "orphaned" in log, log
    assert not (tmp_path / "control.sock").exists() and not (tmp_path / "listen.sock").exists()


def test_a_front_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, gateway.front\n"
        "heavy = {'torch', 'transformers', 'numpy', 'engine', 'launcher'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_it_sleeps_when_there_is_nothing_to_do(cluster: EchoCluster) -> None:
    serve(cluster)
    log = cluster.front_log.read_text()
    ticks = os.sysconf("SC_CLK_TCK")

    def cpu_s() -> float:
        fields = Path(f"/proc/{cluster.front.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    before = cpu_s()
    time.sleep(3)
    assert cpu_s() - before < 0.12  # 4 % of a core
    assert cluster.front_log.read_text() == log


def test_end_tokens_are_not_in_the_text(shared: EchoCluster) -> None:
    with Client(shared.zmq) as client:
        generation = client.generate([70, 71, END_TOKEN], SamplingParams(max_tokens=50))
        assert generation.token_ids == [70, 71, END_TOKEN]
        assert len(generation.text) == 2 and generation.finish_reason == "stop"
        stopped = client.generate([70, 71, 72], SamplingParams(max_tokens=50, stop_token_ids=[72]))
        assert stopped.token_ids == [70, 71, 72]
        assert len(stopped.text) == 2 and stopped.stop_reason == 72
