"""Which port the front's gRPC server gets. Called by `serve` before anything is started; binds nothing for good: the
front does."""

from __future__ import annotations

import socket
from collections.abc import Callable

from launcher.errors import LauncherError

DEFAULT_PORT = 8001


def choose_grpc_port(host: str, wanted: int | None, say: Callable[[str], None]) -> int | None:
    """The port; None if nobody asked for one and the default is in use, which is said. Raises LauncherError if one
    was asked for that cannot be had."""
    port = DEFAULT_PORT if wanted is None else wanted
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            reason = "is in use" if not isinstance(error, PermissionError) else "needs privileges"
            if wanted is not None:
                text = f"port {port} on {host} {reason}; choose another one with --grpc-port"
                raise LauncherError(text) from None
            say(f"port {port} on {host} {reason}: gRPC is not served; choose another one with --grpc-port")
            return None
    return port
