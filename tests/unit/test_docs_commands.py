"""Every command in the docs is one that exists: those of phalanx go through its parser and its checks, what they are
said to print is what they print, and each other program is run by a test."""

from __future__ import annotations

import argparse
import doctest
import shlex
import sys
from pathlib import Path

import pytest

from launcher.cli import build_parser, main
from launcher.client_commands import split_serve_arguments
from launcher.errors import LauncherError
from launcher.settings import Settings
from tests.docs_pages import PAGES, ROOT, Block, Command, blocks, commands, files

RUN_BY = {
    "make serve": "Makefile",
    "make test": "Makefile",
    "make test-all": "Makefile",
    "make test-long": "Makefile",
    "make chaos": "Makefile",
    "curl": "tests/api/test_operations.py",
    "mpirun": "tests/world/run.py",
    "pip install": "pyproject.toml",
    "install": "tests/recovery/test_service.py",
    "systemctl": "tests/recovery/test_service.py",
    "docker build": "tests/unit/test_dockerfile.py",
    "kubectl create secret": "tests/unit/test_k8s_examples.py",
    "kubectl apply": "tests/unit/test_k8s_examples.py",
    "sbatch": "tests/cluster/test_slurm.py",
    "scancel": "tests/cluster/test_slurm.py",
    "squeue": "tests/cluster/test_slurm.py",
    "srun": "tests/cluster/test_slurm.py",
    "source": "tests/unit/test_docs_commands.py",
    ".": "tests/unit/test_docs_commands.py",
}
"""What runs a program or defines it, by the beginning of the command; the last word of that must be in the file."""

PLACEHOLDERS = {"MODEL": "smollm2-135m-instruct", "N": "2", "FILE": "questions.jsonl", "PORT": "8000"}
PRINTED_BY = "printed by: "
FROM_FILE = "from: "
ALL = [command for page in PAGES for command in commands(page)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands find what they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def lay_out(page: Path, folder: Path) -> None:
    """The files that the page has its reader write, and those that its commands make at once."""
    for command in commands(page):
        if (
            command.program == "phalanx"
            and command.words[1:2] == ("curve-keygen",)
            and command.words[2] != "DIR"
        ):
            assert main(command.words[1:]) == 0
    for name, text in files(page).items():
        path = (folder / name).resolve()
        if path.is_relative_to(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def parse(words: list[str]) -> argparse.Namespace:
    own, for_serve = split_serve_arguments([PLACEHOLDERS.get(word, word) for word in words])
    options = build_parser().parse_args(own)
    if for_serve:
        build_parser().parse_args(["serve", "model", *for_serve])
    return options


def test_there_are_commands() -> None:
    assert len(ALL) > 20 and {command.block.page.name for command in ALL} >= {"README.md", "cli.md"}


@pytest.mark.parametrize("command", [c for c in ALL if c.program == "phalanx"], ids=lambda c: c.place)
def test_phalanx_understands_what_the_docs_say(
    command: Command, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(command.block.page, folder)
    try:
        options = parse(list(command.words[1:]))
        if options.command == "serve":
            Settings.from_arguments(options)
    except SystemExit as error:
        pytest.fail(f"{command.place}: exit code {error.code}: {capsys.readouterr().err}")
    except LauncherError as error:
        pytest.fail(f"{command.place}: {error}")


@pytest.mark.parametrize("command", [c for c in ALL if c.program != "phalanx"], ids=lambda c: c.place)
def test_what_is_not_ours_is_run_by_a_test(command: Command) -> None:
    if command.words[:2] == ("python", "-m"):
        assert any(
            (ROOT / f"{command.words[2].replace('.', '/')}{end}").exists() for end in (".py", "/__main__.py")
        )
        return
    line = shlex.join(command.words)
    known = [begin for begin in RUN_BY if line == begin or line.startswith(f"{begin} ")]
    assert known, f"{command.place}: which test runs it? Name it in RUN_BY"
    runner = ROOT / RUN_BY[max(known, key=len)]
    assert max(known, key=len).split()[-1] in runner.read_text(), f"{runner} has no {line}"


SAID = [block for page in PAGES for block in blocks(page) if block.marker.startswith((PRINTED_BY, FROM_FILE))]


@pytest.mark.parametrize("block", SAID, ids=lambda block: block.place)
def test_what_the_docs_show_is_what_is(
    block: Block, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`...` stands for anything."""
    if block.marker.startswith(FROM_FILE):
        got = (ROOT / block.marker.removeprefix(FROM_FILE)).read_text()
    else:
        lay_out(block.page, folder)
        program, *words = shlex.split(block.marker.removeprefix(PRINTED_BY))
        assert program == "phalanx"
        code = main([PLACEHOLDERS.get(word, word) for word in words])
        got, errors = capsys.readouterr()
        assert code == 0, errors
        for real, shown in (
            (str(folder), "."),
            (sys.executable, "python"),
            (str(Path(sys.prefix) / "bin") + "/", ""),
        ):
            got = got.replace(real, shown)
    checker = doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert checker.check_output(block.text, got, flags), f"{block.place}: it is\n{got}"
