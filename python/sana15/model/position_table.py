"""The position table of the authors' files: written from a configuration, and read back by what it holds.

Their files always have one, `pos_embed` [1, side * side, C]. Where the model adds no positions it is all zeros; where it does,
it holds the 2-D sines and cosines of the side that the model was made for. Its size alone says nothing about that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch

from .config import SanaConfig
from .transformer import position_embedding


def position_table(config: SanaConfig, dtype: torch.dtype) -> torch.Tensor:
    """[1, side * side, C]: what the authors' files hold for this model."""
    side = config.sample_size // config.patch_size
    if config.interpolation_scale is None:
        return torch.zeros(1, side * side, config.width, dtype=dtype)
    cpu = torch.device("cpu")
    return position_embedding(side, side, config.width, side, config.interpolation_scale, cpu)[None].to(dtype)


def interpolation_of(table: torch.Tensor, side: int, base: int) -> float | None:
    """The interpolation scale with which a model of base side `base` computes this table.

    Args:
        table: [1, side * side, C] of a file, also one that was rounded to 16 bits on its way there.
        side: tokens along one side of the table.
        base: sample_size // patch_size of the model's configuration.

    Returns:
        The scale; None for a table of zeros, as of a model that adds no positions.

    Raises:
        ValueError: no scale explains the table.
    """
    C = table.shape[-1]
    rows = table.reshape(side, side, C)
    if not rows.any():
        return None
    if C % 4 or side < 2 or not rows.isfinite().all():
        raise ValueError("the table is neither all zeros nor 2-D sines and cosines of more than one position")
    found = _scale(rows[0, :, : C // 2].double(), base)
    rounding = torch.finfo(_precision(rows)).eps
    for candidate in _candidates(found) if 0 < found < math.inf else ():
        if candidate > 0 and _explains(rows, base, candidate, rounding):
            return candidate
    raise ValueError("no interpolation scale gives these sines and cosines")


def _candidates(found: float) -> Iterator[float]:
    """Numbers near `found` that somebody may have written, the plainest first: the table was rounded, the setting was not."""
    yield from (float(Fraction(found).limit_denominator(d)) for d in range(1, 13))
    yield from (round(found, digits) for digits in (2, 3))
    yield from (float(Fraction(found).limit_denominator(d)) for d in range(13, 65))
    yield from (round(found, digits) for digits in (4, 5, 6))
    yield found


def _scale(columns: torch.Tensor, base: int) -> float:
    """The scale behind the sines and cosines [side, C / 2] of the positions 0, 1, ... times base / side / scale.

    The angle of the slowest wave at the first position is known without turns; every faster wave and farther position then
    tells the spacing more precisely, its whole turns being known from what was known before.
    """
    side, half = columns.shape
    quarter = half // 2
    frequencies = [10000.0 ** (-k / quarter) for k in range(quarter)]
    angles = torch.atan2(columns[:, :quarter], columns[:, quarter:])
    spacing = float(angles[1, -1]) / frequencies[-1]
    for position, wave in [(1, k) for k in reversed(range(quarter))] + [(j, 0) for j in range(2, side)]:
        angle, factor = float(angles[position, wave]), position * frequencies[wave]
        turns = round((spacing * factor - angle) / math.tau)
        spacing = (angle + math.tau * turns) / factor
    return base / (side * spacing) if spacing > 0 else 0.0


def _explains(rows: torch.Tensor, base: int, scale: float, rounding: float) -> bool:
    """Tells whether [side, side, C] is this table but for its rounding, and for that of positions computed in fp32."""
    side, _, C = rows.shape
    cpu = torch.device("cpu")
    axis = position_embedding(1, side, C, base, scale, cpu)[:, : C // 2]  # of columns; rows have the same
    tolerance = rounding + 2**-22 * base / scale
    for index, row in enumerate(rows):
        expected = torch.cat([axis, axis[index].expand(side, -1)], -1)
        if (row.to(expected.dtype) - expected).abs().max() > tolerance:
            return False
    return True


def _precision(rows: torch.Tensor) -> torch.dtype:
    """The narrowest precision that holds all the numbers: a file of 16 bits may have been stored with 32 again."""
    narrow = (torch.bfloat16, torch.float16)
    return next((d for d in narrow if torch.equal(rows.to(d).to(rows.dtype), rows)), torch.float32)
