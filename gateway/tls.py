"""Certificates of the front, for HTTP and gRPC, read again when their files change.

Made by front.py. New connections get the new certificate; those that are open keep theirs.
"""

from __future__ import annotations

import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import GatewayError
from gateway.log import Logger

CHECK_S = 5.0


class CertificateError(GatewayError):
    """A certificate or key cannot be used."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. With `ca` clients must show a certificate that it has signed."""

    certificate: Path
    key: Path
    ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [self.certificate, self.key, *([self.ca] if self.ca is not None else [])]


class Certificates:
    """The context of HTTP's connections, and the credentials of gRPC's."""

    def __init__(self, files: TlsFiles, log: Logger) -> None:
        """Raises CertificateError."""
        self.files = files
        self._log = log
        self._states = self._look()
        self._checked_at = time.monotonic()
        self.context = _context(files)

    def check(self) -> None:
        """To be called now and then: takes on files that have changed. What cannot be used is reported, and the
        certificate from before is shown."""
        now = time.monotonic()
        if now < self._checked_at + CHECK_S:
            return
        self._checked_at = now
        states = self._look()
        if states == self._states:
            return
        self._states = states
        try:
            _context(self.files)  # a broken file must not leave half of it in the context that is used
            _load(self.context, self.files)
        except CertificateError as error:
            self._log.error("certificate not read again; the one from before holds", detail=str(error))
            return
        self._log.info("certificate read again", file=str(self.files.certificate))

    def grpc_credentials(self, grpc: Any) -> Any:
        """Server credentials that follow the files. `grpc`: the module, which this one does not import."""

        def read() -> Any:
            ca = self.files.ca.read_bytes() if self.files.ca is not None else None
            pair = (self.files.key.read_bytes(), self.files.certificate.read_bytes())
            return grpc.ssl_server_certificate_configuration([pair], root_certificates=ca)

        served = self._states

        def changed() -> Any:
            """Called by gRPC at each handshake; None: as before."""
            nonlocal served
            if self._states == served:
                return None
            served = self._states
            try:
                return read()
            except OSError:
                return None

        return grpc.dynamic_ssl_server_credentials(read(), changed, self.files.ca is not None)

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state_of(path) for path in self.files.paths]


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load(context, files)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(context: ssl.SSLContext, files: TlsFiles) -> None:
    """Raises CertificateError."""
    for flag, path in (("--ssl-certfile", files.certificate), ("--ssl-keyfile", files.key)):
        if not path.is_file():
            raise CertificateError(f"{flag} {path}: there is no such file")
    try:
        # A passphrase would be asked for on the terminal, where nobody is.
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except (OSError, ValueError) as error:
        text = f"--ssl-certfile {files.certificate}, --ssl-keyfile {files.key}: {error}"
        raise CertificateError(
            f"{text}; give PEM files that belong together, the key without passphrase"
        ) from None
    if files.ca is not None:
        try:
            context.load_verify_locations(files.ca)
        except OSError as error:
            raise CertificateError(f"--ssl-ca-certs {files.ca}: {error}; give a PEM file") from None


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
