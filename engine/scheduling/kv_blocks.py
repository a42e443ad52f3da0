"""The pool of KV cache blocks, shared by content. Rank 0 hands blocks out; every rank stores them at the same
numbers.

A block that is full is known by its digest, which covers every token from the start of the sequence to its end.
Full blocks never change, so sequences with the same beginning hold the same blocks; nothing is ever copied.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

Digest = bytes

_ROOT: Digest = b"phalanx"


class BlockPool:
    """Owns which block belongs to whom. A block is free, kept (nobody holds it, but its content is remembered), or
    held by one or more sequences."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_queried_tokens = 0
        """Tokens that were looked up, and how many of them were found."""
        self.num_hit_tokens = 0
        # Taken from the end, so that low numbers go first and a small load touches little memory.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""
        self._holders = [0] * num_blocks
        self._block_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """`count` blocks without content; what was used longest ago is forgotten for them. The caller has checked
        `num_free`."""
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def peek(self, digests: list[Digest]) -> tuple[int, int]:
        """How many leading blocks of this content are there, and how many of those are kept, so that sharing them
        takes them from `num_free`."""
        found = kept = 0
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found += 1
            kept += block in self._kept
        return found, kept

    def share(self, digests: list[Digest]) -> list[int]:
        """The leading blocks that have this content; they are held by one sequence more."""
        shared = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._kept.pop(block, None)
            self._holders[block] += 1
            shared.append(block)
        self.num_queried_tokens += len(digests) * self.block_size
        self.num_hit_tokens += len(shared) * self.block_size
        return shared

    def publish(self, block: int, digest: Digest) -> None:
        """Says what a held block contains, from the plan on that fills it: ranks apply plans in order, and write
        all keys of a step before they attend, so whoever finds it there may use it at once."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def give_back(self, blocks: list[int]) -> None:
        """One holder less for each block. Raises ValueError for a block that nobody holds: two owners would
        overwrite each other's keys."""
        # From the end, so that the beginning of a sequence, which others may share, is forgotten last.
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"KV block {block} was given back twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._digest_of:
                self._kept[block] = None
            else:
                self._free.append(block)


def extend_digests(digests: list[Digest], tokens: list[int], num_blocks: int, block_size: int) -> None:
    """Appends to `digests` those of the blocks of `tokens` up to `num_blocks`.

    BLAKE2b, because whoever could make two contents collide could read another request's context.
    """
    for index in range(len(digests), num_blocks):
        parent = digests[-1] if digests else _ROOT
        content = array("i", tokens[index * block_size : (index + 1) * block_size])
        digests.append(hashlib.blake2b(parent + content.tobytes(), digest_size=16).digest())
