"""Runs in the environment of `langchain-openai`: URL MODEL."""

from __future__ import annotations

import sys

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

url, model = sys.argv[1], sys.argv[2]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=200, timeout=120,
                  max_retries=0)  # fmt: skip
conversation = [SystemMessage("Be brief."), HumanMessage("Name three colours.")]

answer = chat.invoke(conversation)
assert isinstance(answer.content, str) and answer.content
assert answer.usage_metadata["output_tokens"] > 0
pieces = list(chat.stream(conversation))
assert len(pieces) > 3 and "".join(piece.content for piece in pieces) == answer.content


class Weather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(description="The city", max_length=30)
    days: int = Field(description="How many days ahead", ge=0, le=9)


for choice in ("Weather", "any"):
    called = chat.bind_tools([Weather], tool_choice=choice).invoke("What is the weather in Rome tomorrow?")
    assert called.tool_calls, called
    for call in called.tool_calls:
        assert call["name"] == "Weather" and Weather(**call["args"])
whole = chat.bind_tools([Weather], tool_choice="Weather").invoke("What is the weather in Rome tomorrow?")
added = None
for piece in chat.bind_tools([Weather], tool_choice="Weather").stream(
    "What is the weather in Rome tomorrow?"
):
    added = piece if added is None else added + piece
assert [(one["name"], one["args"]) for one in added.tool_calls] == [
    (one["name"], one["args"]) for one in whole.tool_calls
]
question = HumanMessage("What is the weather in Rome tomorrow?")
result = ToolMessage("Sun.", tool_call_id=whole.tool_calls[0]["id"])
assert chat.bind_tools([Weather]).invoke([question, whole, result]).usage_metadata["input_tokens"] > 50

for method in ("json_schema", "function_calling"):
    structured = chat.with_structured_output(Weather, method=method)
    assert isinstance(structured.invoke("What is the weather in Rome tomorrow?"), Weather)
print("ok")
