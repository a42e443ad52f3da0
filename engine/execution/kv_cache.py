"""The keys and values of every running sequence, in blocks, for the layers of one stage."""

from __future__ import annotations

from pathlib import Path

import torch

BLOCK_SIZE = 16
"""Tokens of a block."""

DEFAULT_MEMORY_SHARE = 0.4
"""Share of the free memory of the host (of the GPU: 0.9) that the KV caches of its ranks take together."""


class KVCache:
    """`keys[layer]` and `values[layer]`: `[num_slots, num_kv_heads, head_dim]`, slot = block * BLOCK_SIZE + offset.

    The memory is reserved, not touched: pages come into being as blocks are first written.
    """

    def __init__(
        self,
        layers: range,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks * BLOCK_SIZE, num_kv_heads, head_dim)
        self.keys = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        self.values = {layer: torch.empty(shape, dtype=dtype, device=device) for layer in layers}
        # Masked padding is multiplied by zero, and zero times NaN is NaN: slot 0 is read as padding.
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[0] = 0


def block_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank."""
    return 2 * num_layers * BLOCK_SIZE * num_kv_heads * head_dim * dtype.itemsize


def free_memory_bytes(device: torch.device) -> int:
    """What this process may still take: the GPU's free memory, or the host's within the cgroup's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo("MemAvailable")
    headroom = _cgroup_headroom()
    return available if headroom is None else min(available, headroom)


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {key}")


def _cgroup_headroom() -> int | None:
    """Bytes below the memory limit of this process's cgroup or any above it (v2, then v1); None: no limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            # v1 says "no limit" with a number near 2**63.
            if limit is not None and usage is not None and limit < 2**60:
                found.append(max(0, limit - usage))
            if folder == root:
                break
            folder = folder.parent
    return min(found, default=None)


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
