"""Embeddings and scores through a real front over an echo world: shapes, encodings, refusals, replay."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from gateway.checks import check_submit
from gateway.client import AsyncClient, Client, RequestFailed, SamplingParams
from gateway.protocol import Limits, Pooling, Submit
from tests.echo_world import HIDDEN_SIZE, EchoCluster, echo_numbers
from tests.unit.http_asking import ask

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500", "--kv-cache-tokens", "400")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def api(cluster: EchoCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=30)


def expected(token_ids: list[int], kind: str = "last", normalize: bool = True) -> list[float]:
    return echo_numbers(token_ids, Pooling(kind, normalize))  # type: ignore[arg-type]


def tokens_of(text: str, cluster: EchoCluster) -> list[int]:
    from gateway.text import TextModel

    return TextModel.from_folder(cluster.model_dir).encode(text)


def test_every_kind_of_input_as_the_sdk_sends_it(cluster: EchoCluster, api: openai.OpenAI) -> None:
    one = [5, 6, 77]
    many = [[5, 6, 77], [9, 200]]
    texts = ["a cat", "dog"]
    for given, prompts in (
        ("a cat", [tokens_of("a cat", cluster)]),
        (texts, [tokens_of(text, cluster) for text in texts]),
        (one, [one]),
        (many, many),
    ):
        # The SDK asks for base64 by itself; given "float" it passes the numbers through.
        packed = api.embeddings.create(model="echo", input=given, user="me")  # type: ignore[arg-type]
        plain = api.embeddings.create(model="echo", input=given, encoding_format="float")  # type: ignore[arg-type]
        for answer in (packed, plain):
            assert [entry.index for entry in answer.data] == list(range(len(prompts)))
            assert (answer.object, answer.model) == ("list", "echo")
            for entry, prompt in zip(answer.data, prompts, strict=True):
                assert entry.object == "embedding"
                assert entry.embedding == pytest.approx(expected(prompt), abs=1e-6)
            num_tokens = sum(map(len, prompts))
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


def test_base64_is_little_endian_float32(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, PATH, {"input": [7, 8], "encoding_format": "base64"})
    assert status == 200
    raw = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack(f"<{HIDDEN_SIZE}f", raw) == pytest.approx(expected([7, 8]), abs=1e-6)


def test_dimensions_cut_and_normalise_again(cluster: EchoCluster) -> None:
    prompt = [250, 130]  # neither number of its direction is small
    for dimensions, numbers in ((1, [1.0]), (2, expected(prompt)[:2]), (HIDDEN_SIZE, expected(prompt))):
        body = {"input": prompt, "dimensions": dimensions}
        _, _, answer = ask(cluster, PATH, body)
        assert answer["data"][0]["embedding"] == pytest.approx(numbers, abs=1e-6)
    body = {"input": prompt, "dimensions": 1, "normalize": False}
    [entry] = ask(cluster, PATH, body)[2]["data"]
    assert entry["embedding"] == pytest.approx(expected(prompt, normalize=False)[:1], abs=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalize(cluster: EchoCluster, pooling: str, normalize: bool) -> None:
    body = {"input": [50, 60, 100], "pooling": pooling, "normalize": normalize}
    [entry] = ask(cluster, PATH, body)[2]["data"]
    assert entry["embedding"] == pytest.approx(expected([50, 60, 100], pooling, normalize), abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"model": "other"}, "model", "does not exist"),
        ({"input": []}, "input", "empty"),
        ({"input": ""}, "input", "at least one token"),
        ({"input": [[]]}, "input", "at least one token"),
        ({"input": ["a", [1]]}, "input", "mixes kinds"),
        ({"input": [1, "a"]}, "input", "mixes kinds"),
        ({"input": [-1]}, "input", "token id"),
        ({"input": [300]}, "input", "vocabulary of 300"),
        ({"input": [5] * 401}, "input", "400 tokens"),
        ({"input": ["a"] * 2049}, "input", "up to 2048"),
        ({"input": {"a": 1}}, "input", "Expected"),
        ({"dimensions": 0}, "dimensions", "1 to 8"),
        ({"dimensions": 9}, "dimensions", "1 to 8"),
        ({"encoding_format": "int8"}, "encoding_format", "float, base64"),
        ({"pooling": "max"}, "pooling", "last, mean"),
        ({"priority": 2**31}, "priority", "32-bit"),
        ({"timeout": 0}, "timeout", "above 0"),
    ],
)
def test_refusals_name_the_field_and_what_is_allowed(
    cluster: EchoCluster, fields: dict[str, object], param: str, says: str
) -> None:
    status, _, answer = ask(cluster, PATH, {"input": "a", **fields})
    assert status == (404 if param == "model" else 400)
    assert answer["error"]["param"] == param
    assert says in answer["error"]["message"]


def test_a_prompt_may_fill_the_cache_to_its_last_token(cluster: EchoCluster) -> None:
    assert ask(cluster, PATH, {"input": [5] * 400})[0] == 200


def test_clients_embed_and_score(cluster: EchoCluster) -> None:
    with Client(cluster.zmq) as client:
        assert client.embed([5, 6, 77]) == pytest.approx(expected([5, 6, 77]), abs=1e-6)
        mean = client.embed("a cat", kind="mean", normalize=False)
        assert mean == pytest.approx(expected(tokens_of("a cat", cluster), "mean", False), abs=1e-6)
        assert client.score([5, 6], [7, 8, 9]) == [-7.0, -8.0, -9.0]
        # The first piece of a text has what the tokenizer puts before it, the continuation nothing.
        assert client.score("ab", " cd") == [-float(token) for token in tokens_of(" cd", cluster)]
        with pytest.raises(ValueError, match="both"):
            client.score("ab", [1])
        with pytest.raises(RequestFailed, match="allowed: 1 to"):
            client.score("ab", "")

    async def ask_async() -> None:
        async with AsyncClient(cluster.zmq) as client:
            found = await asyncio.gather(client.embed([9]), client.score([1], [2]))
            assert found == [pytest.approx(expected([9]), abs=1e-6), [-2.0]]

    asyncio.run(ask_async())


LIMITS = Limits(100, 1600, 8, 300)


@pytest.mark.parametrize(
    ("submit", "says"),
    [
        (Submit("1", prompt_token_ids=[5], output_token_ids=[6]), "output tokens"),
        (Submit("1", prompt_token_ids=[5], params=SamplingParams(top_k=3)), "top_k has no meaning"),
        (Submit("1", prompt_token_ids=[5], params=SamplingParams(logprobs=0)), "logprobs has no meaning"),
        (Submit("1", prompt_token_ids=[5], params=SamplingParams(grammar="start: /a/")), "grammar"),
        (Submit("1", prompt_token_ids=[5] * 101), "maximum length"),
        (Submit("1", prompt_token_ids=[]), "empty"),
        (Submit("1", prompt_token_ids=[5], continuation="x"), "send text to the front"),
    ],
)
def test_what_pooling_goes_without(submit: Submit, says: str) -> None:
    import msgspec

    params = msgspec.structs.replace(submit.params, pooling=Pooling("mean"))
    problem = check_submit(msgspec.structs.replace(submit, params=params), LIMITS)
    assert problem is not None and says in problem


@pytest.mark.parametrize("first", [0, 3, 4])
def test_a_score_needs_a_token_before_it_and_one_to_score(first: int) -> None:
    params = SamplingParams(pooling=Pooling("score", first_scored=first))
    problem = check_submit(Submit("1", prompt_token_ids=[5, 6, 7], params=params), LIMITS)
    assert problem is not None and "allowed: 1 to 2" in problem


def test_what_was_asked_before_a_world_died_is_answered_by_the_next(tmp_path: Path) -> None:
    with EchoCluster(tmp_path, step_s=0.3) as cluster:
        epoch = cluster.start_world()
        cluster.wait_serving(epoch)
        api = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)
        with Client(cluster.zmq) as client, ThreadPoolExecutor(2) as threads:
            embedded = threads.submit(api.embeddings.create, model="echo", input=[[5, 6], [7]])
            scored = threads.submit(client.score, [5], [6, 7])
            # The world has all three, and is in the step that would answer them.
            cluster.wait(
                lambda: re.search(rb"phalanx_requests_live\S* 3", cluster.get("/metrics")[1]) is not None
            )
            cluster.kill_world(epoch)
            cluster.start_world()
            vectors = [entry.embedding for entry in embedded.result(30).data]
            assert vectors == [pytest.approx(expected(prompt), abs=1e-6) for prompt in ([5, 6], [7])]
            assert scored.result(30) == [-6.0, -7.0]
