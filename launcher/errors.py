"""The launcher's errors. Each message is one line for the user that names the next step; `cli` prints it and
ends with the error's exit code."""

from __future__ import annotations


class LauncherError(Exception):
    """Something that the user has to mend."""

    exit_code = 1


class SettingsError(LauncherError):
    """A flag or a line of the config file that is not allowed."""

    exit_code = 2
