"""What the pages of the documentation tell people to type, taken out of their code blocks: commands, the files that
they write with `cat > NAME <<EOF`, and what they say a command prints. For the tests of docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
SHELLS = ("sh", "bash", "console")

_BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_HERE_DOCUMENT = re.compile(
    r"^cat > (?P<name>\S+) <<-?\s*'?(?P<end>\w+)'?\n(?P<text>.*?)^(?P=end)$", re.MULTILINE | re.DOTALL
)
_INNER = re.compile(r"[<$]\((?P<command>[^()]*)\)")
"""`<(COMMAND)` and `$(COMMAND)`."""
_PLACEHOLDER = re.compile(r"<([\w ]+)>")
"""`<what to put here>`."""
_ASSIGNMENT = re.compile(r"\w+=.*")
_ENDS_COMMAND = re.compile(r"[;&|()<>]+")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `marker` is what an HTML comment right above it says."""

    page: Path
    line: int
    language: str
    marker: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without redirections and variables set for it."""

    block: Block
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def place(self) -> str:
        return f"{self.block.place}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[Block]:
    """In the order of the page."""
    content = page.read_text()
    for match in _BLOCK.finditer(content):
        text = match["text"]
        if match["indent"]:
            text = re.sub(f"^{match['indent']}", "", text, flags=re.MULTILINE)
        line = content.count("\n", 0, match.start("language")) + 1
        yield Block(page, line, match["language"], match["marker"] or "", text)


def files(page: Path) -> dict[str, str]:
    """Content by name of the files that the page's shell blocks write."""
    return {
        match["name"]: match["text"]
        for block in blocks(page)
        if block.language in SHELLS
        for match in _HERE_DOCUMENT.finditer(block.text)
    }


def commands(page: Path) -> Iterator[Command]:
    """Of the page's shell blocks, those inside of `$( )` as well. A block of `console` has them behind `$ `."""
    for block in blocks(page):
        if block.language in SHELLS:
            yield from _commands_of(block)


def _commands_of(block: Block) -> Iterator[Command]:
    text = _HERE_DOCUMENT.sub("", block.text).replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    for line in text.splitlines():
        yield from _commands_of_line(block, line)


def _commands_of_line(block: Block, line: str) -> Iterator[Command]:
    for inner in _INNER.finditer(line):
        yield from _commands_of_line(block, inner["command"])
    line = _PLACEHOLDER.sub("PLACEHOLDER", _INNER.sub("INNER", line))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    is_target = False
    for word in [*lexer, ";"]:
        if not _ENDS_COMMAND.fullmatch(word):
            if is_target:
                is_target = False
            elif words or not _ASSIGNMENT.fullmatch(word):
                words.append(word)
        elif word.strip("&").startswith((">", "<")):
            is_target = not word.endswith("&")
            if words and words[-1] in ("1", "2"):  # of `2> file`
                words.pop()
        elif words:
            yield Command(block, tuple(words))
            words = []
