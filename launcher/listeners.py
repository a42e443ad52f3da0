"""The sockets of the fronts' HTTP port: bound by the launcher, so that a taken port is found out at once and a front
that is restarted refuses nobody. Called by `serve` and `doctor`; never accepts a connection."""

from __future__ import annotations

import errno
import socket

from launcher.errors import LauncherError

_BACKLOG = 2048


def bind_fronts(host: str, port: int, count: int) -> list[socket.socket]:
    """A socket for each front, all at one port: the kernel gives each connection to one of them, by its addresses.
    Raises LauncherError that names the flag."""
    first = bind(host, port)
    if count == 1:
        return [first]
    # Whoever shares a port can share it with strangers of the same user, so that it was taken alone first.
    port = first.getsockname()[1]
    first.close()
    return [bind(host, port, shared=True) for _ in range(count)]


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket bound for HTTP, not listening yet: until the front runs, clients are refused rather than kept
    waiting. `shared`: others may be bound to the same port (SO_REUSEPORT). Raises LauncherError that names the
    flag."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LauncherError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = _port_in_use(host, port)
        elif error.errno == errno.EACCES:
            message = f"port {port} needs privileges; choose one above 1023 with --port"
        else:
            message = f"--host {host}: {error.strerror}; give an address of this machine"
        raise LauncherError(message) from None
    return listener


def listen(listener: socket.socket, host: str, port: int) -> None:
    """Raises LauncherError if somebody else was faster."""
    try:
        listener.listen(_BACKLOG)
    except OSError:  # somebody bound the port as well while the model was being prepared, and was faster
        raise LauncherError(_port_in_use(host, port)) from None


def _port_in_use(host: str, port: int) -> str:
    return f"port {port} on {host} is in use; choose another one with --port"
