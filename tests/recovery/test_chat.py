"""`phalanx chat` on a terminal: its commands, and answers whose world or front dies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.control_messages import Fault
from tests.echo_world import EchoCluster
from tests.terminal import Terminal

COMMAND = [sys.executable, "-m", "launcher.cli", "chat"]
STORY = "There was a shield and nobody put it down. "


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("front"), step_s=0.02) as cluster:
        cluster.start_world()
        cluster.wait_serving(1)
        yield cluster


def chat(cluster: EchoCluster, *arguments: str) -> Terminal:
    terminal = Terminal([*COMMAND, "--url", cluster.url, *arguments])
    terminal.read_until(r"echo at .* /help lists commands\.\r\n> ")
    return terminal


def leave(terminal: Terminal) -> None:
    terminal.type("/bye\n")
    assert terminal.wait() == 0


def test_commands(cluster: EchoCluster, tmp_path: Path) -> None:
    terminal = chat(cluster, "--system", "Be brief.", "--max-tokens", "12")
    terminal.type("hello\n")
    # The echo repeats the rendered conversation: it begins with the system prompt.
    terminal.read_until(r"system\r\nBe b\r\n.*\(12 tokens, \d+\.\d per second\).*\r\n> ")
    terminal.type('"""one\ntwo\n"""\n')
    terminal.read_until(r"per second\).*\r\n> ")
    terminal.type("three\\\nfour\n")
    terminal.read_until(r"per second\).*\r\n> ")
    terminal.type("/history\n")
    shown = terminal.read_until(r"user: three\r\nfour\r\nassistant: .*\r\n(?s:.*)> ")
    assert "system: Be brief." in shown and "user: one\r\ntwo\r\n" in shown
    terminal.type(f"/save {tmp_path}/talk.json\n")
    terminal.read_until("written to")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 3]
    assert saved["messages"][3]["content"] == "one\ntwo"
    terminal.type("/clear\n/history\n")
    terminal.read_until(r"forgotten\r\n> /history\r\nsystem: Be brief\.\r\n> ")
    terminal.type("/set max_tokens 3\n/set colour red\n/set temperature much\n/what\n")
    terminal.read_until(r"max_tokens 3(?s:.*)there is no colour; there are(?s:.*)must be a number")
    terminal.read_until(r"/what is no command; /help lists them")
    terminal.type("hello\n")
    terminal.read_until(r"\(3 tokens")
    terminal.type("/retry\n")
    terminal.read_until(r"\(3 tokens")
    terminal.type(f"/load {tmp_path}/talk.json\n")
    terminal.read_until("6 turns")
    leave(terminal)
    (tmp_path / "wrong.json").write_text("{}")
    wrong = Terminal([*COMMAND, "--url", cluster.url, "--load", str(tmp_path / "wrong.json")])
    wrong.read_until("it holds no conversation")
    assert wrong.wait() == 1


def test_a_world_that_dies_is_told_and_the_answer_goes_on(cluster: EchoCluster) -> None:
    terminal = chat(cluster, "--max-tokens", "150")
    terminal.type(f"{STORY}\n")
    terminal.read_until(r"user\r\nThere was")
    epoch = cluster.epoch
    cluster.faults.insert(0, Fault(epoch, 1.0, "killed", 0, "here", "rank 0 was killed by SIGKILL"))
    cluster.kill_world(epoch)
    rest = terminal.read_until(
        rf"\[world {epoch} died \(rank 0 was killed by SIGKILL\); it is being replaced\]"
    )
    cluster.faults[0] = Fault(epoch, 1.0, "killed", 0, "here", "rank 0 was killed by SIGKILL", recover_s=0.25)
    cluster.start_world()
    rest += terminal.read_until(r"\[the next world took over after 0\.25 s; going on\]")
    rest += terminal.read_until(r"tokens, \d+\.\d per second\).*\r\n> ")
    words = "".join(line for line in rest.split("\r\n") if "[" not in line and "tokens," not in line)
    assert words.replace("> ", "").startswith(" a shield and nobody put it down."), rest
    leave(terminal)


def test_a_front_that_is_killed_is_told_and_the_answer_goes_on(cluster: EchoCluster) -> None:
    terminal = chat(cluster, "--max-tokens", "150")
    terminal.type(f"{STORY}\n")
    terminal.read_until(r"user\r\nThere was")
    cluster.restart_front()
    rest = terminal.read_until(r"\[the stream stopped \(.*\); taking it up again\]")
    rest += terminal.read_until(r"\[taken up again\]")
    rest += terminal.read_until(r"tokens, \d+\.\d per second\).*\r\n> ")
    words = "".join(line for line in rest.split("\r\n") if "[" not in line and "tokens," not in line)
    assert words.replace("> ", "").startswith(" a shield and nobody put it down."), rest
    leave(terminal)
