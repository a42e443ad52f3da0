"""Whether another rank of this host is behind one that is silent: then that one holds the step up, and its own guard
judges it. Used by the guard when its rank has been silent for too long; it reads the pages that other guards made.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from launcher.watch import Phase, Progress, ProgressPage

EXCUSED_TIMES = 3.0
"""A silence of so many times the limit is not excused any more: ranks of another stage count their collectives
differently, and a rank that hangs must be found by somebody."""


class Laggards:
    """The other ranks of the world on this host."""

    def __init__(self, folder: Path, rank: int) -> None:
        """`folder`: where guards make the pages of their ranks."""
        self._folder = folder
        self._own = f"rank-{rank}.progress"

    def behind(self, progress: Progress) -> str | None:
        """A rank that is in an earlier step, or has begun fewer collectives of the same one; None if there is
        none."""
        for path in sorted(self._folder.glob("rank-*.progress")):
            if path.name != self._own and (other := _read(path)) is not None:
                is_earlier = (other.step, other.collective) < (progress.step, progress.collective)
                if other.phase is Phase.STEPPING and is_earlier:
                    return path.stem
        return None


def _read(path: Path) -> Progress | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # its guard has ended
        return None
    try:
        page = ProgressPage(mmap.mmap(descriptor, mmap.PAGESIZE, prot=mmap.PROT_READ))
    except (OSError, ValueError):  # it is being made
        return None
    finally:
        os.close(descriptor)
    try:
        return page.read()
    except ValueError:  # no phase: it is being made
        return None
    finally:
        page.close()
