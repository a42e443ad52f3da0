"""Runs in the environment of `anthropic`: URL MODEL RANK_PID. The rank is killed within a streamed call."""

from __future__ import annotations

import os
import signal
import sys

import anthropic

url, model, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
api = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)
question = [{"role": "user", "content": "Name three colours."}]
numbers = {
    "name": "add",
    "description": "Adds numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99},
                                   "minItems": 40, "maxItems": 40}},
        "required": ["numbers"],
        "additionalProperties": False,
    },
}  # fmt: skip
ask = {"model": model, "max_tokens": 600, "extra_body": {"temperature": 0}}

whole = api.messages.create(messages=question, **{**ask, "max_tokens": 40}, system="Be brief.")
assert whole.type == "message" and whole.content[0].type == "text" and whole.content[0].text
with api.messages.stream(messages=question, **{**ask, "max_tokens": 40}, system="Be brief.") as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text
assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
counted = api.messages.count_tokens(model=model, messages=question, system="Be brief.")
known = whole.usage.cache_read_input_tokens
assert known is not None and counted.input_tokens == whole.usage.input_tokens + known

stopped = api.messages.create(messages=question, stop_sequences=[text[10:14]], **ask)
assert stopped.stop_reason in ("stop_sequence", "end_turn", "max_tokens")

# A call is forced, and goes on in the next world when a rank dies within it.
forced = {"tools": [numbers], "tool_choice": {"type": "tool", "name": "add"}}
num_parts = 0
with api.messages.stream(messages=question, **forced, **ask) as stream:
    for event in stream:
        if event.type == "input_json":
            num_parts += 1
            if num_parts == 10:
                os.kill(rank, signal.SIGKILL)
    final = stream.get_final_message()
[use] = final.content
assert use.type == "tool_use" and use.name == "add" and len(use.input["numbers"]) == 40, final
assert num_parts > 20 and final.stop_reason == "tool_use"

answered = [
    *question,
    {"role": "assistant", "content": [use.model_dump(include={"type", "id", "name", "input"})]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "1234"}]},
]
after = api.messages.create(messages=answered, tools=[numbers], **{**ask, "max_tokens": 20})
assert after.usage.input_tokens + after.usage.cache_read_input_tokens > counted.input_tokens

for wrong, kind in (
    ({"model": "claude"}, anthropic.NotFoundError),
    ({"max_tokens": 0}, anthropic.BadRequestError),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
):
    try:
        api.messages.create(**{**ask, "messages": question, **wrong})
    except kind as error:
        assert error.body["error"]["message"], error.body
    else:
        raise AssertionError(f"{wrong} was accepted")
print("ok")
