"""What memory gives to so many cores that read at once. Called by benchmarks that say how near to it they come.

The reading is the C library's search for a byte that is not there: it does nothing but load, in the widest registers.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

MEBIBYTES_A_CORE = 256
"""Far beyond every cache."""
PASSES = 5


def bytes_per_second(cores: list[int]) -> float:
    """That one thread on each of the cores reads together: the median of some passes over memory of its own."""
    library = ctypes.CDLL(None)
    library.memchr.restype, library.memchr.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t],
    )
    size = MEBIBYTES_A_CORE * 2**20
    gate = threading.Barrier(len(cores) + 1)

    def read(core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread alone
        memory = ctypes.create_string_buffer(size)
        ctypes.memset(memory, 1, size)
        for _ in range(PASSES):
            gate.wait()
            assert library.memchr(memory, 0, size) is None
            gate.wait()

    threads = [threading.Thread(target=read, args=(core,), daemon=True) for core in cores]
    for thread in threads:
        thread.start()
    took = []
    for _ in range(PASSES):
        gate.wait()
        begin = time.perf_counter()
        gate.wait()
        took.append(time.perf_counter() - begin)
    for thread in threads:
        thread.join()
    return len(cores) * size / sorted(took)[PASSES // 2]
