"""The real supervisor, guards and mpirun around ranks and a front that do nothing but live: for what has to
be tried dozens of times. What they do at the wrong moment is told by SMALL_WORLD in the environment."""
