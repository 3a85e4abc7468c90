"""Checks on values from a command line or a file."""

from __future__ import annotations

import numbers
import re


def is_finite(value: object) -> bool:
    """A real number of ordinary size; neither infinite nor NaN, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30  # also an integer too long for a float


def is_interval(value: object) -> bool:
    """Two numbers, 0 <= low <= high <= 1."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(is_finite(v) for v in value):
        return False
    return 0 <= value[0] <= value[1] <= 1


def is_whole(number: object) -> bool:
    """An integer, Python's or numpy's."""
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def parse_bytes(text: str) -> int:
    """The bytes of "5GB", "500MB", "100kB" or a plain number; ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    size = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0
    if size < 1:
        raise ValueError(f"a size must be written as 5GB or 500MB, got {text!r}")
    return int(size)
