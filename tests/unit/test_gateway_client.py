"""Client and AsyncClient against a real gateway of rank 0, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gateway import connection as connection_module
from gateway import router as router_module
from gateway.client import (
    AsyncClient,
    Client,
    ConnectionLost,
    RequestFailed,
    RequestTimeout,
    SamplingParams,
)
from gateway.errors import EndpointError
from gateway.protocol import Limits
from tests.echo_world import END_TOKEN, EchoWorld, echo_tokens

LIMITS = Limits(max_model_len=4096, kv_cache_tokens=65536, max_num_seqs=64, vocab_size=300)
PROMPT = [10, 11, 12, 13, 14]


class WorldThread:
    """An echo world whose loop can be held up and ended."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", epoch: int = 1, step_s: float = 0.001) -> None:
        self.world = EchoWorld(endpoint, epoch, LIMITS, step_s)
        self.endpoint = self.world.gateway.endpoint
        self.running = threading.Event()
        self.running.set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self.world.stopping:
            self.running.wait()
            self.world.turn()
        self.world.gateway.close()

    def stop(self) -> None:
        self.world.stopping = True
        self.running.set()
        self._thread.join(10)


@pytest.fixture
def world() -> Iterator[WorldThread]:
    thread = WorldThread()
    yield thread
    thread.stop()


def greedy(max_tokens: int, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)  # type: ignore[arg-type]


def test_generate_brings_the_tokens(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        assert client.welcome.model == "echo" and client.welcome.limits == LIMITS
        generation = client.generate(PROMPT, greedy(7))
        assert generation.token_ids == echo_tokens(PROMPT, 7)
        assert (generation.finish_reason, generation.stop_reason, generation.text) == ("length", None, "")


def test_a_stream_brings_every_position_once(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        outputs = list(client.submit(PROMPT, greedy(20)))
    assert [output.position for output in outputs] == list(range(20))
    assert outputs[-1].finish_reason == "length"


def test_many_requests_share_a_connection_and_threads_share_a_client(world: WorldThread) -> None:
    with Client(world.endpoint) as client, ThreadPoolExecutor(8) as threads:
        prompts = [[20 + n, 21 + n, 22 + n] for n in range(64)]
        generations = threads.map(lambda prompt: client.generate(prompt, greedy(30)), prompts)
        for prompt, generation in zip(prompts, generations, strict=True):
            assert generation.token_ids == echo_tokens(prompt, 30)


def test_tokens_from_before_are_continued(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        stream = client.submit(PROMPT, greedy(10), output_token_ids=echo_tokens(PROMPT, 4))
        outputs = list(stream)
    assert outputs[0].position == 4
    assert [token for output in outputs for token in output.token_ids] == echo_tokens(PROMPT, 10)[4:]


def test_end_tokens_and_stop_tokens(world: WorldThread) -> None:
    prompt = [10, 11, END_TOKEN, 12]
    with Client(world.endpoint) as client:
        assert client.generate(prompt, greedy(10)).finish_reason == "stop"
        ignoring = client.generate(prompt, greedy(10, ignore_eos=True))
        assert (ignoring.finish_reason, len(ignoring.token_ids)) == ("length", 10)
        stopped = client.generate(PROMPT, greedy(10, stop_token_ids=[12]))
        assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == ([10, 11, 12], "stop", 12)


def test_cancel_ends_a_stream(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        stream = client.submit(PROMPT, greedy(4000))
        next(stream)
        stream.cancel()
        outputs = list(stream)
        assert outputs[-1].finish_reason == "cancelled"
        stream.cancel()  # has ended: nothing happens
        assert client.generate(PROMPT, greedy(2)).finish_reason == "length"
        deadline = time.monotonic() + 5
        while client.stats is None or client.stats.num_running:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_refused_request_says_why_and_leaves_the_connection(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        with pytest.raises(RequestFailed, match="maximum length of this model is 4096") as error:
            client.generate(PROMPT, greedy(5000))
        assert error.value.code == "invalid_request"
        with pytest.raises(RequestFailed, match="front"):
            client.generate("text for rank 0")
        assert len(client.generate(PROMPT, greedy(3)).token_ids) == 3


def test_a_request_that_brings_nothing_times_out_and_is_cancelled(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        stream = client.submit(PROMPT, greedy(1000), timeout_s=0.3)
        next(stream)
        world.running.clear()
        with pytest.raises(RequestTimeout, match=r"0\.3 s"):
            list(stream)
        assert list(stream) == []
        world.running.set()
        assert client.generate(PROMPT, greedy(2), timeout_s=5).finish_reason == "length"
        assert not world.world._running


def test_nobody_there_is_said_within_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionLost, match=r"no answer from tcp://127.0.0.1:9 within 0.3 s"):
        Client("tcp://127.0.0.1:9", connect_timeout_s=0.3).connect()
    assert time.monotonic() - start < 2


def test_an_endpoint_that_is_none_is_named() -> None:
    with pytest.raises(EndpointError, match="cannot connect to 'nonsense'"):
        Client("nonsense").connect()


def test_a_client_may_be_there_before_its_server(world: WorldThread) -> None:
    world.stop()
    client = Client(world.endpoint, connect_timeout_s=10)
    with ThreadPoolExecutor(1) as thread:
        welcome = thread.submit(client.connect)
        time.sleep(0.3)
        later = WorldThread(world.endpoint, epoch=2)
        assert welcome.result().epoch == 2
    client.close()
    later.stop()


def test_a_server_that_dies_is_noticed_at_once(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        stream = client.submit(PROMPT, greedy(4000))
        next(stream)
        world.stop()
        start = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"connect\(\)"):
            list(stream)
        assert time.monotonic() - start < 1
        with pytest.raises(ConnectionLost):
            client.submit(PROMPT)
        later = WorldThread(world.endpoint, epoch=2)
        assert client.connect().epoch == 2
        assert client.generate(PROMPT, greedy(3)).token_ids == echo_tokens(PROMPT, 3)
    later.stop()


def test_a_silent_server_is_noticed(world: WorldThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEARTBEAT_INTERVAL_S", 0.1)
    with Client(world.endpoint, silence_s=0.5, connect_timeout_s=0.5) as client:
        time.sleep(1.0)  # idle, and yet alive: pings are answered
        stream = client.submit(PROMPT, greedy(4000))
        next(stream)
        world.running.clear()
        with pytest.raises(ConnectionLost, match="silent"):
            list(stream)
        world.running.set()


def test_an_idle_client_is_kept(world: WorldThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEARTBEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(router_module, "CLIENT_SILENCE_S", 1.0)
    with Client(world.endpoint) as client:
        time.sleep(2.5)
        assert client.generate(PROMPT, greedy(3)).token_ids == echo_tokens(PROMPT, 3)


def test_an_id_may_be_used_by_one_request_at_a_time(world: WorldThread) -> None:
    with Client(world.endpoint) as client:
        stream = client.submit(PROMPT, greedy(500), request_id="mine")
        with pytest.raises(ValueError, match="in flight"):
            client.submit(PROMPT, request_id="mine")
        assert len(stream.collect().token_ids) == 500
        assert client.submit(PROMPT, greedy(2), request_id="mine").collect().finish_reason == "length"


def test_a_closed_client_says_so(world: WorldThread) -> None:
    client = Client(world.endpoint)
    with pytest.raises(ConnectionLost):
        client.submit(PROMPT)
    client.connect()
    stream = client.submit(PROMPT, greedy(4000))
    client.close()
    client.close()
    with pytest.raises(ConnectionLost):
        list(stream)
    with pytest.raises(ConnectionLost):
        client.generate(PROMPT)


async def test_async_streams_run_side_by_side(world: WorldThread) -> None:
    async with AsyncClient(world.endpoint) as client:
        prompts = [[30 + n, 31 + n] for n in range(64)]
        generations = await asyncio.gather(*(client.generate(prompt, greedy(25)) for prompt in prompts))
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.token_ids == echo_tokens(prompt, 25)


async def test_cancelling_an_async_caller_cancels_the_request(world: WorldThread) -> None:
    async with AsyncClient(world.endpoint) as client:
        task = asyncio.create_task(client.generate(PROMPT, greedy(4000)))
        await asyncio.sleep(0.1)
        assert world.world._running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.2)
        assert not world.world._running


async def test_async_timeouts_and_losses(world: WorldThread) -> None:
    async with AsyncClient(world.endpoint) as client:
        slow = client.submit(PROMPT, greedy(4000), timeout_s=0.2)
        await anext(slow)
        world.running.clear()
        with pytest.raises(RequestTimeout):
            await slow.collect()
        world.running.set()
        lost = client.submit(PROMPT, greedy(4000))
        await anext(lost)
        await asyncio.to_thread(world.stop)
        with pytest.raises(ConnectionLost):
            await lost.collect()
