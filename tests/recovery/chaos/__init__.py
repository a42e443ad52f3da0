"""Chaos: faults drawn from a seed, put into a real deployment under the load of real clients, and a checker that
reads what the clients saw. `python -m tests.recovery.chaos --help`; see docs/recovery.md."""
