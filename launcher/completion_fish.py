"""Completion for fish, which shtab does not make: a `complete` command for each flag and subcommand, as fish's manual
describes them (complete(1))."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_FILE_NAMES = ("FILE", "DIR", "PATH", "FILE.yaml", "MODEL")


def fish_script(parser: argparse.ArgumentParser) -> str:
    """The script for a parser with subcommands."""
    program = parser.prog
    commands = _subcommands(parser)
    lines = [f"# completion of {program} for fish", f"complete -c {program} -f"]
    lines += _flags(program, parser, "__fish_use_subcommand")
    for name, (help_text, subparser) in commands.items():
        lines.append(f"complete -c {program} -n __fish_use_subcommand -a {name} -d {_quote(help_text)}")
        seen = f"__fish_seen_subcommand_from {name}"
        nested = _subcommands(subparser)
        for nested_name, (nested_help, nested_parser) in nested.items():
            lines.append(f"complete -c {program} -n {_quote(seen)} -a {nested_name} -d {_quote(nested_help)}")
            both = f"{seen}; and __fish_seen_subcommand_from {nested_name}"
            lines += _flags(program, nested_parser, both)
        lines += _flags(program, subparser, seen)
    return "\n".join(lines)


def _flags(program: str, parser: argparse.ArgumentParser, condition: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        takes_file = action.metavar in _FILE_NAMES
        if not action.option_strings:
            words = [f"complete -c {program} -n {_quote(condition)}"]
            if action.choices:
                words.append(f"-a {_quote(' '.join(map(str, action.choices)))}")
            elif takes_file:
                words.append("-F")
            else:
                continue
            yield " ".join(words)
            continue
        words = [f"complete -c {program} -n {_quote(condition)}"]
        words += [
            f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}" for text in action.option_strings
        ]
        if action.nargs != 0:
            words.append("-r")
            if action.choices:
                words.append(f"-f -a {_quote(' '.join(map(str, action.choices)))}")
            elif takes_file:
                words.append("-F")
            else:
                words.append("-f")
        if action.help and action.help != argparse.SUPPRESS:
            words.append(f"-d {_quote(_first_sentence(action.help))}")
        yield " ".join(words)


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Of each its one line of help, and its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (helps.get(name, ""), found) for name, found in action.choices.items()}
    return {}


def _first_sentence(text: str) -> str:
    return text.replace("%%", "%").split(". ")[0].split("; ")[0]


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
