"""ZeroMQ clients against a served model: the project's own, and one of a few lines as docs/zeromq.md shows it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from gateway.client import AsyncClient, Client, RequestFailed, SamplingParams
from tests.api.conftest import MODEL

STORY = "Once upon a time there was a"
GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
DOCUMENT = Path(__file__).parents[2] / "docs" / "zeromq.md"


def test_it_says_what_http_says(api: openai.OpenAI, zmq_endpoint: str) -> None:
    expected = api.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=32)
    with Client(zmq_endpoint) as client:
        assert client.welcome.model == MODEL
        assert (client.welcome.tp, client.welcome.pp, client.welcome.limits.max_model_len) == (2, 1, 2048)
        generation = client.generate(STORY, GREEDY)
    assert generation.text == expected.choices[0].text
    assert len(generation.token_ids) == 32 and generation.finish_reason == "length"


def test_many_streams_on_one_connection(zmq_endpoint: str) -> None:
    with Client(zmq_endpoint) as client, ThreadPoolExecutor(16) as threads:
        prompts = [f"{number} is a number. It is" for number in range(16)]
        together = list(threads.map(lambda prompt: client.generate(prompt, GREEDY).token_ids, prompts))
        assert client.generate(prompts[5], GREEDY).token_ids == together[5]


def test_a_request_goes_on_from_the_tokens_it_has(zmq_endpoint: str) -> None:
    with Client(zmq_endpoint) as client:
        params = SamplingParams(max_tokens=32, temperature=0.8, seed=11)
        whole = client.generate(STORY, params).token_ids
        for border in (1, 10, 31):
            rest = client.submit(STORY, params, output_token_ids=whole[:border]).collect()
            assert rest.token_ids == whole[border:]


def test_stop_strings(zmq_endpoint: str) -> None:
    with Client(zmq_endpoint) as client:
        whole = client.generate(STORY, GREEDY).text
        stopped = client.generate(STORY, GREEDY, stop=[whole[15:20]])
    assert stopped.text == whole[: whole.index(whole[15:20])]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", whole[15:20])


async def test_cancel(zmq_endpoint: str) -> None:
    async with AsyncClient(zmq_endpoint) as client:
        stream = client.submit(STORY, SamplingParams(max_tokens=1000, ignore_eos=True))
        await anext(stream)
        stream.cancel()
        rest = await stream.collect()
        assert rest.finish_reason == "cancelled" and len(rest.token_ids) < 900


def test_what_is_refused(zmq_endpoint: str) -> None:
    with Client(zmq_endpoint) as client:
        with pytest.raises(RequestFailed, match="2048"):
            client.generate(STORY, SamplingParams(max_tokens=2048))
        assert client.generate(STORY, GREEDY).finish_reason == "length"


def test_the_document_s_example_works(zmq_endpoint: str, tmp_path: Path) -> None:
    """The program in the document is run as it stands there, with the server's endpoint."""
    [program] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    if importlib.util.find_spec("msgpack") is None:
        # msgspec speaks the same wire format.
        shim = "from msgspec.msgpack import decode as unpackb, encode as packb\n"
        (tmp_path / "msgpack.py").write_text(shim)
    result = subprocess.run(
        [sys.executable, "-c", program.replace("tcp://127.0.0.1:5555", zmq_endpoint)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    with Client(zmq_endpoint) as client:
        assert result.stdout == STORY + client.generate(STORY, GREEDY).text + "\n"
