"""A sandbox that ends: what a template may reach is jinja2's business, how much it may do is counted here.

Used by chat_template.py. Every turn of a loop and every call of a macro is a step, and so is every thousand
characters that an operation makes; what would be too large is refused before it is made.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000
"""Of one rendering. Real templates take a few for each message."""
MAX_CHARACTERS = 16 * 2**20
"""Of the prompt, and of every text on the way to it."""

_CHARACTERS_A_STEP = 1000
_WIDE_FORMAT = re.compile(r"\d{7,}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")
"""A format whose width is a long number, or one of the values."""

_steps_left: ContextVar[int] = ContextVar("steps_left")


class TemplateTooMuch(jinja2.TemplateError):
    """A template that does more than any conversation needs."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with an end."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.globals.pop("lipsum", None)
        self.filters = {name: _guarded(function, name) for name, function in self.filters.items()}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def count_step(self) -> str:
        _charge(1)
        return ""

    def concatenate(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    _check_size(len(many) * max(times, 0))
        elif operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise TemplateTooMuch(f"{left} ** {right} is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, inner = value.__self__, wrapped

        @functools.wraps(inner)
        def checked(*arguments: Any, **options: Any) -> str:
            _check_format(text)
            return inner(*arguments, **options)

        return checked

    def call(*arguments: Any, **options: Any) -> Any:
        # The names of the first three belong to the callee's keywords, too.
        self, context, function, *rest = arguments
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            _check_arguments(function.__name__, owner, rest, options)
        result = super(BoundedEnvironment, self).call(context, function, *rest, **options)
        if isinstance(result, str):
            _check_size(len(result))
        return result


@contextmanager
def limited() -> Iterator[None]:
    """What is rendered inside has MAX_STEPS; beyond them it ends with TemplateTooMuch."""
    token = _steps_left.set(MAX_STEPS)
    try:
        yield
    finally:
        _steps_left.reset(token)


def bounded_join(parts: Iterator[str]) -> str:
    """The text of a rendering, which ends with TemplateTooMuch as soon as it is too long."""
    texts, length = [], 0
    for part in parts:
        texts.append(part)
        length += len(part)
        if length > MAX_CHARACTERS:
            raise TemplateTooMuch(f"its prompt has more than {MAX_CHARACTERS} characters")
    return "".join(texts)


class _Counting(NodeTransformer):
    """Counts each turn of a loop and each call of a macro, and what `~` makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("concatenate")
        return nodes.Call(function, node.nodes, [], None, None, lineno=node.lineno)

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        # Some filters are given a context before their text.
        at = next((index for index, value in enumerate(arguments) if isinstance(value, str)), None)
        text = "" if at is None else arguments[at]
        others = [value for index, value in enumerate(arguments) if index != at]
        _check_arguments(name, text, others, options)
        result = function(*arguments, **options)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    return guarded


def _check_arguments(name: str, text: str, arguments: list[Any], options: dict[str, Any]) -> None:
    """What a method or filter of this name would make of a text."""
    values = [*arguments, *options.values()]
    if any(isinstance(value, int) and value > MAX_CHARACTERS for value in values):
        raise TemplateTooMuch(f"a number for {name} is too large")
    if name == "format":
        _check_format(text)
    if name == "replace":
        old, new = ([str(value) for value in values if isinstance(value, str)] + ["", ""])[:2]
        _check_size(len(text) + text.count(old) * len(new))
    if name == "join":
        joined = next((value for value in values if isinstance(value, (list, tuple))), ())
        _check_size(sum(len(value) for value in joined if isinstance(value, str)) + len(text) * len(joined))


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateTooMuch("the width of a format is too large")


def _check_size(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise TemplateTooMuch(f"it makes a text of more than {MAX_CHARACTERS} characters")
    _charge(characters // _CHARACTERS_A_STEP)


def _charge(steps: int) -> None:
    left = _steps_left.get(MAX_STEPS) - steps
    if left < 0:
        raise TemplateTooMuch(f"it takes more than {MAX_STEPS} steps")
    _steps_left.set(left)
