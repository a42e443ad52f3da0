"""What keeps every world from starting and may go by itself: full disks, a machine without memory or processes left.
Asked by the supervisor before it counts a start as failed; it reads what the kernel shows, and decides nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from launcher.diagnosis import LEAST_SHM_BYTES, SHM

LEAST_RUN_DIR_BYTES = 256 * 1024
"""Logs, sockets and files of one world take less."""
_MAY_PASS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
)


def may_pass(error: OSError) -> bool:
    """Whether what could not be done now may be possible in a while."""
    return error.errno in _MAY_PASS


def full_disk(run_dir: Path) -> str | None:
    """Which disk is full that every world needs, for a person; None if none is."""
    for folder, least in ((run_dir, LEAST_RUN_DIR_BYTES), (SHM, LEAST_SHM_BYTES)):
        try:
            numbers = os.statvfs(folder)
        except OSError:
            continue
        free = numbers.f_bavail * numbers.f_frsize
        if free < least:
            return f"the disk of {folder} is full ({free // 1024} KiB free); make room there"
    return None
