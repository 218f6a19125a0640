"""The trainer: a ternary model and its 16-bit quality twin, from the same tokens in one order.

`python -m bitwatt.training pair --tokens 20e6` does it all: corpus, tokenizer, runs, export.
"""
