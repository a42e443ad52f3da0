"""Settings from flags, file and defaults, and the errors of each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import build_parser
from launcher.errors import SettingsError
from launcher.setting_values import parse_size
from launcher.settings import Settings, default_cache_dir, default_run_dir


def settings_of(*arguments: str) -> Settings:
    return Settings.from_arguments(build_parser().parse_args(["serve", *arguments]))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("1.5g", 3 << 29),
        ("4096", 4096),
        (4096, 4096),
        ("10kB", 10_000),
        ("2 GB", 2_000_000_000),
        ("1TiB", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2Q", "-1G", "2Gi", "1 2", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_size(text)


def test_defaults() -> None:
    settings = settings_of("m")
    assert (settings.tp, settings.pp, settings.ranks) == (1, 1, 1)
    assert (settings.host, settings.port, settings.zmq) == ("127.0.0.1", 8000, "tcp://127.0.0.1:5555")
    assert (settings.max_num_seqs, settings.max_num_batched_tokens) == (64, 1024)
    assert settings.dtype == "auto"
    assert settings.spare == "warm"


def test_flag_over_file_over_default(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: from-file\ntp: 3\npp: 2\nkv-cache-memory: 2GiB\nmax_num_seqs: 8\nhost:\n")
    settings = settings_of("--config", str(config), "--tp", "4")
    assert settings.model == "from-file"
    assert (settings.tp, settings.pp, settings.ranks) == (4, 2, 8)
    assert settings.kv_cache_memory == 2 << 30
    assert settings.max_num_seqs == 8
    assert settings.host == "127.0.0.1"
    assert settings_of("named", "--config", str(config)).model == "named"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv-cache-memroy: 1", "did you mean 'kv-cache-memory'"),
        ("tp: two", "must be a whole number"),
        ("tp: 1.5", "must be a whole number"),
        ("tp: true", "single value"),
        ("tp: [1]", "single value"),
        ("- tp", "name: value"),
        ("tp: {", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=expected) as caught:
        settings_of("m", "--config", str(config))
    assert str(config) in str(caught.value) and "\n" not in str(caught.value)


def test_a_switch(tmp_path: Path) -> None:
    assert not settings_of("m").expert_parallel
    assert settings_of("m", "--expert-parallel").expert_parallel
    assert settings_of("m", "--deterministic").deterministic and not settings_of("m").deterministic
    file = tmp_path / "c.yaml"
    file.write_text("expert-parallel: true\n")
    assert settings_of("m", "--config", str(file)).expert_parallel
    assert not settings_of("m", "--config", str(file), "--no-expert-parallel").expert_parallel
    file.write_text("expert-parallel: 1\n")
    with pytest.raises(SettingsError, match="true or false"):
        settings_of("m", "--config", str(file))


def test_spare_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("spare: none\n")
    assert settings_of("m", "--config", str(file)).spare == "none"
    file.write_text("spare: cold\n")
    with pytest.raises(SettingsError, match="none, warm, hot"):
        settings_of("m", "--config", str(file))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        settings_of("m", "--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tp", "0"],
        ["--pp", "-1"],
        ["--tp", "x"],
        ["--port", "70000"],
        ["--zmq", "5555"],
        ["--grpc-port", "70000"],
        ["--grpc-port", "many"],
        ["--max-num-seqs", "0"],
        ["--max-model-len", "-5"],
        ["--kv-cache-memory", "lots"],
        ["--max-wait-s", "0"],
        ["--max-num-batched-tokens", "8"],
    ],
)
def test_errors_name_the_flag(arguments: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of("m", *arguments)
    assert arguments[0] in str(caught.value)


def test_no_model_is_an_error() -> None:
    with pytest.raises(SettingsError, match="MODEL"):
        settings_of()


def test_folders_follow_the_environment(tmp_path: Path) -> None:
    assert default_cache_dir({"PHALANX_CACHE": "/a"}) == Path("/a")
    assert default_cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/phalanx")
    assert default_run_dir(8000, {"XDG_STATE_HOME": "/c"}) == Path("/c/phalanx/8000")


def test_every_flag_has_help() -> None:
    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    for name, subparser in commands.choices.items():
        for action in subparser._actions:
            assert action.help, f"{name} {action.dest}"


def test_the_readme_has_every_flag_and_command() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = next(action for action in build_parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    for name in commands.choices:
        assert f"phalanx {name} " in readme, name
    for action in commands.choices["serve"]._actions:
        flag = next((text for text in action.option_strings if text.startswith("--")), "")
        off = flag.replace("--", "--no-", 1)  # what is on by default is listed by what switches it off
        assert flag in ("", "--help") or f"`{flag}" in readme or f"`{off}`" in readme, flag


def test_help_imports_little() -> None:
    code = "import sys; from launcher.cli import build_parser; build_parser(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "zmq", "yaml", "rich", "fastapi", "msgspec"} & set(modules)


def test_supervisor_imports_neither_torch_nor_an_http_stack() -> None:
    code = "import sys; import launcher.serve; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    forbidden = {"torch", "fastapi", "uvicorn", "numpy", "transformers", "mpi4py", "engine", "gateway.http"}
    assert not forbidden & set(modules)


def test_the_journal(tmp_path: Path) -> None:
    settings = settings_of("m")
    assert (settings.journal, settings.journal_sync, settings.journal_max_size) == ("disk", False, 1 << 30)
    settings = settings_of("m", "--journal-sync", "--journal-max-size", "64MiB", "--disconnect-grace-s", "0")
    assert (settings.journal_sync, settings.journal_max_size, settings.disconnect_grace_s) == (
        True,
        1 << 26,
        0,
    )
    file = tmp_path / "c.yaml"
    file.write_text("journal: off\njournal-sync: true\n")  # YAML takes off for false
    settings = settings_of("m", "--config", str(file))
    assert (settings.journal, settings.journal_sync) == ("off", True)
    file.write_text("journal-sync: 3\n")
    with pytest.raises(SettingsError, match="must be true or false"):
        settings_of("m", "--config", str(file))
    with pytest.raises(SettingsError, match="--journal-max-size 1024: must be 16MiB or more"):
        settings_of("m", "--journal-max-size", "1KiB")
