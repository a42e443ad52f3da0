"""What vLLM's server answers beside OpenAI's endpoints: tokenizer, version, ping, scores and rankings."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from gateway.errors import RequestFailed
from gateway.http.errors import from_failure
from gateway.text import TextModel
from tests.echo_world import CHAT_TEMPLATE, EchoCluster
from tests.unit.http_asking import CHAT, ask, chat


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    options = ("--max-model-len", "500")
    with EchoCluster(tmp_path_factory.mktemp("run"), step_s=0.001, world_options=options) as cluster:
        cluster.wait_serving(cluster.start_world())
        yield cluster


@pytest.fixture(scope="module")
def text(cluster: EchoCluster) -> TextModel:
    return TextModel.from_folder(cluster.model_dir)


def test_tokenize_a_prompt_and_back(cluster: EchoCluster, text: TextModel) -> None:
    prompt = "hello wörld <|im_end|>"
    status, _, answer = ask(cluster, "/tokenize", {"prompt": prompt, "model": "echo"})
    assert status == 200
    assert answer == {
        "count": len(answer["tokens"]),
        "max_model_len": 500,
        "tokens": text.encode(prompt),
        "token_strs": None,
    }
    assert answer["count"] < len(prompt.encode())
    named = ask(cluster, "/tokenize", {"prompt": prompt, "return_token_strs": True})[2]
    assert named["token_strs"][0] == "hello" and named["token_strs"][-1] == "<|im_end|>"
    assert ask(cluster, "/detokenize", {"tokens": answer["tokens"]})[2] == {"prompt": prompt}
    assert ask(cluster, "/detokenize", {"tokens": []})[2] == {"prompt": ""}


def test_tokenize_a_conversation_as_the_chat_does(cluster: EchoCluster) -> None:
    prompt = ask(cluster, CHAT, chat("abc", max_tokens=1))[2]["usage"]["prompt_tokens"]
    answer = ask(cluster, "/tokenize", chat("abc"))[2]
    assert answer["count"] == prompt
    closed = ask(cluster, "/tokenize", chat("abc", add_generation_prompt=False))[2]
    assert answer["tokens"][: closed["count"]] == closed["tokens"] and closed["count"] < prompt


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/tokenize", {}, "prompt", "one of them"),
        ("/tokenize", {"prompt": "x", **chat()}, "prompt", "one of them"),
        ("/tokenize", {"prompt": 5}, "prompt", "Expected"),
        ("/tokenize", {"prompt": "x" * (2**22 + 1)}, "prompt", "up to 4194304"),
        ("/tokenize", {"messages": []}, "messages", "at least one"),
        ("/tokenize", chat(chat_template="x"), "chat_template", "not supported"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "allowed: 0 to"),
        ("/detokenize", {"tokens": [10**6]}, "tokens", "allowed: 0 to"),
        ("/detokenize", {"tokens": [2**70]}, "tokens", "allowed: 0 to"),
        ("/detokenize", {"tokens": "x"}, "tokens", "Expected"),
        ("/score", {"text_1": "a"}, "text_2", "one of them"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "as many of both"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2", "empty"),
        ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "not"),
        ("/rerank", {"query": "a", "documents": []}, "documents", "empty"),
        ("/v2/rerank", {"query": "a", "documents": [{"x": "y"}]}, "documents[0]", "has no text"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n", "0 (for all)"),
        ("/rerank", {"query": "a", "documents": ["b"] * 2048}, "documents", "up to 2048"),
        ("/rerank", {"query": "a", "documents": ["x" * 600]}, "documents", "maximum length"),
    ],
)  # fmt: skip
def test_what_is_refused(cluster: EchoCluster, path: str, body: object, param: str, says: str) -> None:
    status, _, answer = ask(cluster, path, body)
    assert status == 400, answer
    assert answer["error"]["param"] == param and says in answer["error"]["message"], answer


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/score", "/rerank", CHAT, "/v1/embeddings"])
def test_an_unknown_model_is_404_in_openai_s_words(cluster: EchoCluster, path: str) -> None:
    bodies = {
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [5]},
        "/score": {"text_1": "a", "text_2": "b"},
        "/rerank": {"query": "a", "documents": ["b"]},
        "/v1/embeddings": {"input": "a"},
        CHAT: chat(),
    }
    status, _, answer = ask(cluster, path, {**bodies[path], "model": "gpt-9"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert answer["error"]["message"].startswith("The model `gpt-9` does not exist")


def test_the_rest(cluster: EchoCluster) -> None:
    info = ask(cluster, "/tokenizer_info", method="GET")[2]
    assert info["eos_token"] == "<|im_end|>" and info["chat_template"] == CHAT_TEMPLATE
    assert "tokenizer_class" in info
    assert ask(cluster, "/version", method="GET")[2]["version"]
    for method in ("GET", "POST"):
        assert ask(cluster, "/ping", method=method)[0] == 200


def test_scores_are_cosines_of_embeddings(cluster: EchoCluster) -> None:
    texts = ["abc", "abc", "zzz"]
    data = ask(cluster, "/v1/embeddings", {"input": texts, "pooling": "mean"})[2]["data"]
    vectors = [entry["embedding"] for entry in data]
    expected = [sum(a * b for a, b in zip(vectors[0], vector, strict=True)) for vector in vectors]
    for path in ("/score", "/v1/score"):
        answer = ask(cluster, path, {"text_1": "abc", "text_2": texts, "model": "echo"})[2]
        assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, abs=1e-6)
        assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
        assert answer["usage"]["total_tokens"] == 12 and answer["object"] == "list"
    pairs = ask(cluster, "/score", {"queries": texts, "documents": texts})[2]["data"]
    assert [entry["score"] for entry in pairs] == pytest.approx([1, 1, 1], abs=1e-6)


def test_the_likest_document_comes_first(cluster: EchoCluster) -> None:
    documents = ["zzz", {"text": "abc"}, "abd"]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = ask(cluster, path, {"query": "abc", "documents": documents})[2]
        results = answer["results"]
        assert [entry["index"] for entry in results] == [1, 2, 0]
        assert results[0]["document"] == {"text": "abc"}
        assert results[0]["relevance_score"] == pytest.approx(1, abs=1e-6)
    body = {"query": "abc", "documents": documents, "top_n": 1, "return_documents": False}
    [best] = ask(cluster, "/rerank", body)[2]["results"]
    assert best["index"] == 1 and "document" not in best


def test_openai_s_endpoints_are_also_where_kserve_has_them(cluster: EchoCluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/openai/v1", api_key="none", max_retries=0, timeout=30)
    assert [model.id for model in client.models.list()] == ["echo"]
    answer = client.completions.create(model="echo", prompt="abc", max_tokens=4)
    assert answer.choices[0].text == "abca"
    assert len(client.embeddings.create(model="echo", input="abc").data[0].embedding) == 8
    stream = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": "x"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).startswith("user")


def test_paths_and_methods_that_are_not_there(cluster: EchoCluster) -> None:
    status, _, answer = ask(cluster, "/v1/nowhere", method="GET")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert answer["error"]["message"] == "Invalid URL (GET /v1/nowhere)"
    status, headers, answer = ask(cluster, CHAT, method="GET")
    assert (status, answer["error"]["code"], headers["allow"]) == (405, "method_not_allowed", "POST")


def test_what_may_be_tried_again_says_so() -> None:
    busy = from_failure(RequestFailed("overloaded", "x", retry_after_s=3)).headers()
    assert busy == {"retry-after": "3", "retry-after-ms": "3000", "x-should-retry": "true"}
    assert from_failure(RequestFailed("unavailable", "x")).headers()["x-should-retry"] == "true"
    assert from_failure(RequestFailed("timeout", "x")).headers() == {"x-should-retry": "false"}
