"""Log-probabilities, echo and best_of against a served model, through the `openai` package."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.api.conftest import MODEL
from tests.api.test_openai import QUESTION, STORY


def complete(api: openai.OpenAI, prompt: Any = STORY, **options: Any) -> Any:
    return api.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, **options})


def test_a_chat_s_logprobs_belong_to_its_text(api: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Say hi and show an emoji."}],
            temperature=0,
            max_tokens=60,
            logprobs=True,
            top_logprobs=3,
            **options,
        )

    choice = ask().choices[0]
    content = choice.logprobs.content
    shown = content[:-1] if choice.finish_reason == "stop" else content
    assert b"".join(bytes(entry.bytes) for entry in shown).decode() == choice.message.content
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedy: the likeliest is taken"
    chunks = [chunk.choices[0] for chunk in ask(stream=True)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    expected = [entry.logprob for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx(expected, abs=1e-3)


def test_echoed_tokens_have_the_logprobs_that_they_were_made_with(api: openai.OpenAI) -> None:
    """How evaluations score a continuation: what the model wrote greedily is greedy when it is scored."""
    made = complete(api, max_tokens=24, logprobs=2).choices[0]
    text = STORY + made.text
    scored = complete(api, text, max_tokens=1, echo=True, logprobs=1).choices[0]
    logprobs = scored.logprobs
    assert scored.text.startswith(text) and "".join(logprobs.tokens) == scored.text
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    border = logprobs.text_offset.index(len(STORY))
    # A text that is cut elsewhere by the tokenizer would be another sequence; this one is not.
    assert logprobs.tokens[border:-1] == made.logprobs.tokens
    assert logprobs.token_logprobs[border:-1] == pytest.approx(made.logprobs.token_logprobs, abs=2e-3)
    for value, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[border:]:
        assert value == pytest.approx(max(top.values()), abs=2e-3)
    only = complete(api, text, max_tokens=0, echo=True, logprobs=1)
    assert only.choices[0].text == text and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        logprobs.token_logprobs[1:-1], abs=2e-3
    )


def test_stop_strings_take_theirs_along(api: openai.OpenAI) -> None:
    story = complete(api, max_tokens=48).choices[0].text
    stop = story[20:27]
    choice = complete(api, max_tokens=48, stop=stop, logprobs=0).choices[0]
    assert choice.text == story[: story.index(stop)]
    shown = "".join(choice.logprobs.tokens)
    # The last token may reach into the stop string.
    assert shown.startswith(choice.text) and not "".join(choice.logprobs.tokens[:-1]).startswith(shown)
    assert all(offset < len(choice.text) for offset in choice.logprobs.text_offset)


def test_prompt_logprobs(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    assert answer.usage is not None and answer.model_extra is not None
    entries = answer.model_extra["prompt_logprobs"]
    assert len(entries) == answer.usage.prompt_tokens and entries[0] is None
    assert all(1 <= len(entry) <= 2 for entry in entries[1:])


def test_best_of_is_the_likeliest_of_what_n_would_show(api: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    every = complete(api, n=4, logprobs=0, **options).choices

    def mean(choice: Any) -> float:
        return float(sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))

    best = max(every, key=mean)
    answer = complete(api, best_of=4, **options)
    assert [choice.text for choice in answer.choices] == [best.text]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == sum(len(c.logprobs.tokens) for c in every)
