"""Ids of calls: they name the front that has the call, and grow with time.

Made for every call that goes into a journal. Rows with ids that grow stand side by side in its file: a commit then
touches a few pages, where with ids of pure chance it would touch some for each call.
"""

from __future__ import annotations

import os
import time


def new_call_id(front: int = 0) -> str:
    """32 hex digits: two name the front, eleven are the time in milliseconds, nineteen (76 bits) are random."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{front:02x}{milliseconds:011x}{os.urandom(10).hex()[:19]}"
