"""What the front is told of who may connect and how: keys, certificates, limits, logs. Part of its command line.

Read by front.py, which makes the parts; the secrets among it come by environment.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

from gateway.http.connections import ConnectionLimits
from gateway.keys import KeyRing
from gateway.log import Logger
from gateway.shared_counts import SharedCounts
from gateway.tls import Certificates, TlsFiles
from gateway.tracing import Tracer

KEY_VARIABLE = "PHALANX_API_KEY"
OTLP_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
MAX_BODY_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Access:
    """Without anything given: no keys, no TLS, the limits of a server on loopback."""

    api_key: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    open_metrics: bool = False
    tls: TlsFiles | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: frozenset[str] = frozenset()
    max_body_bytes: int = MAX_BODY_BYTES
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    access_log: bool = False
    log_format: str = "json"
    log_level: str = "info"
    otlp_endpoint: str = ""
    """Where traces go; empty for none."""

    def key_ring(self, log: Logger, shared: SharedCounts | None = None) -> KeyRing | None:
        """None if no keys are asked for. `shared`: where several fronts count together. Raises KeyFileError."""
        if not self.api_key and self.api_key_file is None:
            return None
        return KeyRing(self.api_key, self.api_key_file, log, shared)

    def certificates(self, log: Logger) -> Certificates | None:
        """None without TLS. Raises CertificateError."""
        return None if self.tls is None else Certificates(self.tls, log)

    def tracer(self, model: str) -> Tracer | None:
        """None without traces. Raises TracingError."""
        return Tracer(self.otlp_endpoint, model) if self.otlp_endpoint else None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """The flags are those of `phalanx serve`; see its help."""
        parser.add_argument("--api-key-file", type=Path)
        parser.add_argument("--open-metrics", action="store_true")
        parser.add_argument("--ssl-certfile", type=Path)
        parser.add_argument("--ssl-keyfile", type=Path)
        parser.add_argument("--ssl-ca-certs", type=Path)
        parser.add_argument("--allowed-origins", default="")
        parser.add_argument("--allowed-hosts", default="")
        parser.add_argument("--max-body-bytes", type=int, default=MAX_BODY_BYTES)
        limits = ConnectionLimits()
        parser.add_argument("--read-timeout-s", type=float, default=limits.read_timeout_s)
        parser.add_argument("--slow-client-s", type=float, default=limits.slow_client_s)
        parser.add_argument("--max-connections", type=int, default=limits.max_connections)
        parser.add_argument("--access-log", action="store_true")
        parser.add_argument("--otlp-endpoint", default="")
        parser.add_argument("--log-format", choices=("json", "console"), default="json")
        parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")

    @classmethod
    def from_arguments(cls, options: argparse.Namespace) -> Access:
        tls = None
        if options.ssl_certfile is not None:
            # A file may hold both, as servers take it.
            tls = TlsFiles(
                options.ssl_certfile, options.ssl_keyfile or options.ssl_certfile, options.ssl_ca_certs
            )
        return cls(
            api_key=os.environ.get(KEY_VARIABLE) or None,
            api_key_file=options.api_key_file,
            open_metrics=options.open_metrics,
            tls=tls,
            allowed_origins=_names(options.allowed_origins),
            allowed_hosts=frozenset(name.lower() for name in _names(options.allowed_hosts)),
            max_body_bytes=options.max_body_bytes,
            connections=ConnectionLimits(
                options.read_timeout_s, options.slow_client_s, options.max_connections
            ),
            access_log=options.access_log,
            log_format=options.log_format,
            log_level=options.log_level,
            otlp_endpoint=options.otlp_endpoint or os.environ.get(OTLP_VARIABLE, ""),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))
