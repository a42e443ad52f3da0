"""Rank 0 decides here which tokens the next step computes. Nothing in it computes or talks to anybody."""
