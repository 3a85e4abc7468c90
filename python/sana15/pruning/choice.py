"""The outcome of every strategy of pruning, and what those share that learn on calibration batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .trajectory import CalibrationBatch


@dataclass(frozen=True)
class Choice:
    """The blocks that stay, in order, and what it took to choose them."""

    kept: list[int]
    by: str
    spent: dict[str, Any] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)  # of search: the others, in the order of their removal


def split(batches: Sequence[CalibrationBatch]) -> tuple[list[CalibrationBatch], list[CalibrationBatch]]:
    """Every third chunk of prompts, and the others; all for both where there are fewer than three chunks.

    Of the second only one batch of each chunk: healing needs their pictures, not their steps.
    """
    if not batches:
        raise ValueError("search and learned need at least one calibration batch")
    chunks = sorted({b.chunk for b in batches})
    apart = len(chunks) >= 3
    judged = [b for b in batches if not apart or chunks.index(b.chunk) % 3 == 2]
    healing: dict[int, CalibrationBatch] = {}
    for b in batches:
        if not apart or chunks.index(b.chunk) % 3 != 2:
            healing.setdefault(b.chunk, b)
    return judged, list(healing.values())
