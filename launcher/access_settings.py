"""Who may connect, how, and what is said of it: the flags of `phalanx serve` that only the front reads. A part of
settings.py; must hold nothing that concerns a world."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import SettingsError

KEY_VARIABLE = "PHALANX_API_KEY"
LOG_FORMATS = ("json", "console")
LOG_LEVELS = ("debug", "info", "warning", "error")


def _flag(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field that is a flag."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class AccessSettings:
    """All of them. Checked by `check_access`."""

    api_key: str = field(
        default="",
        repr=False,
        metadata={
            "help": "key that clients must send; others on this machine see it in the process list, so rather set "
            f"the variable {KEY_VARIABLE}, or use --api-key-file",
            "metavar": "KEY",
        },
    )
    api_key_file: Path | None = field(
        default=None,
        metadata={
            "help": "file of `phalanx keys`: a key for each client, with limits; read again when it changes",
            "metavar": "FILE",
        },
    )
    open_metrics: bool = _flag(False, "answer /metrics without a key, too")
    ssl_certfile: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of the certificate for HTTPS and gRPC; read again when it changes",
            "metavar": "FILE",
        },
    )
    ssl_keyfile: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of its key, without passphrase; default: in --ssl-certfile",
            "metavar": "FILE",
        },
    )
    ssl_ca_certs: Path | None = field(
        default=None,
        metadata={
            "help": "PEM file of the CAs that must have signed clients' certificates",
            "metavar": "FILE",
        },
    )
    allowed_origins: str = _flag(
        "", "origins whose pages browsers let ask here (CORS), by commas; *: all; default: none", "ORIGINS"
    )
    allowed_hosts: str = _flag(
        "", "names that clients may call this server by, by commas; default: any", "HOSTS"
    )
    max_body_size: int = _flag(1 << 24, "most that a request may send, like 16MiB", "SIZE")
    max_connections: int = _flag(4096, "most HTTP connections that are open at once", "N")
    read_timeout: float = _flag(
        30.0, "how long a client may take to send the head of a request, and to send its body", "SECONDS"
    )
    slow_client_timeout: float = _flag(
        60.0, "how long a client may read nothing of an answer before its connection is ended", "SECONDS"
    )
    otlp_endpoint: str = _flag(
        "",
        "OTLP/HTTP receiver of traces, like http://127.0.0.1:4318; default: OTEL_EXPORTER_OTLP_ENDPOINT, or none",
        "URL",
    )
    access_log: bool = _flag(False, "a line for each HTTP request in front.log, without query and body")
    log_format: str = _flag("json", "how the front writes its log")
    log_level: str = _flag("info", "what the front logs at least")

    def check_access(self) -> None:
        """Raises SettingsError."""
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise SettingsError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile beside them")
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "api_key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                hint = "; make it with `phalanx keys add NAME`" if name == "api_key_file" else ""
                raise SettingsError(f"--{name.replace('_', '-')} {path}: there is no such file{hint}")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise SettingsError(f"--otlp-endpoint {self.otlp_endpoint}: write it like http://127.0.0.1:4318")
        if not self.api_key.isprintable() or " " in self.api_key:
            raise SettingsError("--api-key: must be printable characters without spaces")
        for name, least in (("max_body_size", 1024), ("max_connections", 1)):
            if getattr(self, name) < least:
                text = f"--{name.replace('_', '-')} {getattr(self, name)}: must be {least} or more"
                raise SettingsError(text)
        for name in ("read_timeout", "slow_client_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                text = (
                    f"--{name.replace('_', '-')} {getattr(self, name):g}: must be above 0, and 86400 at most"
                )
                raise SettingsError(text)
        for name, allowed in (("log_format", LOG_FORMATS), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in allowed:
                text = (
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be one of {', '.join(allowed)}"
                )
                raise SettingsError(text)

    def access_arguments(self) -> list[str]:
        """For the front's command line, which has no secrets on it."""
        arguments = ["--max-body-bytes", str(self.max_body_size)]
        arguments += ["--max-connections", str(self.max_connections)]
        arguments += ["--read-timeout-s", f"{self.read_timeout:g}"]
        arguments += ["--slow-client-s", f"{self.slow_client_timeout:g}"]
        arguments += ["--log-format", self.log_format, "--log-level", self.log_level]
        for name in ("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
            if (path := getattr(self, name)) is not None:
                arguments += [f"--{name.replace('_', '-')}", str(path.absolute())]
        for name in ("allowed_origins", "allowed_hosts", "otlp_endpoint"):
            if value := getattr(self, name):
                arguments += [f"--{name.replace('_', '-')}", value]
        for name in ("open_metrics", "access_log"):
            if getattr(self, name):
                arguments.append(f"--{name.replace('_', '-')}")
        return arguments

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.front_secrets()) or self.api_key_file is not None

    def front_secrets(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Variables for the front alone."""
        key = self.api_key or environment.get(KEY_VARIABLE, "")
        return {KEY_VARIABLE: key} if key else {}
