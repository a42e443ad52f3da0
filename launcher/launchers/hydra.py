"""What is particular about the process manager of MPICH and Intel MPI: its command line and variables over several
hosts. Called by `mpirun` alone; it starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

MPICH_VARIABLES = ("MPIR_", "MPICH_", "UCX_", "FI_")
INTEL_VARIABLES = ("I_MPI_", "FI_", "UCX_")
"""Beginnings of the variables that ranks on other hosts need as well: Hydra is told what to pass on, else it would
pass everything, the folder for temporary files of this host included."""


def mpich_placing(
    host_file: Path, names: Sequence[str], variables: Mapping[str, str], interface: str
) -> list[str]:
    """`names` of the variables that all ranks get: their values travel on Hydra's connections. What is to launch may
    be said by the variables that Hydra knows."""
    words = ["-f", str(host_file)]
    if not variables.get("HYDRA_LAUNCHER"):
        words += ["-launcher", "ssh"]
    if interface:
        words += ["-iface", interface]
    return [*words, "-bind-to", "none", *_pass_on(names)]


def intel_placing(
    host_file: Path, names: Sequence[str], variables: Mapping[str, str], interface: str
) -> list[str]:
    """As for MPICH. The numbers of slots are read from a machine file only: with `-f` they would be ignored."""
    words = ["-machinefile", str(host_file)]
    if not (variables.get("I_MPI_HYDRA_BOOTSTRAP") or variables.get("HYDRA_LAUNCHER")):
        words += ["-launcher", "ssh"]
    if interface:
        words += ["-iface", interface]
    return [*words, *_pass_on(names)]


def _pass_on(names: Sequence[str]) -> list[str]:
    return ["-genvlist", ",".join(names)] if names else ["-genvnone"]
