"""Which ZeroMQ endpoints `phalanx serve` takes without keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.curve import make_keys
from launcher.errors import SettingsError
from launcher.zmq_keys import check_zmq


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:5555", "tcp://[::]:5555", "tcp://eth0:5555"],
)
def test_others_need_keys(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"other machines.*curve-keygen.*--zmq-insecure"):
        check_zmq(endpoint, None, False)
    check_zmq(endpoint, None, True)
    make_keys(tmp_path / "keys", "client")
    check_zmq(endpoint, tmp_path / "keys", False)
    with pytest.raises(SettingsError, match="--zmq-insecure means without keys"):
        check_zmq(endpoint, tmp_path / "keys", True)


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:5555", "tcp://[::1]:5555", "tcp://localhost:5555", "ipc:///tmp/x"]
)
def test_this_machine_needs_none(endpoint: str) -> None:
    check_zmq(endpoint, None, False)


def test_keys_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--zmq-curve-dir: .*curve-keygen"):
        check_zmq("tcp://127.0.0.1:5555", tmp_path / "none", False)
