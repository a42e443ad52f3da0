"""Sampling options over HTTP against a served model: each one shows its effect on real text."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import openai
import pytest

from gateway.text import TextModel
from tests.api.conftest import MODEL
from tests.api.test_openai import STORY, model_folder
from tests.api.test_operations import wait_for
from tests.recovery.served import Served


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.from_folder(model_folder())


def complete(api: openai.OpenAI, prompt: str = STORY, max_tokens: int = 48, **options: Any) -> str:
    options = {"temperature": 0, **options}
    known = {name: options.pop(name) for name in ("temperature", "seed", "logit_bias") if name in options}
    body = {name: options.pop(name) for name in list(options) if not name.endswith("_penalty")}
    repetition = options.pop("repetition_penalty", None)
    body |= {} if repetition is None else {"repetition_penalty": repetition}
    answer = api.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, extra_body=body, **known, **options
    )
    result: str = answer.choices[0].text
    return result


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.5}]
)
def test_penalties_break_repetition(api: openai.OpenAI, text: TextModel, penalty: dict[str, float]) -> None:
    prompt = "one two one two one two one two one two"

    def most_frequent(**options: float) -> int:
        words = complete(api, prompt, ignore_eos=True, **options)
        return Counter(text.encode(words)).most_common(1)[0][1]

    assert most_frequent(**penalty) < most_frequent()


def test_logit_bias_forces_and_forbids(api: openai.OpenAI, text: TextModel) -> None:
    [forced] = text.encode(" cat")
    assert complete(api, max_tokens=5, logit_bias={str(forced): 100}) == " cat" * 5
    plain = complete(api, max_tokens=1)
    [first] = text.encode(plain)
    assert complete(api, max_tokens=1, logit_bias={str(first): -100}) != plain
    with pytest.raises(openai.BadRequestError, match="allowed: 0 to 49151") as error:
        complete(api, logit_bias={"49152": 1})
    assert error.value.param == "logit_bias"


def test_min_p_can_be_narrowed_to_the_greedy_choice(api: openai.OpenAI) -> None:
    assert complete(api, temperature=1, seed=3, min_p=1.0) == complete(api)
    assert complete(api, temperature=1, seed=3, min_p=0.0) != complete(api)


def test_min_tokens_puts_the_end_off(api: openai.OpenAI) -> None:
    def count(**options: int) -> tuple[int, str | None]:
        answer = api.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Say hi."}],
            temperature=0,
            max_tokens=100,
            extra_body=options,
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    by_itself, reason = count()
    assert by_itself < 60 and reason == "stop"
    assert count(min_tokens=by_itself + 20)[0] >= by_itself + 20


def test_bad_words_do_not_appear(api: openai.OpenAI) -> None:
    plain = complete(api)
    words = [word for word in plain.split() if word.isalpha()][:3]
    cleaned = complete(api, bad_words=words)
    assert not set(words) & set(cleaned.split()), (plain, cleaned)


def test_a_timeout_is_an_error_and_frees_what_was_taken(api: openai.OpenAI, served: Served) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "prompt": STORY,
        "max_tokens": 1500,
        "extra_body": {"ignore_eos": True, "timeout": 1.0},
    }
    patient = api.with_options(max_retries=5)  # the answer says that trying again is useless
    began = time.monotonic()
    with pytest.raises(openai.APIStatusError, match=r"timeout of 1 s") as error:
        patient.completions.create(**options)
    assert (error.value.status_code, error.value.code) == (408, "timeout")
    assert time.monotonic() - began < 5
    pieces = []
    with pytest.raises(openai.APIError, match=r"timeout of 1 s"):
        for chunk in api.completions.create(**options, stream=True):
            pieces.append(chunk.choices[0].text)
    assert len(pieces) > 3
    wait_for(served, "vllm:num_requests_running", 0)
    assert complete(api, max_tokens=3, priority=-3, timeout=60.0)
