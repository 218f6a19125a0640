"""How Hugging Face's BitNet checkpoints pack ternary weights: four rows a byte.

Byte [i, j] holds, at bits 2k and 2k + 1, the value of row k · out_features / 4 + i, plus one.
Code 3 stands for nothing.
"""

import torch
from torch import Tensor

__all__ = ["pack_bitnet", "unpack_bitnet"]


def pack_bitnet(values: Tensor) -> Tensor:
    """Return ternary values as uint8 [out_features / 4, in_features].

    values  [out_features, in_features] in {-1, 0, 1}, of any dtype
    Raises  ValueError if out_features isn't a multiple of 4
    """
    if values.shape[0] % 4:
        raise ValueError(f"{values.shape[0]} rows don't fill bytes of four codes each")
    first, second, third, fourth = (values + 1).to(torch.uint8).chunk(4)
    return (first | second << 2 | third << 4 | fourth << 6).contiguous()


def unpack_bitnet(packed: Tensor) -> Tensor:
    """Return the values of packed uint8 [out_features / 4, in_features] as int8.

    Raises  ValueError if there is a code of 3
    """
    codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    if codes.numel() and int(codes.max()) == 3:
        raise ValueError("has a code of 3, which stands for no ternary value")
    return codes.to(torch.int8) - 1
