"""The `openai` package against a served model, used as its users use it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.api.conftest import MODEL
from tests.recovery.served import Served

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name three colours."}]
STORY = "Once upon a time there was a"


def greedy_chat(api: openai.OpenAI, **options: Any) -> Any:
    return api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, **options)


def greedy_text(api: openai.OpenAI, prompt: Any = STORY, **options: Any) -> Any:
    return api.completions.create(model=MODEL, prompt=prompt, temperature=0, **options)


@pytest.fixture(scope="module")
def story(api: openai.OpenAI) -> str:
    """What the model goes on with, greedily, for 48 tokens."""
    text: str = greedy_text(api, max_tokens=48).choices[0].text
    return text


def test_a_chat_answers_in_words(api: openai.OpenAI) -> None:
    answer = greedy_chat(api, max_tokens=64)
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert any(colour in message.content.lower() for colour in ("red", "blue", "green", "yellow"))
    assert "<|im_" not in message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_ends_by_itself(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hi."}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens < 500


def test_the_chat_template_is_the_model_s(api: openai.OpenAI, served: Served) -> None:
    # SmolLM2's template begins with a system message of its own when there is none.
    with_own = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, *QUESTION],
        max_tokens=1,
    )
    without = greedy_chat(api, max_tokens=1)
    assert with_own.usage is not None
    assert 0 < without.usage.prompt_tokens - with_own.usage.prompt_tokens < 40


def test_streams_bring_what_whole_answers_bring(api: openai.OpenAI, story: str) -> None:
    chunks = list(greedy_text(api, max_tokens=48, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == story
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 48
    whole = greedy_chat(api, max_tokens=40)
    pieces = list(greedy_chat(api, max_tokens=40, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_sdk_s_own_stream_helper(api: openai.OpenAI) -> None:
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say hi."}]
    whole = api.chat.completions.create(model=MODEL, messages=question, temperature=0)
    with api.chat.completions.stream(model=MODEL, messages=question, temperature=0) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_stop_strings_never_show(api: openai.OpenAI, story: str) -> None:
    stop = story[20:27]  # wherever the borders of tokens are
    expected = story[: story.index(stop)]
    answer = greedy_text(api, max_tokens=48, stop=[stop, "never there"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    chunks = greedy_text(api, max_tokens=48, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_max_tokens_is_kept_and_ignore_eos_goes_on(api: openai.OpenAI) -> None:
    assert greedy_text(api, max_tokens=5).usage.completion_tokens == 5
    body = {"ignore_eos": True}
    answer = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Say hi."}],
        temperature=0,
        max_completion_tokens=120,
        extra_body=body,
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 120
    assert "<|" not in (answer.choices[0].message.content or "")


def test_a_seed_gives_the_same_again_and_choices_differ(api: openai.OpenAI) -> None:
    def sample(**options: Any) -> list[str]:
        answer = api.completions.create(model=MODEL, prompt=STORY, max_tokens=24, temperature=1.0, **options)
        return [choice.text for choice in answer.choices]

    first = sample(seed=7, n=3)
    assert len(set(first)) == 3
    assert sample(seed=7, n=3) == first
    assert sample(seed=7) == first[:1]
    assert sample(seed=8) != first[:1]
    assert sample() != sample()


def test_sampling_can_be_narrowed_to_the_greedy_choice(api: openai.OpenAI, story: str) -> None:
    for options in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}):
        answer = api.completions.create(
            model=MODEL,
            prompt=STORY,
            max_tokens=48,
            temperature=1.0,
            **options,  # type: ignore[call-overload]
        )
        assert answer.choices[0].text == story


def test_prompts_of_every_kind(api: openai.OpenAI, story: str) -> None:
    from gateway.text import TextModel

    text = TextModel.from_folder(model_folder())
    token_ids = text.encode(STORY)
    assert greedy_text(api, token_ids, max_tokens=48).choices[0].text == story
    answer = greedy_text(api, [token_ids, text.encode("The sky is")], max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert story.startswith(answer.choices[0].text)
    assert answer.usage.prompt_tokens == len(token_ids) + len(text.encode("The sky is"))
    both = greedy_text(api, [STORY, "The sky is"], max_tokens=8)
    assert [c.text for c in both.choices] == [c.text for c in answer.choices]


def test_32_streams_at_once(api: openai.OpenAI) -> None:
    prompts = [f"{number} is a number. It is" for number in range(32)]

    def stream(prompt: str) -> str:
        chunks = greedy_text(api, prompt, max_tokens=24, stream=True, extra_body={"ignore_eos": True})
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(stream, prompts))
    alone = [stream(prompt) for prompt in prompts[:3]]
    assert together[:3] == alone
    assert len(set(together)) > 16


def test_errors_are_the_sdk_s_own_exceptions(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        api.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum length of this model is 2048") as error:
        greedy_text(api, "word " * 3000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="2048"):
        greedy_text(api, max_tokens=2048)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        api.completions.create(model=MODEL, prompt=STORY, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        greedy_chat(api, tools=[{"type": "custom", "custom": {"name": "f"}}])


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == [MODEL]
    assert api.models.retrieve(MODEL).owned_by == "phalanx"


async def test_the_async_sdk(served: Served, story: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as api:
        stream = await api.completions.create(
            model=MODEL, prompt=STORY, temperature=0, max_tokens=48, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == story


def model_folder() -> Any:
    from launcher.settings import default_cache_dir

    return default_cache_dir() / "models" / MODEL


def test_usage_says_what_the_prefix_cache_had(api: openai.OpenAI) -> None:
    prompt = "A sentence that is said again and again. " * 12
    counts = []
    for _ in range(2):
        usage = api.completions.create(model=MODEL, prompt=prompt, max_tokens=2).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        counts.append(usage.prompt_tokens_details.cached_tokens)
    assert counts[0] == 0 and 0 < (counts[1] or 0) < usage.prompt_tokens
