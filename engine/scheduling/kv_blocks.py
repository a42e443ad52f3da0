"""The pool of KV cache blocks. Rank 0 hands blocks out; every rank stores them at the same numbers."""

from __future__ import annotations


class BlockPool:
    """Owns which block belongs to whom: a block is either free or held once."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Taken from the end, so that low numbers go first and a small load touches little memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks. The caller has checked `num_free`."""
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._held[block] = 1
        return taken

    def give_back(self, blocks: list[int]) -> None:
        """Raises ValueError for a block that is not held: two owners would overwrite each other's keys."""
        for block in reversed(blocks):
            if not self._held[block]:
                raise ValueError(f"KV block {block} was given back twice")
            self._held[block] = 0
            self._free.append(block)
