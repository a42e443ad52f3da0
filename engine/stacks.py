"""Lets the guard of a rank see where its Python threads are, even if the rank hangs in native code.

Called by `engine.rank` as the rank starts. The guard names a signal and a file in PHALANX_STACK_DUMP, and takes the
file's existence as the word that the signal may be sent.
"""

from __future__ import annotations

import faulthandler
import os

VARIABLE = "PHALANX_STACK_DUMP"


def dump_stacks_on_signal() -> None:
    """From now on the signal writes the stacks of all threads to the file, without the help of the interpreter's
    lock. Does nothing without a guard. Raises OSError if the file cannot be made."""
    given = os.environ.pop(VARIABLE, None)
    if given is None:
        return
    number, path = given.split(" ", 1)
    # Registered before the file has its name: a guard that sees it may send.
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    faulthandler.register(int(number), file=descriptor, all_threads=True, chain=False)
    os.rename(f"{path}.new", path)
