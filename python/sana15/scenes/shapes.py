"""The silhouettes of the shapes, and their exact pixel coverage at any place and size.

A silhouette is a function of x (to the right) and y (down) on [-1, 1] x [-1, 1]. It is sampled once, 512 x 512 points,
and summed in both directions; the coverage of a pixel is then four look-ups in the summed table, as good as 20 x 20
samples per pixel, and any number of objects is drawn at once.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from .vocabulary import IMAGE_SIZE, SHAPES

_RESOLUTION = 512


def _polygon(x: NDArray, y: NDArray, corners: list[tuple[float, float]]) -> NDArray:
    """True inside the polygon (even-odd rule)."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def _star_corners() -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.40)
    # Centred vertically: five points reach 1 above the middle and cos(36 degrees) below it.
    shift = (1 - np.cos(np.pi / 5)) / 2
    return [(float(r * np.cos(a)), float(r * np.sin(a) + shift)) for r, a in zip(radii, angles)]


def silhouette(shape: str, x: NDArray, y: NDArray) -> NDArray:
    """True where the unit silhouette of `shape` is."""
    r2 = x * x + y * y
    if shape == "circle":
        return r2 <= 0.95**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return _polygon(x, y, [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)])
    if shape == "diamond":
        return abs(x) / 0.66 + abs(y) <= 1
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "star":
        return _polygon(x, y, _star_corners())
    if shape == "ring":
        return (r2 <= 1) & (r2 >= 0.58**2)
    if shape == "heart":
        lobes = (abs(x) - 0.49) ** 2 + (y + 0.42) ** 2 <= 0.51**2
        # The tangents from the lobes meet in the tip.
        tip = _polygon(x, y, [(-0.925, -0.145), (0.0, -0.62), (0.925, -0.145), (0.0, 0.95)])
        return lobes | tip
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


@cache
def _tables() -> NDArray:
    """Summed silhouettes, [shapes, resolution + 1, resolution + 1], row = y."""
    centres = (np.arange(_RESOLUTION) + 0.5) * (2 / _RESOLUTION) - 1
    tables = np.zeros((len(SHAPES), _RESOLUTION + 1, _RESOLUTION + 1), dtype=np.float32)
    for index, shape in enumerate(SHAPES):
        mask = silhouette(shape, centres[None, :], centres[:, None])
        tables[index, 1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    return tables


def coverage(shape: NDArray, cx: NDArray, cy: NDArray, diameter: NDArray, size: int = IMAGE_SIZE) -> NDArray:
    """Computes how much of each pixel each object covers.

    Args:
        shape: [M] integers, indices into SHAPES.
        cx, cy: [M] the centre in pixels; pixel 0 reaches from 0 to 1.
        diameter: [M] in pixels.
        size: the side of the canvas in pixels.
    Returns:
        [M, size, size] float32 in 0..1.
    """
    edges = np.arange(size + 1, dtype=np.float64)
    scale = _RESOLUTION / np.asarray(diameter, dtype=np.float64)[:, None]
    columns = np.rint((edges - np.asarray(cx)[:, None]) * scale).astype(np.int32) + _RESOLUTION // 2  # [M, size + 1]
    rows = np.rint((edges - np.asarray(cy)[:, None]) * scale).astype(np.int32) + _RESOLUTION // 2
    # Cells per pixel before clipping: what lies outside the table is empty but counts.
    per_column, per_row = np.diff(columns).astype(np.float32), np.diff(rows).astype(np.float32)
    columns, rows = columns.clip(0, _RESOLUTION), rows.clip(0, _RESOLUTION)
    side = _RESOLUTION + 1
    flat = (np.asarray(shape, dtype=np.int32)[:, None] * side + rows)[:, :, None] * side + columns[:, None, :]
    sums = _tables().ravel().take(flat)  # [M, size + 1, size + 1]
    covered = np.diff(sums, axis=1)
    covered = covered[:, :, 1:] - covered[:, :, :-1]
    covered /= per_row[:, :, None] * per_column[:, None, :]
    return covered
