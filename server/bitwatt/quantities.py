"""Numbers as people write them: 4k tokens, 1GB."""

import re
from fractions import Fraction
from typing import Any

__all__ = ["read_bytes", "read_count", "written_bytes"]

_NUMBER = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)")
_POWERS = {letter: power for power, letter in enumerate("kmgt", start=1)}
_BINARY = {0: "", 10: "KiB", 20: "MiB", 30: "GiB"}


def read_count(value: Any) -> Any:
    """Return a text's count as an integer, and what is none of these as it is: 4k is 4000, 4K 4096.

    So are m, M, g and G: small letters are powers of 1000, capitals of 1024, as in vLLM.

    Raises  ValueError where it is no whole number
    """
    return _read(value, is_bytes=False)


def read_bytes(value: Any) -> Any:
    """Return a text's bytes as an integer, and what is none of these as it is.

    GB is 1000³ and GiB 1024³, kB, MB, TB and KiB, MiB, TiB alike; g and G are those of read_count.

    Raises  ValueError where it is no whole number
    """
    return _read(value, is_bytes=True)


def _read(value: Any, *, is_bytes: bool) -> Any:
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return value
    factor = _factor(match[2], is_bytes=is_bytes)
    if factor is None:
        examples = "1GB, 512MiB or 4096" if is_bytes else "4k, 4K or 4096"
        raise ValueError(f"{match[2]} is no unit here; write {examples}")
    number = Fraction(match[1]) * factor
    if number.denominator != 1:
        raise ValueError("is no whole number")
    return int(number)


def _factor(unit: str, *, is_bytes: bool) -> int | None:
    if unit == "" or (is_bytes and unit in ("B", "b")):
        return 1
    power = _POWERS.get(unit[0].lower())
    match unit[1:].lower():
        case "" if power is not None:
            return int((1024 if unit.isupper() else 1000) ** power)
        case "b" if power is not None and is_bytes:
            return int(1000**power)
        case "ib" if power is not None and is_bytes:
            return int(1024**power)
    return None


def written_bytes(number: int) -> str:
    """Return the bytes as read_bytes reads them, in the largest unit that they are whole in."""
    bits = max(bits for bits in _BINARY if number % (1 << bits) == 0) if number else 0
    return f"{number >> bits}{_BINARY[bits]}"
