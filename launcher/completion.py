"""`phalanx completion SHELL`: a script that completes the command line in bash, zsh or fish. Made from the
parser itself, so that it knows every flag."""

from __future__ import annotations

import argparse

from launcher.completion_fish import fish_script


def completion(parser: argparse.ArgumentParser, shell: str) -> int:
    """Prints the script."""
    if shell == "fish":
        print(fish_script(parser))
        return 0
    import shtab

    print(shtab.complete(parser, shell))
    return 0
