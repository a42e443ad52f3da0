"""Every `phalanx` command of docs/bare-metal.md, run over the hosts of namespaces: their addresses and a tiny model
stand in the place of the page's names."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.namespaces import Cluster, cluster, why_not
from tests.docs_pages import ROOT, commands, files
from tests.recovery.served import Served
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

PAGE = ROOT / "docs" / "bare-metal.md"
COMMANDS = [command.words[1:] for command in commands(PAGE) if command.program == "phalanx"]
SERVES = [words[2:] for words in COMMANDS if words[0] == "serve" and "--dry-run" not in words]
SMALL = ("--spare", "none", "--kv-cache-memory", "16MiB", "--dtype", "float32")


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with cluster(3, tmp_path) as three, three.entered():
        for name, value in three.variables.items():
            monkeypatch.setenv(name, value)
        text = files(PAGE)["hosts.txt"]
        for number, name in enumerate(three.names, 1):
            text = text.replace(f"node{number}", name)
        (tmp_path / "hosts.txt").write_text(text)
        make_tiny_llama(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield three


def phalanx(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_command(hosts: Cluster, tmp_path: Path) -> None:
    ran = []
    for words in COMMANDS:
        if words[0] == "serve" and "--dry-run" in words:
            shown = phalanx("serve", str(tmp_path / "model"), *words[2:])
            assert shown.returncode == 0 and f"{hosts.names[1]} slots=2" in shown.stdout, shown
        elif words[0] == "serve":
            flags = [*words[2:], *SMALL]
            with Served(str(tmp_path / "model"), tmp_path / f"run-{len(ran)}", *flags) as served:
                world = served.active_world()
                wanted = {name: int(words[words.index(f"--{name}") + 1]) for name in ("tp", "pp")}
                assert {name: world[name] for name in wanted} == wanted
                assert len({rank["host"] for rank in world["ranks"]}) == wanted["pp"], "a stage on each host"
                status = phalanx("status", "--url", served.url)
                assert status.returncode == 0 and "host2" in status.stdout, status
                assert served.stop() == 0
        elif words[0] == "doctor":
            checked = phalanx(*words)
            assert checked.returncode == 0 and "all-reduce" in checked.stdout, checked
        else:
            assert words[0] == "status", f"what runs phalanx {words[0]}?"  # above, beside each server
        ran.append(words[0])
    assert set(ran) == {"doctor", "serve", "status"} and len(SERVES) == 2
