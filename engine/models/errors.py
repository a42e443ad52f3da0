"""The errors of the model side: what is wrong with a model, named so that a person can put it right.

Raised by everything in `engine/models`; callers show the text as it is, in one line, and never parse it.
"""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be found, read, imported or loaded.

    The text names the file (and the key or tensor in it), what is wrong, and what to do about it.
    """


class ShardingError(ModelError):
    """A world shape that the model cannot be cut into. The text names --tp or --pp and what is allowed."""
