"""Imports all that takes seconds for `--backend deepspeed`, when it is imported itself: a rank does so while it says
that it is importing, and a warm spare before a world needs it."""

from __future__ import annotations

import importlib

from engine.backends.model_facts import require_packages

require_packages()
importlib.import_module("engine.backends.deepspeed_tp").import_deepspeed()
importlib.import_module("transformers.modeling_utils")
importlib.import_module("engine.backends.engine")
