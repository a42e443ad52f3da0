"""Native kernels for CPU worlds: what a rank computes between two reductions of a layer, in one call.

`compile` builds them (called by setup.py), `library` loads them, `bindings` calls them, `stage` runs a pipeline stage
with them. Torch is the fallback and the reference of their tests. Every kernel is row-invariant: the bits of a row
depend on the row alone, never on the rows beside it or on how a prompt was cut.
"""
