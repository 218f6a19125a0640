"""The trainer: a ternary model and its 16-bit quality twin, from the same tokens in the same order.

`python -m bitwatt.training pair --tokens 40M` does everything: corpus, tokenizer, both runs, export.
"""
