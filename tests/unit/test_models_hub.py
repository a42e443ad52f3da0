"""Models from the Hugging Face hub: the hub's own client, against a server on this machine that answers as
the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.tiny_models import make_tiny_llama
from tests.unit.test_models_prepare import prepare

MODEL = "some-org/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One model, and a note of each file that was fetched."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fetched: list[str] = []

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        files = sorted(file for file in self.server.folder.rglob("*") if file.is_file())
        names = {file.relative_to(self.server.folder).as_posix(): file for file in files}
        if path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main"):
            siblings = [{"rfilename": name} for name in names]
            self._json({"_id": "1", "id": MODEL, "sha": COMMIT, "siblings": siblings, "private": False})
        elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
            self._json(
                [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _hash(file)}
                    for name, file in names.items()
                ]
            )
        elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
            if self.command == "GET":
                self.server.fetched.append(name)
            data = names[name].read_bytes()
            self._send(200, data, {"ETag": f'"{_hash(names[name])}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/gated/"):
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = make_tiny_llama(tmp_path / "upstream", max_shard_size="200KB")
    # What a model's makers also put there, and what nobody wants twice.
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.safetensors").write_bytes(bytes(1000))
    (folder / "consolidated.safetensors").write_bytes(bytes(1000))
    (folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (folder / "README.md").write_text("# Tiny")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_is_fetched_once_and_only_what_is_needed(tmp_path: Path, hub: Hub) -> None:
    environment = hub.environment(tmp_path / "home")
    first = prepare(MODEL, "--tp", 3, **environment)
    assert first[-1]["name"] == MODEL
    assert first[-1]["num_heads"] == 9
    fetched = set(hub.fetched)
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= fetched
    assert not fetched & {"README.md", "pytorch_model.bin", "consolidated.safetensors"}
    assert not [name for name in fetched if "/" in name]
    downloads = [event for event in first if event.get("task") == "download"]
    assert downloads[-1]["unit"] == "B"
    assert downloads[-1]["done"] == sum((hub.folder / name).stat().st_size for name in fetched)

    hub.fetched.clear()
    hub.shutdown()
    assert prepare(MODEL, **environment) == [{**first[-1]}]


def test_a_snapshot_that_is_not_whole_is_completed(tmp_path: Path, hub: Hub) -> None:
    environment = hub.environment(tmp_path / "home")
    folder = Path(prepare(MODEL, **environment)[-1]["path"])
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.resolve().unlink()
    victim.unlink()
    hub.fetched.clear()
    prepare(MODEL, **environment)
    assert hub.fetched == [victim.name]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nobody/nothing", ["nobody/nothing", "no model on the hub", "HF_TOKEN"]),
        ("gated/model", ["agreement", "HF_TOKEN"]),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, hub: Hub, model: str, words: list[str]) -> None:
    message = prepare(model, code=2, **hub.environment(tmp_path / "home"))[-1]["message"]
    assert all(word in message for word in words)


def test_no_network(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    message = prepare(MODEL, code=2, **environment)[-1]["message"]
    assert "cannot be fetched from the hub" in message
    assert "check the network" in message
