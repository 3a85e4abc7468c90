"""Picture -> objects: background, connected components, colours, shapes, from the pixels alone.

1. Background: a plane of light per channel, fitted to the pixels that look like it, starting at the border's median.
2. Foreground: a pixel that is nearer to one of the ten colours than to its background. Connected pixels (4 neighbours)
   are one component; below MIN_AREA pixels it is a speck and is ignored.
3. Colour: the palette colour nearest to the component's mean, weighted towards its core.
4. Shape: how far each pixel has gone from the background to that colour is a soft mask. Cut out, centred and scaled by
   its own moments, it is compared with every shape's template (drawn at several sizes, places and blurs) by the Dice
   overlap 2 sum(a t) / (sum a^2 + sum t^2). The best one names the shape.
5. A component is malformed, with the reason, when its overlap is below MIN_OVERLAP, its colour is farther than
   MAX_COLOR_DISTANCE from the palette, a second colour holds more than MAX_SECOND_COLOR of its core, or it is wider or
   higher than the window.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .shapes import coverage
from .vocabulary import COLOR_NAMES, COLORS, IMAGE_SIZE, SHAPES

MIN_AREA = 14
MIN_OVERLAP = 0.94
MAX_COLOR_DISTANCE = 0.33
MAX_SECOND_COLOR = 0.35
MAX_TINT = 0.15
GREYS = (0.25, 0.75)

_WINDOW = 40  # pixels; the largest object that is looked at
_PATCH = 20  # the side of the normalised mask
_REACH = 2.1  # the patch's half side, in radii of gyration
_RIM = 2  # pixels around a component that still belong to its soft edge

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_TEMPLATE_DIAMETERS = (14.0, 15.0, 19.0, 25.0)
_TEMPLATE_PLACES = ((0.0, 0.0), (0.5, 0.25), (0.25, 0.5), (0.5, 0.5))
_TEMPLATE_BLURS = (0.0, 0.7, 1.1)


@dataclass(frozen=True)
class Detected:
    """One object, as the pixels show it.

    Attributes:
        shape, color: the best names.
        box: x1, y1, x2, y2 in pixels.
        score: the template overlap, 0..1.
        problem: why it is malformed; None: it is well formed.
    """

    shape: str
    color: str
    box: tuple[float, float, float, float]
    score: float
    problem: str | None = None


@dataclass(frozen=True)
class Picture:
    """The content of one image: its objects from left to right, and the mean colour of its background, rgb in 0..1."""

    objects: tuple[Detected, ...]
    background: tuple[float, float, float]

    @property
    def neutral(self) -> bool:
        """Tells whether the background is a medium grey: little colour, and far from black and white."""
        return max(self.background) - min(self.background) <= MAX_TINT and all(
            GREYS[0] <= channel <= GREYS[1] for channel in self.background
        )


def detect_batch(pictures: NDArray[np.uint8]) -> list[Picture]:
    """Detects what each image shows.

    Args:
        pictures: [B, 64, 64, 3] uint8 RGB.
    """
    expected = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != expected:
        got = f"{pictures.dtype} {list(pictures.shape)}"
        raise ValueError(f"pictures must be uint8 [B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {got}")
    found: list[Picture] = []
    for start in range(0, len(pictures), 32):
        found += _detect_chunk(pictures[start : start + 32] / np.float32(255))
    return found


def _detect_chunk(images: NDArray) -> list[Picture]:
    pixels = images.reshape(len(images), -1, 3)
    background = _background(images)  # [B, pixels, 3]
    to_background = _square(pixels - background)
    # The squared distance to each colour, less the pixel's own square; colours first, for speed.
    to_palette = _square(_PALETTE)[:, None] - 2 * (_PALETTE @ pixels.reshape(-1, 3).T)  # [colours, B * pixels]
    foreground = to_palette.min(0).reshape(to_background.shape) + _square(pixels) < to_background
    labels, boxes = _components(foreground.reshape(images.shape[:3]))
    found: list[list[Detected]] = [[] for _ in images]
    colors, distance, second = _colors(labels, len(boxes), pixels, to_background, to_palette)
    windows = _soft_masks(labels, boxes, images, background.reshape(images.shape), _PALETTE[colors])
    overlap = _normalised(windows) @ _templates().reshape(-1, _PATCH**2).T  # [M, shapes * variants]
    overlap = overlap.reshape(len(boxes), *_templates().shape[:2]).max(-1)
    for m, (picture, y, x) in enumerate(boxes):
        shape, score = int(overlap[m].argmax()), float(overlap[m].max())
        problem = None
        if max(y.stop - y.start, x.stop - x.start) > _WINDOW - 2 * _RIM:
            problem = "too large"
        elif distance[m] > MAX_COLOR_DISTANCE:
            problem = "no colour of the palette"
        elif second[m] > MAX_SECOND_COLOR:
            problem = "two colours"
        elif score < MIN_OVERLAP:
            problem = "no known shape"
        box = (float(x.start), float(y.start), float(x.stop), float(y.stop))
        found[picture].append(Detected(SHAPES[shape], COLOR_NAMES[colors[m]], box, round(score, 4), problem))
    return [
        Picture(tuple(sorted(objects, key=lambda o: o.box)), (float(r), float(g), float(b)))
        for objects, (r, g, b) in zip(found, background.mean(1))
    ]


def _square(x: NDArray) -> NDArray:
    """The squared length along the last axis; np.sum is slow on an axis of three."""
    return np.einsum("...c,...c->...", x, x)


@cache
def _plane() -> NDArray[np.float64]:
    ramp = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    x, y = np.broadcast_arrays(ramp[None, :], ramp[:, None])
    return np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3)  # [pixels, 3]


def _background(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The background's colour behind every pixel, [B, pixels, 3]."""
    rim = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    rim[2:-2, 2:-2] = False
    estimate = np.median(images[:, rim], axis=1)[:, None].astype(np.float32)  # [B, 1, 3]
    every = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    every[::2, ::2] = True
    basis, samples = _plane()[every.ravel()], images[:, every].astype(np.float64)
    near = estimate.astype(np.float64)
    for limit in (0.20, 0.12):
        weighted = basis * (_square(samples - near) < limit**2)[..., None]  # [B, samples, 3]
        # The small ridge keeps the system solvable where (almost) nothing looks like background.
        left = weighted.transpose(0, 2, 1) @ basis + 1e-3 * np.eye(3)
        right = weighted.transpose(0, 2, 1) @ (samples - estimate)
        plane = np.linalg.solve(left, right)  # [B, 3, channels]
        near = estimate + basis @ plane
    return (estimate + _plane() @ plane).astype(np.float32)


def _components(foreground: NDArray[np.bool_]) -> tuple[NDArray[np.int32], list[tuple[int, slice, slice]]]:
    """Labels 1..M [B, h, w] of the components that are no specks, and their (picture, rows, columns)."""
    within_picture = np.zeros((3, 3, 3), dtype=bool)
    within_picture[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(foreground, structure=within_picture)
    keep = np.bincount(labels.ravel(), minlength=count + 1) >= MIN_AREA
    keep[0] = False
    labels = np.where(keep, keep.cumsum(), 0)[labels].astype(np.int32)
    return labels, [(s[0].start, s[1], s[2]) for s in ndimage.find_objects(labels)]


def _core(foreground: NDArray[np.bool_]) -> NDArray[np.bool_]:
    core = foreground.copy()
    core[:, 1:] &= foreground[:, :-1]
    core[:, :-1] &= foreground[:, 1:]
    core[:, :, 1:] &= foreground[:, :, :-1]
    core[:, :, :-1] &= foreground[:, :, 1:]
    return core


def _colors(
    labels: NDArray[np.int32],
    count: int,
    pixels: NDArray[np.float32],
    to_background: NDArray[np.float32],
    to_palette: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Per component: its colour's index, the distance to it, and the part that the second colour has of the core."""
    inside = np.flatnonzero(labels)
    label = labels.ravel()[inside] - 1
    pixel, contrast = pixels.reshape(-1, 3)[inside], to_background.ravel()[inside]
    # The fourth power of the contrast: edge pixels, half background, hardly count.
    weight = contrast.astype(np.float64) ** 2
    total = np.bincount(label, weight, count)
    mean = np.stack([np.bincount(label, weight * pixel[:, c], count) for c in range(3)], -1) / total[:, None]
    apart = np.linalg.norm(mean[:, None] - _PALETTE, axis=-1)  # [M, 10]
    # Edge pixels may have any colour: only those with four neighbours in the foreground vote.
    core = _core(labels > 0).ravel()[inside]
    nearest = to_palette[:, inside[core]].argmin(0)
    votes = np.bincount(label[core] * len(COLORS) + nearest, minlength=count * len(COLORS))
    votes = np.sort(votes.reshape(count, len(COLORS)), axis=-1)
    return apart.argmin(-1), apart.min(-1), votes[:, -2] / votes.sum(-1).clip(1)


def _soft_masks(
    labels: NDArray[np.int32],
    boxes: list[tuple[int, slice, slice]],
    images: NDArray[np.float32],
    background: NDArray[np.float32],
    colors: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Per component how much of each pixel is the object, [M, window, window], without the other components' pixels."""
    picture = np.array([b for b, _, _ in boxes], dtype=np.int64)
    low = np.array([(y.start, x.start) for _, y, x in boxes], dtype=np.int64).reshape(-1, 2) - _RIM
    high = np.array([(y.stop, x.stop) for _, y, x in boxes], dtype=np.int64).reshape(-1, 2) + _RIM
    steps = np.arange(_WINDOW)
    rows, columns = low[:, :1] + steps, low[:, 1:] + steps  # [M, window]
    valid = ((rows < high[:, :1]) & (rows >= 0) & (rows < IMAGE_SIZE))[:, :, None]
    valid = valid & ((columns < high[:, 1:]) & (columns >= 0) & (columns < IMAGE_SIZE))[:, None, :]
    rows, columns = rows.clip(0, IMAGE_SIZE - 1), columns.clip(0, IMAGE_SIZE - 1)
    at = (picture[:, None, None], rows[:, :, None], columns[:, None, :])
    label = labels[at]
    valid &= (label == 0) | (label == np.arange(1, len(boxes) + 1)[:, None, None])
    behind = background[at]
    way = colors[:, None, None] - behind
    gone = np.einsum("...c,...c->...", images[at] - behind, way) / _square(way)
    return np.where(valid, gone, 0).clip(0, 1).astype(np.float32)


def _normalised(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Soft masks [M, window, window] -> patches [M, patch^2], centred and scaled by their moments, of unit length."""
    steps = np.arange(windows.shape[-1], dtype=np.float32)
    mass = windows.sum((1, 2)).clip(1e-6)
    by_row, by_column = windows.sum(2), windows.sum(1)
    cy, cx = (by_row @ steps) / mass, (by_column @ steps) / mass
    spread = (by_row @ steps**2 + by_column @ steps**2) / mass - cx**2 - cy**2
    radius = np.sqrt(spread.clip(1e-3))  # of gyration
    grid = (np.arange(_PATCH, dtype=np.float32) + 0.5) / _PATCH * 2 - 1
    reach = _REACH * radius[:, None] * grid
    patches = _bilinear(windows, cy[:, None] + reach, cx[:, None] + reach)
    flat = patches.reshape(len(windows), _PATCH**2)
    return flat / np.linalg.norm(flat, axis=-1, keepdims=True).clip(1e-6)


def _bilinear(images: NDArray[np.float32], rows: NDArray, columns: NDArray) -> NDArray[np.float32]:
    """images [M, h, w] at the crossings of rows [M, p] and columns [M, p]; outside is 0."""
    size = images.shape[-1]
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    rows, columns = (rows + 1).clip(0, size + 1), (columns + 1).clip(0, size + 1)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, right = (rows - top)[:, :, None], (columns - left)[:, None, :]
    which = np.arange(len(images))[:, None, None]
    y, x = top[:, :, None], left[:, None, :]
    upper = padded[which, y, x] * (1 - right) + padded[which, y, x + 1] * right
    lower = padded[which, y + 1, x] * (1 - right) + padded[which, y + 1, x + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.float32)


@cache
def _templates() -> NDArray[np.float32]:
    """[shapes, variants, patch^2], of unit length: each shape drawn at several sizes, places and blurs."""
    variants = [(d, x, y, blur) for d in _TEMPLATE_DIAMETERS for x, y in _TEMPLATE_PLACES for blur in _TEMPLATE_BLURS]
    d, x, y, blur = np.array(variants).T
    rows = []
    for shape in range(len(SHAPES)):
        masks = coverage(np.full(len(variants), shape), _WINDOW / 2 + x, _WINDOW / 2 + y, d, size=_WINDOW)
        rows.append(_normalised(np.stack([ndimage.gaussian_filter(m, s) if s else m for m, s in zip(masks, blur)])))
    return np.stack(rows)
