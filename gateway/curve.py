"""CURVE: encrypted ZeroMQ connections, and who may make one.

A folder of keys at the server (its own secret key, the public keys of the clients that it lets in), and the keys that
a client is given. Used by the router, the clients, and `phalanx curve-keygen`; it logs no key.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from gateway.errors import GatewayError

SERVER_NAME = "server"
AUTHORIZED = "authorized_clients"
CLIENTS = "clients"
SERVER_KEY_VARIABLE = "PHALANX_ZMQ_SERVER_KEY"
CLIENT_KEY_VARIABLE = "PHALANX_ZMQ_CLIENT_KEY"
_Z85_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_DOMAIN = b"phalanx"


class CurveError(GatewayError):
    """A key that is missing, malformed, or readable by others; says which file, and what to do."""


@dataclass(frozen=True)
class ClientKeys:
    """What a client needs: the server's public key and a pair of its own, as 40 characters of Z85 each."""

    server_key: bytes
    public_key: bytes
    secret_key: bytes

    @classmethod
    def read(cls, server_key: str | Path, client_key: str | Path) -> ClientKeys:
        """`server_key`: 40 characters, or the file with it; `client_key`: the client's secret file. Raises
        CurveError."""
        text = str(server_key).encode()
        public = text if _Z85_KEY.fullmatch(text) else _load(Path(server_key))[0]
        path = Path(client_key)
        own, secret = _load(path)
        if secret is None:
            raise CurveError(f"{path} has no secret key; give the client's file that ends in .key_secret")
        _check_private(path)
        return cls(public, own, secret)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ClientKeys | None:
        """Of PHALANX_ZMQ_SERVER_KEY and PHALANX_ZMQ_CLIENT_KEY; None if neither is set. Raises CurveError."""
        server, client = environment.get(SERVER_KEY_VARIABLE), environment.get(CLIENT_KEY_VARIABLE)
        if not server and not client:
            return None
        if not server or not client:
            missing = CLIENT_KEY_VARIABLE if server else SERVER_KEY_VARIABLE
            raise CurveError(f"{missing} is not set: a client needs the server's key and a key of its own")
        return cls.read(server, client)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Before the socket connects."""
        socket.curve_serverkey = self.server_key
        socket.curve_publickey = self.public_key
        socket.curve_secretkey = self.secret_key


class ServerKeys:
    """The keys of a server, and the list of clients that it lets in. Clients that are put into the folder, or taken
    out of it, are so from their next connection on."""

    def __init__(self, folder: Path) -> None:
        """Raises CurveError."""
        path = folder / f"{SERVER_NAME}.key_secret"
        self._public, secret = _load(path)
        if secret is None:
            raise CurveError(f"{path} has no secret key; make a new one with: phalanx curve-keygen {folder}")
        _check_private(path)
        self._secret = secret
        self._authorized = folder / AUTHORIZED
        if not self._authorized.is_dir():
            text = f"{self._authorized} is missing; it holds the public keys of the clients that may connect"
            raise CurveError(f"{text}: phalanx curve-keygen {folder} --client NAME")
        self._seen: tuple[object, ...] = ()
        self._keys: frozenset[bytes] = frozenset()

    def authenticate(
        self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]
    ) -> Authentication:
        """Before the socket is bound. The caller stops what is returned before it closes the context."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret
        socket.curve_publickey = self._public
        socket.zap_domain = _DOMAIN
        return Authentication(context, self)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a client may connect; called in the thread of the authentication."""
        return key in self._listed()

    def _listed(self) -> frozenset[bytes]:
        try:
            paths = sorted(self._authorized.glob("*.key"))
            seen = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
        except OSError:
            return self._keys
        if seen != self._seen:
            keys = set()
            for path in paths:
                try:
                    keys.add(_load(path)[0])
                except CurveError:
                    continue  # half written, or no key: it lets nobody in
            self._keys, self._seen = frozenset(keys), seen
        return self._keys


class Authentication:
    """The thread that answers for each new connection whether its key is on the list."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_DOMAIN.decode(), keys)

    def stop(self) -> None:
        self._authenticator.stop()


def make_keys(folder: Path, client: str | None) -> list[Path]:
    """Makes the server's pair if there is none, and one for a client, whose public half goes onto the list. Returns
    what was written. Raises CurveError."""
    written = []
    try:
        for part in (folder, folder / AUTHORIZED, folder / CLIENTS):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / f"{SERVER_NAME}.key_secret").exists():
            written += [_create(folder, SERVER_NAME, folder)]
        if client is not None:
            if not re.fullmatch(r"[\w.@-]{1,64}", client) or client.startswith("."):
                raise CurveError(f"--client {client}: a name has 1 to 64 letters, digits, and any of . _ - @")
            if (folder / CLIENTS / f"{client}.key_secret").exists():
                text = f"{folder / CLIENTS / client}.key_secret exists; remove it and its public key from"
                raise CurveError(f"{text} {folder / AUTHORIZED} first, or choose another name")
            written += [_create(folder / CLIENTS, client, folder / AUTHORIZED)]
    except OSError as error:
        raise CurveError(f"{error.filename or folder}: {error.strerror}; choose another folder") from None
    return written


def server_key(folder: Path) -> str:
    """The public key that clients are told. Raises CurveError."""
    return _load(folder / f"{SERVER_NAME}.key_secret")[0].decode()


def is_local(endpoint: str) -> bool:
    """Whether only this machine can reach an endpoint."""
    scheme, _, address = endpoint.partition("://")
    if scheme != "tcp":
        return scheme in ("ipc", "inproc")
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1", "lo") or bool(re.fullmatch(r"127(\.\d+){3}", host))


def _create(secret_folder: Path, name: str, public_folder: Path) -> Path:
    """A pair: the secret half for its owner's eyes from its first byte on."""
    before = os.umask(0o077)
    try:
        public, secret = zmq.auth.create_certificates(secret_folder, name)
    finally:
        os.umask(before)
    if public_folder != secret_folder:
        os.replace(public, public_folder / f"{name}.key")
    return Path(secret)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no key is in it"
        raise CurveError(f"{path}: {reason}; make keys with: phalanx curve-keygen DIR") from None
    for key in (public, secret):
        if key is not None and not _Z85_KEY.fullmatch(key):
            raise CurveError(
                f"{path}: its key is not 40 characters of Z85; make keys with: phalanx curve-keygen DIR"
            )
    return public, secret


def _check_private(path: Path) -> None:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    # As ssh has it: whom somebody else's file is for, as that of a Secret of Kubernetes, is their business.
    if mode & (0o077 if status.st_uid == os.geteuid() else 0o007):
        raise CurveError(f"{path} may be read by others (mode {mode:o}); correct it with: chmod 600 {path}")
