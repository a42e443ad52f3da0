"""Which MPI it is. Imported by everything here that tells them apart; it imports nothing of the project."""

from __future__ import annotations

from enum import Enum


class Flavor(Enum):
    """Which MPI an `mpirun` belongs to."""

    OPEN_MPI = "Open MPI"
    MPICH = "MPICH"
    INTEL = "Intel MPI"
