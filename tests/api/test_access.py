"""`phalanx serve` with a key and TLS, as a user starts it: flags, ready line, curl line, `phalanx status`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recovery.served import Served
from tests.unit.test_gateway_connections import certificate

KEY = "open-sesame"


def test_keys_and_tls_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate(tmp_path, "ca")
    certificate(tmp_path, "server", "ca")
    monkeypatch.setenv("PHALANX_API_KEY", KEY)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(tmp_path / "ca.pem"))
    tls = ("--ssl-certfile", str(tmp_path / "server.pem"), "--ssl-keyfile", str(tmp_path / "server.key"))
    with Served("echo", tmp_path / "run", "--spare", "none", *tls) as served:
        assert served.url.startswith("https://")
        # An echo world serves before gRPC is imported: the line waits for it.
        assert "  grpc 127.0.0.1:" in served.ready_line
        asked = subprocess.run(["bash", "-c", served.curl_line], capture_output=True, text=True, timeout=60)
        assert '"Name three colours."' in asked.stdout, asked
        command = [sys.executable, "-m", "launcher.cli", "status", "--url", served.url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0 and "world 1" in shown.stdout.lower(), shown
        without = {"PATH": "/usr/bin:/bin", "SSL_CERT_FILE": str(tmp_path / "ca.pem"), "HOME": str(tmp_path)}
        refused = subprocess.run(command, env=without, cwd=Path.cwd(), capture_output=True, text=True)
        assert refused.returncode == 1 and "401" in refused.stderr, refused
        # The key is where it is needed, and nowhere else.
        for process in served.processes():
            is_front = "gateway.front" in process.cmdline()
            assert (KEY in process.environ().values()) == is_front, process.cmdline()
            assert KEY not in process.cmdline()
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert files and not any(KEY.encode() in path.read_bytes() for path in files)
