"""What the ranks of a world say to each other: the only package that names MPI or NCCL.

`base` has the interfaces that the rest of the engine is written against, `mpi` implements them for CPU
worlds, `nccl` the tensor traffic of CUDA worlds (their plans still travel over MPI).
"""

import mpi4py

# join_world initializes: a spare imports everything long before it joins. The end of the process finalizes.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = True
