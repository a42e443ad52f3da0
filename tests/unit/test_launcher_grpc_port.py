"""Which port gRPC gets: a busy one is refused if it was asked for, and only told of if nobody asked."""

from __future__ import annotations

import socket

import pytest

from launcher import grpc_port
from launcher.errors import LauncherError
from launcher.grpc_port import choose_grpc_port


def test_a_free_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said: list[str] = []
    assert choose_grpc_port("127.0.0.1", port, said.append) == port and said == []
    assert choose_grpc_port("127.0.0.1", 0, said.append) == 0 and said == []


def test_a_busy_port_that_was_asked_for_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(LauncherError, match=f"port {port} .* in use.*--grpc-port"):
            choose_grpc_port("127.0.0.1", port, pytest.fail)


def test_a_busy_default_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        monkeypatch.setattr(grpc_port, "DEFAULT_PORT", busy.getsockname()[1])
        said: list[str] = []
        assert choose_grpc_port("127.0.0.1", None, said.append) is None
        assert len(said) == 1 and "gRPC is not served" in said[0] and "--grpc-port" in said[0]
