"""Runs in the environment of `litellm`: URL MODEL."""

from __future__ import annotations

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks a host outside for prices

import litellm

url, model = sys.argv[1], sys.argv[2]
server = {"api_base": f"{url}/v1", "api_key": "none", "timeout": 120, "max_retries": 0}
ask = {
    **server,
    "messages": [{"role": "user", "content": "Name three colours."}],
    "temperature": 0,
    "max_tokens": 24,
}

whole = litellm.completion(model=f"openai/{model}", **ask)
text = whole.choices[0].message.content
assert text and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
assert whole.usage.prompt_tokens_details.cached_tokens >= 0
pieces = list(
    litellm.completion(model=f"openai/{model}", stream=True, stream_options={"include_usage": True}, **ask)
)
assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
assert asyncio.run(litellm.acompletion(model=f"openai/{model}", **ask)).choices[0].message.content == text
assert litellm.completion(model=f"hosted_vllm/{model}", **ask).choices[0].message.content == text
# Over /v1/messages, whose base is the server itself.
assert (
    litellm.completion(model=f"anthropic/{model}", **{**ask, "api_base": url}).choices[0].message.content
    == text
)

told = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="Once", max_tokens=4, **server)
assert told.usage.completion_tokens == 4
answer = litellm.responses(model=f"openai/{model}", input="Say hi.", max_output_tokens=8, **server)
assert answer.output[0].content[0].text
vectors = litellm.embedding(model=f"openai/{model}", input=["a", "b"], encoding_format="float", **server).data
assert len(vectors) == 2 and len(vectors[0]["embedding"]) == 576
ranked = litellm.rerank(
    model=f"hosted_vllm/{model}", query="x", documents=["a", "b"], api_base=f"{url}/v1", api_key="n"
)
assert {found["index"] for found in ranked.results} == {0, 1}
try:
    litellm.completion(**{**ask, "model": "openai/nothing"})
except litellm.NotFoundError as error:
    assert "does not exist" in str(error)
else:
    raise AssertionError("an unknown model was not refused")
