"""From a conversation to its prompt: tools for templates that know none, answers that are to be continued.

Called by the HTTP endpoints, between the request and the model's own chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gateway.chat_template import ChatTemplate, ChatTemplateError, Message

_PREAMBLE = (
    "You may call functions to help with the user's request. They are described here as JSON schemas:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call a function, write a JSON object with its name and its arguments between tags, like this:\n"
    '<tool_call>\n{{"name": "function_name", "arguments": {{"parameter": "value"}}}}\n</tool_call>\n'
    "Write nothing else when you call a function. Results come back between <tool_response> tags."
)


def render_conversation(
    template: ChatTemplate,
    messages: list[Message],
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continues_final: bool = False,
) -> str:
    """The prompt. With `continues_final` it ends within the last message, which the answer goes on with. Raises
    ChatTemplateError."""
    if "tools" not in template.variables and (tools or any(is_about_tools(one) for one in messages)):
        messages, tools = _without_tools(messages, tools), None
    try:
        text = template.render(messages, add_generation_prompt, variables, tools)
    except ChatTemplateError:
        merged = _without_system(messages)
        if tools is not None or merged is None:
            raise
        text = template.render(merged, add_generation_prompt, variables)
    return _cut_behind(text, messages[-1]) if continues_final else text


def is_about_tools(message: Message) -> bool:
    """Whether it calls tools or brings what they answered."""
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def _without_tools(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """For a template that knows no tools: they are described in the system message, in the format of Hermes."""
    plain: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [_call_text(call["function"]) for call in message["tool_calls"]]
            text = "\n".join([*([message["content"]] if message["content"] else []), *calls])
            plain.append({"role": "assistant", "content": text})
        elif message["role"] == "tool":
            answer = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("is_answer"):
                plain[-1]["content"] += "\n" + answer
            else:
                plain.append({"role": "user", "content": answer, "is_answer": True})
        else:
            plain.append(message)
    for message in plain:
        message.pop("is_answer", None)
    if tools:
        described = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        preamble = _PREAMBLE.format(tools=described)
        if plain and plain[0]["role"] == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{preamble}"}
        else:
            plain.insert(0, {"role": "system", "content": preamble})
    return plain


def _call_text(function: dict[str, Any]) -> str:
    written = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _without_system(messages: list[Message]) -> list[Message] | None:
    """The system message joined to the user's first, for templates that refuse one; None if it is not so simple."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": joined}, *messages[2:]]


def _cut_behind(text: str, message: Message) -> str:
    """The prompt up to the end of its last message's content."""
    content = message["content"]
    at = text.rfind(content)
    if at >= 0 and content:
        return text[: at + len(content)]
    content = content.strip()  # some templates trim
    at = text.rfind(content)
    if at < 0 or not content:
        raise ChatTemplateError(
            "continue_final_message: the template does not show the last message as it is"
        )
    return text[: at + len(content)]
