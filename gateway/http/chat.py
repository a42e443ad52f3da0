"""What a chat is beyond its tokens: its tools, its thoughts, the grammar that both obey, and its prompt.

Called by the endpoints that answer chats (OpenAI's, Anthropic's), between the request and the front's requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway import grammars
from gateway.chat_template import ChatTemplate, Message
from gateway.conversation import render_conversation
from gateway.dialect import Dialect
from gateway.http.errors import ApiError
from gateway.http.schema import ChatRequest, chat_messages
from gateway.http.structured import Constraint
from gateway.http.tools import ChatTools, chat_tools
from gateway.message_parser import Parsing
from gateway.tool_calls.grammar import FunctionShape, after_thinking, checked_calls, either, forced_calls
from gateway.tool_calls.xml_calls import parameter_types

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_THINKING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class Chat:
    """A chat request that has been read."""

    messages: list[Message]
    tools: ChatTools
    variables: dict[str, Any]
    """For the template."""
    add_generation_prompt: bool
    continues_final: bool
    shows_reasoning: bool

    @classmethod
    def read(cls, request: ChatRequest, template: ChatTemplate | None) -> Chat:
        """Raises ApiError."""
        continues = bool(request.continue_final_message)
        adds = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        if continues and adds:
            text = "continue_final_message is only allowed with add_generation_prompt: false, or without it"
            raise ApiError(400, text, param="continue_final_message")
        messages = chat_messages(request)
        if continues and messages[-1]["role"] != "assistant":
            text = "continue_final_message: the last message must be the assistant's"
            raise ApiError(400, text, param="continue_final_message")
        return cls(
            messages,
            chat_tools(request.tools, request.tool_choice, request.parallel_tool_calls),
            _variables(request, template),
            adds,
            continues,
            request.include_reasoning is not False,
        )

    @property
    def num_characters(self) -> int:
        """About how long the prompt will be."""
        size = sum(len(message["content"]) for message in self.messages)
        return size + sum(len(str(tool)) for tool in self.tools.for_template or ())

    def prompt(self, template: ChatTemplate) -> str:
        """Raises ChatTemplateError."""
        return render_conversation(
            template,
            self.messages,
            tools=self.tools.for_template,
            variables=self.variables,
            add_generation_prompt=self.add_generation_prompt,
            continues_final=self.continues_final,
        )

    def parsing(self, dialect: Dialect, prompt: str) -> Parsing | None:
        """What is to be found in the answers to this prompt; None if they are nothing but content."""
        thoughts = dialect.thoughts
        thinks = thoughts is not None and not thoughts.is_closed(prompt) and not self.continues_final
        parsing = Parsing(
            tool_format=dialect.tool_format if self.tools.functions else None,
            tools={one.name: parameter_types(one.parameters or {}) for one in self.tools.functions},
            only_one_call=self.tools.only_one,
            reasoning=dialect.reasoning if thinks else None,
            is_thinking=thinks and thoughts is not None and thoughts.is_open(prompt),
            shows_reasoning=self.shows_reasoning,
        )
        return parsing if parsing.is_needed else None

    def grammar(self, dialect: Dialect, parsing: Parsing | None, wanted: Constraint | None) -> str | None:
        """What the answers must match; `wanted` is what the request asks of their content. May take long: call it in
        a thread. Raises ApiError."""
        content = None if wanted is None else wanted.compile()
        grammar = self._with_calls(dialect, content)
        if grammar is None:
            return None
        thoughts = dialect.thoughts
        if parsing is not None and parsing.reasoning is not None and thoughts is not None:
            grammar = after_thinking(
                grammar,
                thoughts.opening,
                thoughts.closing,
                dialect.special,
                has_begun=parsing.is_thinking,
            )
        if grammar is not content and (problem := grammars.problem_of(grammar)) is not None:
            param = "tools" if self.tools.functions else wanted.param if wanted is not None else None
            raise ApiError(400, f"{param}: {problem}", param=param, code="invalid_value")
        return grammar

    def _with_calls(self, dialect: Dialect, content: str | None) -> str | None:
        tools = self.tools
        if not tools.functions:
            return content
        # Without `strict` a function's schema binds only calls that are forced, as at OpenAI.
        functions = [FunctionShape(one.name, one.parameters or {}) for one in tools.functions]
        if tools.must_call:
            return forced_calls(dialect.tools, functions, dialect.special, only_one=tools.only_one)
        if content is not None:
            calls = forced_calls(dialect.tools, functions, dialect.special, only_one=tools.only_one)
            return either(content, calls)
        if tools.has_strict:
            any_object: Mapping[str, Any] = {"type": "object"}
            functions = [
                FunctionShape(one.name, (one.parameters or {}) if one.strict else any_object)
                for one in tools.functions
            ]
            return checked_calls(dialect.tools, functions, dialect.special, only_one=tools.only_one)
        return None


def _variables(request: ChatRequest, template: ChatTemplate | None) -> dict[str, Any]:
    """What the template may read beside the messages."""
    variables: dict[str, Any] = {}
    effort = request.reasoning_effort
    if effort is not None:
        if effort not in REASONING_EFFORTS:
            text = f"reasoning_effort is {effort[:40]!r}; allowed: {', '.join(REASONING_EFFORTS)}"
            raise ApiError(400, text, param="reasoning_effort", code="invalid_value")
        if effort != "none":
            variables["reasoning_effort"] = effort
        for name in _THINKING_SWITCHES:
            if template is not None and name in template.variables:
                variables[name] = effort != "none"
    return {**variables, **(request.chat_template_kwargs or {})}
