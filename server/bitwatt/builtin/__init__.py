"""The embedded pair: a small ternary model and the 16-bit model trained on the same tokens.

Both folders are in Hugging Face format, with a README.md that says how they were made.
"""

from pathlib import Path

__all__ = ["FP16", "TERNARY"]

TERNARY = Path(__file__).parent / "ternary"
"""Folder of the ternary model, packed to 2 bits a weight."""

FP16 = Path(__file__).parent / "fp16"
"""Folder of its quality twin, a LLaMA-style model in bfloat16.

A wheel lacks it: it is three quarters of what the package would weigh. Its place is then taken by
the ternary model's own weights in 16 bits.
"""
