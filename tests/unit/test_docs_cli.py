"""docs/cli.md has every command, and of each every flag as the parser has it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from launcher.cli import build_parser

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands_of(parser: argparse.ArgumentParser, before: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command that does something, by its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = {}
            for name, subparser in action.choices.items():
                found |= commands_of(subparser, f"{before} {name}".strip())
            return found
    return {before: parser}


def vars_of(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions]


def test_every_command_has_a_section_with_its_flags() -> None:
    sections = {
        part.splitlines()[0].strip(): part for part in re.split(r"^## phalanx ", TEXT, flags=re.MULTILINE)[1:]
    }
    commands = commands_of(build_parser())
    assert len(commands) > 8
    for name, parser in commands.items():
        if name == "serve":  # the README has its flags, and a test of its own
            assert "serve MODEL" in sections
            continue
        assert name in sections, f"docs/cli.md lacks the section: ## phalanx {name}"
        section = sections[name]
        of_serve = set(vars_of(commands["serve"])) if name in ("k8s render", "slurm render") else set()
        for action in parser._actions:
            if action.dest in of_serve:
                continue
            flags = [text for text in action.option_strings if text not in ("-h", "--help")]
            for flag in flags:
                text = ((action.help or "") % vars(action)).replace(str(Path.home()), "~")
                row = f"docs/cli.md, phalanx {name}, lacks the row: | `{flag}` | {text} |"
                assert re.search(rf"`[^`]*{flag}\b", section) and text in section, row


def test_no_section_is_of_a_command_that_is_gone() -> None:
    commands = {*commands_of(build_parser()), "serve MODEL"}
    for title in re.findall(r"^## phalanx (.*)$", TEXT, flags=re.MULTILINE):
        assert title in commands
    for flag in set(re.findall(r"^\| `(--[a-z-]+)", TEXT, flags=re.MULTILINE)):
        assert any(flag in a.option_strings for p in commands_of(build_parser()).values() for a in p._actions)
