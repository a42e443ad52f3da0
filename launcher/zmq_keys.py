"""Who may reach the ZeroMQ server: the check of `phalanx serve`, and `phalanx curve-keygen`.

Called by settings.py and cli.py before anything is started. The keys themselves are gateway/curve.py's.
"""

from __future__ import annotations

from pathlib import Path

from launcher.errors import LauncherError, SettingsError


def check_zmq(endpoint: str, curve_dir: Path | None, insecure: bool) -> None:
    """Refuses an endpoint that other machines can reach without keys, and keys that are of no use. Raises
    SettingsError."""
    from gateway.curve import CurveError, ServerKeys, is_local

    if curve_dir is not None:
        if insecure:
            raise SettingsError("--zmq-insecure means without keys: leave it out, or --zmq-curve-dir")
        try:
            ServerKeys(curve_dir)
        except CurveError as error:
            raise SettingsError(f"--zmq-curve-dir: {error}") from None
    elif not insecure and not is_local(endpoint):
        raise SettingsError(
            f"--zmq {endpoint} can be reached from other machines, and anybody there could use this server: give "
            "--zmq-curve-dir DIR (`phalanx curve-keygen DIR --client NAME` makes the keys), listen at "
            "tcp://127.0.0.1:5555, or say --zmq-insecure"
        )


def keygen(folder: Path, client: str | None) -> int:
    """Makes the keys and says what goes where. Raises LauncherError."""
    from gateway.curve import (
        AUTHORIZED,
        CLIENT_KEY_VARIABLE,
        SERVER_KEY_VARIABLE,
        CurveError,
        make_keys,
        server_key,
    )

    try:
        written = make_keys(folder, client)
        public = server_key(folder)
    except CurveError as error:
        raise LauncherError(str(error)) from None
    for path in written:
        print(f"wrote {path}")
    print(f"server  phalanx serve MODEL --zmq tcp://0.0.0.0:5555 --zmq-curve-dir {folder}")
    if client is not None:
        print(f"client  export {SERVER_KEY_VARIABLE}='{public}' {CLIENT_KEY_VARIABLE}={written[-1]}")
        print(
            f"The file of the client is its secret. Remove {folder / AUTHORIZED / client}.key to shut it out."
        )
    return 0
