"""Scenes -> pictures, many at a time.

The picture of a scene depends on nothing but the scene: not on the batch around it, not on a library's random numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .scene import Scene
from .shapes import coverage
from .vocabulary import IMAGE_SIZE, SHAPES

_CHUNK = 16  # pictures at a time: the working set stays in the cache
_BLOTCHES = 9  # the coarse texture's grid points per side
_GRAIN = 0.4  # the fine texture's part of the texture's strength


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture of one scene, [64, 64, 3] uint8 RGB."""
    return render_batch([scene])[0]


def render_batch(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """The pictures of scenes, [B, 64, 64, 3] uint8 RGB."""
    pictures = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        pictures[start : start + _CHUNK] = _render_chunk(scenes[start : start + _CHUNK])
    return pictures


def _render_chunk(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    n = len(scenes)
    slots = max((len(scene.objects) for scene in scenes), default=0)
    where = [i * slots + k for i, scene in enumerate(scenes) for k in range(len(scene.objects))]
    objects = [o for scene in scenes for o in scene.objects]
    alpha = np.zeros((n * slots, IMAGE_SIZE**2), dtype=np.float32)
    colors = np.zeros((n * slots, 3), dtype=np.float32)
    if objects:
        numbers = np.array([(SHAPES.index(o.shape), o.cx, o.cy, o.diameter, *o.rgb) for o in objects])
        alpha[where] = coverage(numbers[:, 0].astype(np.int32), *numbers[:, 1:4].T).reshape(len(objects), -1)
        colors[where] = numbers[:, 4:]
    alphas = alpha.reshape(n, slots, IMAGE_SIZE**2)
    # Objects never overlap, so what they leave of the background is one minus their sum.
    # Planes, not pixels, lie together here: the inner loops run over 4,096 pixels rather than 3 channels.
    grey = np.array([scene.background.grey for scene in scenes], dtype=np.float32)
    image = np.repeat((grey[:, None] * (1 - alphas.sum(axis=1)))[:, None], 3, axis=1)  # [B, 3, pixels]
    for k in range(slots):
        image += alphas[:, k, None, :] * colors.reshape(n, slots, 3, 1)[:, k]
    light, texture = _light_and_texture(scenes)
    image *= light[:, None]
    image += texture[:, None]
    np.clip(image, 0, 1, out=image)
    image *= 255
    image += 0.5
    planes = image.astype(np.uint8).reshape(n, 3, IMAGE_SIZE, IMAGE_SIZE)
    return planes.transpose(0, 2, 3, 1)


def _light_and_texture(scenes: Sequence[Scene]) -> tuple[NDArray, NDArray]:
    """The factor of the light and the summand of the texture, each [B, pixels]."""
    numbers = np.array([(*s.background.light, s.background.texture) for s in scenes], dtype=np.float32)
    seeds = np.array([s.background.seed for s in scenes], dtype=np.uint32)
    ramp = ((np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE - 0.5) * 2
    light = 1 + numbers[:, 0, None, None] * ramp + numbers[:, 1, None, None] * ramp[:, None]
    coarse = _noise(seeds, _BLOTCHES**2).reshape(-1, _BLOTCHES, _BLOTCHES)
    at = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) * ((_BLOTCHES - 1) / IMAGE_SIZE)
    low, part = at.astype(np.int64), at % 1
    rows = coarse[:, low] * (1 - part)[:, None] + coarse[:, low + 1] * part[:, None]
    blotches = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part  # [B, size, size]
    texture = blotches.reshape(len(scenes), -1)
    texture += _GRAIN * _noise(seeds ^ np.uint32(0x9E3779B9), IMAGE_SIZE**2)
    return light.reshape(len(scenes), -1), texture * numbers[:, 2, None]


def _noise(seeds: NDArray[np.uint32], count: int) -> NDArray[np.float32]:
    """[B, count] numbers in -1..1, a hash of seed and place (two rounds of multiply and shift)."""
    with np.errstate(over="ignore"):
        x = seeds[:, None] * np.uint32(0x85EBCA6B) + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1)
        for factor in (np.uint32(0x7FEB352D), np.uint32(0x846CA68B)):
            x ^= x >> np.uint32(16)
            x *= factor
        x ^= x >> np.uint32(15)
    return x.astype(np.float32) * np.float32(2**-31) - np.float32(1)


def contact_sheet(pictures: NDArray[np.uint8], columns: int, path: str | Path, captions: Sequence[str] = ()) -> None:
    """Writes pictures as a PNG, `columns` in a row, doubled in size, each with its caption below it."""
    from PIL import Image, ImageDraw

    tile, below = 2 * IMAGE_SIZE, 34 if captions else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (tile + 6), rows * (tile + below + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = index % columns * (tile + 6) + 3, index // columns * (tile + below + 6) + 3
        sheet.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), (left, top))
        if captions:
            draw.multiline_text((left, top + tile + 1), captions[index], fill="black", font_size=9, spacing=1)
    sheet.save(path, format="PNG")
