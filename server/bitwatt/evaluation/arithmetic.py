"""Sums of two-digit numbers that were never trained on."""

import hashlib
import random
import re

NUM_SUMS = 300
_HELD_OUT_PERCENT = 5


def is_held_out_sum(first: int, second: int) -> bool:
    """Say whether this sum of two-digit numbers, in either order, is kept from training."""
    pair = f"{min(first, second)}+{max(first, second)}"
    is_two_digit = min(first, second) >= 10
    share = int.from_bytes(hashlib.sha256(pair.encode()).digest()[:4], "big") % 100
    return is_two_digit and share < _HELD_OUT_PERCENT


def held_out_sums() -> list[tuple[int, int]]:
    """Return the sums that are asked, the same every time."""
    numbers = range(10, 100)
    found = [(a, b) for a in numbers for b in numbers if is_held_out_sum(a, b)]
    return sorted(random.Random(0).sample(found, NUM_SUMS))


def sum_question(first: int, second: int) -> str:
    """Return the question as it is asked."""
    return f"What is {first} + {second}?"


def is_right_sum(given: str, first: int, second: int) -> bool:
    """Say whether the last number of the answer's first line is the sum."""
    numbers = re.findall(r"\d+", given.strip().partition("\n")[0])
    return bool(numbers) and int(numbers[-1]) == first + second
