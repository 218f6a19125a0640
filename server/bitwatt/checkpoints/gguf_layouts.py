"""How the tensors of a GGUF file lie in bytes, by the number of their type. No torch.

Source  github.com/ggml-org/ggml, include/ggml.h and src/ggml-common.h; PQ2_0 and PTQ1_0 are of
        PrismML's fork, I2_S of Microsoft's
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["LAYOUTS", "OTHER_TYPES", "Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor's rows lie in bytes: whole blocks, and what follows the last row.

    weights  of a block, neighbours in a row
    """

    name: str
    weights: int
    block_bytes: int
    tail_bytes: int = 0

    def __str__(self) -> str:
        return self.name

    def num_bytes(self, shape: Sequence[int]) -> int | None:
        """Return the bytes of such a tensor; None if its rows are no whole blocks."""
        if shape[-1] % self.weights:
            return None
        return prod(shape) // self.weights * self.block_bytes + self.tail_bytes


LAYOUTS: Mapping[int, tuple[Layout, ...]] = {
    0: (Layout("F32", 1, 4),),
    1: (Layout("F16", 1, 2),),
    2: (Layout("Q4_0", 32, 18),),
    3: (Layout("Q4_1", 32, 20),),
    6: (Layout("Q5_0", 32, 22),),
    7: (Layout("Q5_1", 32, 24),),
    8: (Layout("Q8_0", 32, 34),),
    12: (Layout("Q4_K", 256, 144),),
    13: (Layout("Q5_K", 256, 176),),
    14: (Layout("Q6_K", 256, 210),),
    30: (Layout("BF16", 1, 2),),
    34: (Layout("TQ1_0", 256, 54),),
    35: (Layout("TQ2_0", 256, 66),),
    36: (Layout("I2_S", 4, 1, tail_bytes=32),),
    41: (Layout("Q1_0", 128, 18),),
    # One id, two layouts: which of them a file means is told by the room that its tensors take.
    42: (Layout("Q2_0", 64, 18), Layout("PQ2_0", 128, 34)),
    142: (Layout("PQ2_0", 128, 34),),
    143: (Layout("PTQ1_0", 128, 28),),
}

# Types that are not read, for the sentence that says so.
OTHER_TYPES: Mapping[int, str] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    38: "TL1",
    39: "MXFP4 or TL2",
    40: "NVFP4",
}
