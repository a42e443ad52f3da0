"""`phalanx chat`: a conversation in the terminal, streamed over HTTP. Ctrl-C stops an answer, Ctrl-D leaves, /help
lists the commands. An answer outlives its connection and its world: chat_stream.py reads it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.chat_stream import AnswerStream
from launcher.errors import LauncherError
from launcher.http_client import check_key, first_model, key_or_default

_HELP = """/clear              forget the conversation, keep the system prompt
/system [TEXT]      show or change the system prompt; it begins a new conversation
/set NAME VALUE     temperature, max_tokens, top_p or seed; /set alone shows them
/retry              ask the last question again
/history            show the conversation
/save FILE          write the conversation to a file (JSON)
/load FILE          take one up again
/help               this list
/bye                leave, as Ctrl-D does
Several lines: begin with \"\"\" and end with \"\"\", or end a line with a backslash. Ctrl-C stops an answer."""

_SETTINGS: dict[str, Callable[[str], float | int]] = {
    "temperature": float,
    "max_tokens": int,
    "top_p": float,
    "seed": int,
}
_HISTORY_LINES = 1000


@dataclass
class Conversation:
    """What is sent with each question."""

    url: str
    model: str
    api_key: str | None
    system: str | None
    settings: dict[str, float | int]
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system prompt, if there is one, and the turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def save(self, path: Path) -> None:
        """Raises OSError."""
        content = {"model": self.model, "settings": self.settings, "messages": self.messages}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Raises OSError, or ValueError if the file is no conversation."""
        content = json.loads(path.read_text())
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ValueError("it holds no conversation; it must be what /save writes, or a list of messages")
        self.system = next((m["content"] for m in messages if m["role"] == "system"), None)
        self.turns = [m for m in messages if m["role"] != "system"]


def chat(
    url: str,
    model: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    api_key: str | None = None,
    load: Path | None = None,
) -> int:
    """Talks until Ctrl-D. Raises LauncherError if nothing answers at the start, or the key is wrong: a person shall
    not first write a question."""
    key = key_or_default(api_key)
    if model is None:
        model = first_model(url, key)
    else:
        check_key(url, key)
    settings: dict[str, float | int] = {"temperature": temperature, "max_tokens": max_tokens}
    conversation = Conversation(url, model, key, system, settings)
    if load is not None:
        try:
            conversation.load(load)
        except (OSError, ValueError) as error:
            raise LauncherError(f"--load {load}: {error}") from None
    interactive = sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        import readline

        if interactive:
            readline.set_history_length(_HISTORY_LINES)
    if interactive:
        print(f"{model} at {url}. Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.")
    return Session(conversation, interactive).run()


class Session:
    """One terminal, or one pipe whose lines are questions."""

    def __init__(self, conversation: Conversation, interactive: bool) -> None:
        self._conversation = conversation
        self._interactive = interactive

    def run(self) -> int:
        """0; of a pipe 1 if a question had no answer."""
        failed = False
        while True:
            try:
                question = self._read()
            except EOFError:
                if self._interactive:
                    print()
                return int(failed and not self._interactive)
            except KeyboardInterrupt:
                print()
                continue
            if not question.strip():
                continue
            if question.startswith("/") and self._interactive:
                if self._command(question.strip()):
                    return 0
                continue
            failed |= not self._ask(question)

    def _read(self) -> str:
        """One question, of several lines if it begins with three quotes or its lines end with a backslash. Raises
        EOFError, KeyboardInterrupt."""
        first, more = ("> ", ". ") if self._interactive else ("", "")
        line = input(first)
        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].endswith('"""'):
                lines.append(input(more))
            lines[-1] = lines[-1][:-3]
            return "\n".join(lines).strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(more))
        return "\n".join(lines)

    def _ask(self, question: str) -> bool:
        """Prints the answer as it comes. What came of it is kept, if Ctrl-C stopped it too; whether anything did."""
        conversation = self._conversation
        conversation.turns.append({"role": "user", "content": question})
        body: dict[str, Any] = {
            "model": conversation.model,
            "messages": conversation.messages,
            **conversation.settings,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stream = AnswerStream(conversation.url, body, conversation.api_key, self._tell)
        parts: list[str] = []
        try:
            for text in stream.pieces():
                parts.append(text)
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            stream.cancel()
        except LauncherError as error:
            print(f"phalanx: error: {error}", file=sys.stderr)
        print()
        if self._interactive and stream.speed is not None:
            print(self._dim(f"({stream.num_tokens} tokens, {stream.speed:.1f} per second)"))
        answer = "".join(parts)
        if answer:
            conversation.turns.append({"role": "assistant", "content": answer})
        else:
            conversation.turns.pop()  # neither question nor answer shall confuse what follows
        return bool(answer)

    def _tell(self, note: str) -> None:
        """What happens to the answer, in the middle of it."""
        if self._interactive:
            print(f"\n{self._dim(f'[{note}]')}", flush=True)
        else:
            print(f"phalanx: {note}", file=sys.stderr)

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text

    # ----------------------------------------------------------------------- commands

    def _command(self, line: str) -> bool:
        """Whether it is time to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        conversation = self._conversation
        if name in ("/bye", "/exit", "/quit"):
            return True
        if name == "/clear":
            conversation.turns.clear()
            print("forgotten")
        elif name == "/system":
            if rest:
                conversation.system = rest
                conversation.turns.clear()
            print(conversation.system or "there is no system prompt")
        elif name == "/set":
            self._set(rest)
        elif name == "/history":
            for message in conversation.messages:
                print(f"{message['role']}: {message['content']}")
        elif name == "/retry":
            self._retry()
        elif name in ("/save", "/load"):
            self._file(name, rest)
        elif name in ("/help", "/?"):
            print(_HELP)
        else:
            print(f"{name} is no command; /help lists them")
        return False

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        settings = self._conversation.settings
        if rest and name not in _SETTINGS:
            print(f"there is no {name}; there are {', '.join(_SETTINGS)}")
        elif value:
            try:
                settings[name] = _SETTINGS[name](value)
            except ValueError:
                print(f"{name} {value}: must be a number")
        print(", ".join(f"{key} {number}" for key, number in settings.items()))

    def _retry(self) -> None:
        turns = self._conversation.turns
        while turns and turns[-1]["role"] != "user":
            turns.pop()
        if turns:
            self._ask(turns.pop()["content"])
        else:
            print("nothing was asked yet")

    def _file(self, name: str, rest: str) -> None:
        if not rest:
            print(f"{name} FILE: which file?")
            return
        path = Path(rest).expanduser()
        try:
            if name == "/save":
                self._conversation.save(path)
                print(f"written to {path}")
            else:
                self._conversation.load(path)
                print(f"{len(self._conversation.turns)} turns")
        except (OSError, ValueError) as error:
            print(f"{path}: {error}")


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )
