"""Grammars that make a model call functions, in its own format, with arguments that its schemas allow.

Called by the HTTP endpoints. The grammars are those of llguidance (Lark, with schemas inside, put together in its
JSON form); `gateway.grammars` checks them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.grammars import WHITE_SPACE
from gateway.tool_calls.formats import ToolFormat, Wrapping

MAX_CALLS = 16
"""That a grammar lets a model make in one answer: a small one might go on for ever."""
_ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class FunctionShape:
    """What a grammar has to know of a function."""

    name: str
    parameters: Mapping[str, Any]


def forced_calls(
    form: ToolFormat, functions: Sequence[FunctionShape], special: Mapping[str, int], *, only_one: bool
) -> str:
    """Lark: nothing but calls, one or up to MAX_CALLS. `special`: the ids of the markers that are special tokens."""
    writer = _Writer(form, special)
    return "start: calls\n" + writer.calls(functions, only_one=only_one)


def checked_calls(
    form: ToolFormat, functions: Sequence[FunctionShape], special: Mapping[str, int], *, only_one: bool
) -> str:
    """Lark: any text, and where it calls functions, arguments that their schemas allow."""
    writer = _Writer(form, special)
    if form.trigger is None:
        calls = writer.calls(functions, only_one=only_one)
        # The first character decides whether the answer is text or calls.
        first = "[^\\s\\[]" if form.wrapping.arguments == "python" else "[^\\s{]"
        return f"start: (/{first}(.|\\n)*/)? | calls\n{calls}"
    # Call by call, each with the text before it: what comes behind one call is text until the next begins.
    calls = writer.calls(functions, only_one=True, without=form.trigger)
    times = f"{{0,{1 if only_one else MAX_CALLS}}}"
    if form.trigger in special:
        return f"start: (TEXT <[{special[form.trigger]}]> calls){times} TEXT\nTEXT: {_ANY_TEXT}\n{calls}"
    holds_trigger = f"/(.|\\n)*{_regex_literal(form.trigger)}(.|\\n)*/"
    return (
        f"start: (before calls){times} TEXT\nbefore[suffix={_quoted(form.trigger)}]: {_ANY_TEXT}\n"
        f"TEXT: {_ANY_TEXT} & ~{holds_trigger}\n{calls}"
    )


def either(first: str, second: str) -> str:
    """What one of two grammars allows."""
    return _compose("start: @first | @second\n", first=first, second=second)


def after_thinking(
    body: str, opening: str, closing: str, special: Mapping[str, int], *, has_begun: bool
) -> str:
    """A grammar that begins behind the model's thoughts. `has_begun`: the prompt has opened them; else the model may
    leave them out."""
    if closing in special:
        thoughts = f"thoughts: TEXT <[{special[closing]}]>\nTEXT: {_ANY_TEXT}\n"
    else:
        thoughts = f"thoughts[suffix={_quoted(closing)}]: {_ANY_TEXT}\n"
    if has_begun:
        start = "start: thoughts /\\s{0,4}/ @body\n"
    else:
        opened = f"<[{special[opening]}]>" if opening in special else _quoted(opening)
        start = f"start: ({opened} thoughts /\\s{{0,4}}/)? @body\n"
    return _compose(start + thoughts, body=body)


def _compose(main: str, **parts: str) -> str:
    """One grammar of several; `main` names the others as @name."""
    grammars: list[dict[str, Any]] = [{"name": "main", "lark_grammar": main}]
    for name, part in parts.items():
        try:
            inner = json.loads(part)["grammars"]
        except (ValueError, KeyError, TypeError):
            inner = [{"lark_grammar": part}]
        # A grammar that is put together itself keeps its parts, under names that nobody else has.
        known = {one["name"]: f"{name}_{one['name']}" for one in inner[1:]}
        for number, one in enumerate(inner):
            renamed = {**one, "name": name if number == 0 else known[one["name"]]}
            if known and renamed.get("lark_grammar"):
                for old, new in known.items():
                    renamed["lark_grammar"] = renamed["lark_grammar"].replace(f"@{old}", f"@{new}")
            grammars.append(renamed)
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


class _Writer:
    """Writes the rules of one format."""

    def __init__(self, form: ToolFormat, special: Mapping[str, int]) -> None:
        self._wrapping = form.wrapping
        self._special = {text: special[text] for text in form.markers if text in special}

    def calls(self, functions: Sequence[FunctionShape], *, only_one: bool, without: str = "") -> str:
        """The rule `calls` and those that it needs; `without` is left out where it stands first."""
        wrapping = self._wrapping
        if wrapping.before_all:
            wrapping = replace(wrapping, before_all=wrapping.before_all.removeprefix(without))
        else:
            wrapping = replace(wrapping, before_call=wrapping.before_call.removeprefix(without))
        between = self._text(wrapping.between)
        more = "" if only_one else f" ({between} call){{0,{MAX_CALLS - 1}}}"
        rules = [
            f"calls: {self._text(wrapping.before_all)} call{more} {self._text(wrapping.after_all)}",
            "call: " + " | ".join(f"call{number}" for number in range(len(functions))),
        ]
        for number, function in enumerate(functions):
            rules += self._call(number, function, wrapping)
        return "\n".join(rules) + "\n"

    def _call(self, number: int, function: FunctionShape, wrapping: Wrapping) -> list[str]:
        before = self._text(wrapping.before_call.format(name=function.name))
        after = self._text(wrapping.after_call.format())
        rule = f"call{number}: {before} arguments{number} {after}"
        schema = {"type": "object", **function.parameters}
        if wrapping.arguments == "json":
            return [rule, f"arguments{number}: {_schema(schema)}"]
        return [rule, *self._named_arguments(number, schema)]

    def _named_arguments(self, number: int, schema: Mapping[str, Any]) -> list[str]:
        """One after the other, in the order of the schema; those that are not required may be left out."""
        found = schema.get("properties")
        properties: dict[str, Any] = found if isinstance(found, dict) else {}
        required = schema.get("required") or []
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        is_xml = self._wrapping.arguments == "xml"
        rules, names = [], []
        for index, (name, one) in enumerate(properties.items()):
            rule = f"value{number}_{index}"
            names.append((rule, name in required))
            one = {**one, **shared} if isinstance(one, dict) else shared
            if is_xml:
                is_text = one.get("type") == "string" and "enum" not in one
                value = "/[^<]*/" if is_text else _xml_value(one)
                opened = self._text(f"<parameter={name}>\n")
                # The expression takes the line end before the tag, too.
                closed = "</parameter>\n" if is_text else "\n</parameter>\n"
                rules.append(f"{rule}: {opened} {value} {self._text(closed)}")
            else:
                rules.append(f"{rule}: {self._text(name + '=')} {_schema(one)}")
        if is_xml:
            parts = [rule if needed else f"{rule}?" for rule, needed in names]
            return [f"arguments{number}: {' '.join(parts) or self._text('')}", *rules]
        # `rest` behind an argument begins with a comma, the first one does not.
        for index in range(len(names), -1, -1):
            for first in (True, False):
                label = f"{'first' if first else 'rest'}{number}_{index}"
                if index == len(names):
                    rules.append(f'{label}: ""')
                    continue
                rule, needed = names[index]
                comma = "" if first else '", " '
                taken = f"{comma}{rule} rest{number}_{index + 1}"
                left = "" if needed else f" | {'first' if first else 'rest'}{number}_{index + 1}"
                rules.append(f"{label}: {taken}{left}")
        return [f"arguments{number}: first{number}_0", *rules]

    def _text(self, text: str) -> str:
        """A text in Lark, with its special tokens as such."""
        parts: list[str] = []
        while text:
            hits = [(text.find(marker), marker) for marker in self._special if marker in text]
            at, marker = min(hits, default=(len(text), ""))
            if at > 0:
                parts.append(_quoted(text[:at]))
            if marker:
                parts.append(f"<[{self._special[marker]}]>")
            text = text[at + len(marker) :]
        return " ".join(parts) or '""'


def _schema(schema: Mapping[str, Any]) -> str:
    options = {"whitespace_pattern": WHITE_SPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _xml_value(schema: Mapping[str, Any]) -> str:
    """A value that is written as text if it is a string, else as JSON."""
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(one, str) and one for one in choices):
        return "(" + " | ".join(map(_quoted, choices)) + ")"
    return _schema(schema)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _regex_literal(text: str) -> str:
    return "".join(f"\\{one}" if one in "\\/[](){}.*+?^$|<>&~" and one not in "<>" else one for one in text)
