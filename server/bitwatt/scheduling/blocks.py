"""KV-cache blocks: reference counts, a free list in order of last use, and the prefix cache.

A full block's content is known by (what precedes it, its own tokens). The prefix cache is a
dictionary on that pair, so a lookup compares the tokens themselves and cannot be fooled by two
contents with one hash. What precedes is the integer identity of the prefix that ends with the
block before; a request's salt stands for it before the first block.
"""

from collections import OrderedDict

__all__ = ["BlockAllocator", "OutOfBlocksError"]

_Content = tuple[int | str, tuple[int, ...]]


class OutOfBlocksError(Exception):
    """Every block is in use."""


class BlockAllocator:
    """Hands out the blocks 0 … num_blocks - 1. Holds no tensor.

    A free block keeps its cached content until it is handed out again, oldest first.
    free + used == total after every call; check_integrity says so.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._reference_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[_Content, tuple[int, int]] = {}  # content -> (block, prefix)
        self._contents: dict[int, _Content] = {}  # of cached blocks
        self._next_prefix = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content a new request can share, free or used."""
        return len(self._contents)

    def allocate(self) -> int:
        """Return a block nobody uses, its old content forgotten; raises OutOfBlocksError."""
        if not self._free:
            raise OutOfBlocksError
        block, _ = self._free.popitem(last=False)
        content = self._contents.pop(block, None)
        if content is not None:
            del self._cached[content]
        self._reference_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a user to a block that match returned."""
        if self._reference_counts[block] == 0:
            del self._free[block]
        self._reference_counts[block] += 1

    def is_free(self, block: int) -> bool:
        """Whether sharing the block would take it off the free list."""
        return self._reference_counts[block] == 0

    def free(self, blocks: list[int]) -> None:
        """Drop one user of each block; give them in a sequence's order, so that tails go first."""
        for block in reversed(blocks):
            count = self._reference_counts[block]
            assert count > 0, f"block {block} freed twice"
            self._reference_counts[block] = count - 1
            if count == 1:
                self._free[block] = None

    def match(self, tokens: list[int], salt: str) -> tuple[list[int], list[int]]:
        """Return the blocks and prefixes of the longest cached start of tokens.

        At least one token is left out, so that there is something to compute.
        """
        blocks: list[int] = []
        prefixes: list[int] = []
        if not self.prefix_caching:
            return blocks, prefixes
        before: int | str = salt
        size = self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            found = self._cached.get((before, tuple(tokens[start : start + size])))
            if found is None:
                break
            blocks.append(found[0])
            prefixes.append(found[1])
            before = found[1]
        return blocks, prefixes

    def forget(self, tokens: list[int], salt: str) -> None:
        """Let nobody share the cached start of tokens any more; blocks in use stay in use."""
        before: int | str = salt
        size = self.block_size
        for start in range(0, len(tokens) // size * size, size):
            found = self._cached.pop((before, tuple(tokens[start : start + size])), None)
            if found is None:
                return
            block, before = found
            del self._contents[block]

    def register(self, block: int, before: int | str, tokens: tuple[int, ...]) -> int:
        """Offer a full block for sharing; return the identity of the prefix it ends.

        before  the prefix that ends with the block before, or the salt of a first block
        """
        content = (before, tokens)
        found = self._cached.get(content)
        if found is not None:
            return found[1]
        prefix = self._next_prefix
        self._next_prefix += 1
        self._cached[content] = (block, prefix)
        self._contents[block] = content
        return prefix

    def forget_all(self) -> None:
        """Empty the prefix cache; blocks in use stay in use."""
        self._cached.clear()
        self._contents.clear()

    def check_integrity(self, users: list[list[int]]) -> None:
        """Raise AssertionError unless the counts match the users' blocks and every map agrees."""
        counts = [0] * self.num_blocks
        for blocks in users:
            for block in blocks:
                counts[block] += 1
        assert counts == self._reference_counts, "a block's users and its count disagree"
        free = {block for block, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "the free list and the counts disagree"
        assert len(self._cached) == len(self._contents), "the cache's two maps disagree"
        for content, (block, _) in self._cached.items():
            assert self._contents.get(block) == content, "the cache's two maps disagree"
