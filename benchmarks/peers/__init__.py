"""Other engines, each in an environment of its own, given the same work as Phalanx in the same run."""
