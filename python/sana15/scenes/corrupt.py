"""Wrong on purpose: specs that differ from a prompt's in exactly one thing, and pictures with a malformed object.

The checker is measured with these. A picture drawn from `wrong_spec(spec)` must be refused for the prompt of `spec`.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from .render import render
from .scene import Object, Scene, pick, sample_scene, uniform
from .spec import Clause, Spec
from .vocabulary import COLOR_NAMES, IMAGE_SIZE, RELATIONS, SHAPES

KINDS = {
    "single_object": ("shape", "count"),
    "two_object": ("shape", "count"),
    "counting": ("shape", "count"),
    "colors": ("shape", "colour", "count"),
    "position": ("shape", "relation"),
    "color_attr": ("shape", "colour", "exchange"),
}


def wrong_spec(spec: Spec, kind: str, rng: Random) -> Spec:
    """A spec that differs from `spec` in exactly one shape, colour, count or relation, or has its colours exchanged."""
    clauses = list(spec.clauses)
    at = int(rng.random() * len(clauses))
    changed = clauses[at]
    if kind == "shape":
        used = {clause.shape for clause in clauses}
        other = Clause(pick(rng, [s for s in SHAPES if s not in used]), 1, changed.color)
        if changed.count > 1:  # one of several
            return Spec((replace(changed, count=changed.count - 1), other))
        clauses[at] = other
    elif kind == "colour":
        clauses[at] = replace(changed, color=pick(rng, [c for c in COLOR_NAMES if c != changed.color]))
    elif kind == "exchange":
        first, second = clauses
        clauses = [replace(first, color=second.color), replace(second, color=first.color)]
    elif kind == "relation":
        return Spec(spec.clauses, pick(rng, [r for r in RELATIONS if r != spec.relation]))
    elif kind == "count":
        if rng.random() < 0.5 and spec.total() > 1:
            if changed.count == 1:  # one of two shapes is missing
                return Spec((clauses[1 - at],))
            clauses[at] = replace(changed, count=changed.count - 1)
        else:
            clauses[at] = replace(changed, count=changed.count + 1)
    else:
        raise ValueError(f"unknown kind {kind!r}; the kinds are shape, colour, exchange, relation, count")
    return Spec(tuple(clauses), spec.relation)


def malformed_picture(kind: str, rng: Random) -> tuple[NDArray[np.uint8], Spec]:
    """A picture of one object that is damaged, and the spec that it would have shown."""
    shape, color = pick(rng, SHAPES), pick(rng, COLOR_NAMES)
    spec = Spec((Clause(shape, 1, color),))
    scene = sample_scene(spec, rng)
    picture = MALFORMED[kind](scene, rng)
    return picture, spec


def _empty(scene: Scene) -> NDArray[np.uint8]:
    return render(Scene((), scene.background))


def _cut(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """35 to 65 % of the object's width, left or right of a cut, is missing."""
    (o,) = scene.objects
    at = round(o.cx + o.diameter * uniform(rng, -0.15, 0.15))
    missing = np.arange(IMAGE_SIZE) < at if rng.random() < 0.5 else np.arange(IMAGE_SIZE) >= at
    return np.where(missing[None, :, None], _empty(scene), render(scene))


def _two_colors(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """The halves have different colours."""
    (o,) = scene.objects
    color = pick(rng, [c for c in COLOR_NAMES if c != o.color])
    (other,) = sample_scene(Spec((Clause(o.shape, 1, color),)), rng).objects
    recolored = replace(scene, objects=(replace(o, color=color, rgb=other.rgb),))
    left = np.arange(IMAGE_SIZE) < round(o.cx)
    return np.where(left[None, :, None], render(scene), render(recolored))


def _merged(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """A second object of the same colour overlaps the first by a quarter to a half of their widths."""
    (o,) = scene.objects
    toward = 1 if o.cx < IMAGE_SIZE / 2 else -1
    second = Object(
        shape=pick(rng, SHAPES),
        color=o.color,
        cx=o.cx + toward * o.diameter * uniform(rng, 0.5, 0.75),
        cy=o.cy + o.diameter * uniform(rng, -0.2, 0.2),
        diameter=o.diameter,
        rgb=o.rgb,
    )
    empty, first = _empty(scene).astype(int), render(scene).astype(int)
    other = render(replace(scene, objects=(second,))).astype(int)
    nearer = np.square(first - empty).sum(-1) >= np.square(other - empty).sum(-1)
    return np.where(nearer[..., None], first, other).astype(np.uint8)


def _stretched(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """Squeezed to half its height around its middle."""
    (o,) = scene.objects
    rows = (o.cy + (np.arange(IMAGE_SIZE) + 0.5 - o.cy) * 2 - 0.5).round().astype(int)
    inside = (rows >= 0) & (rows < IMAGE_SIZE)
    return np.where(inside[:, None, None], render(scene)[rows.clip(0, IMAGE_SIZE - 1)], _empty(scene))


def _blob(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """A smooth random outline of the object's size and colour."""
    (o,) = scene.objects
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    angle, radius = np.arctan2(y - o.cy, x - o.cx), np.hypot(y - o.cy, x - o.cx)
    outline = np.ones_like(angle)
    for order in (2, 3, 4):
        outline += uniform(rng, 0.12, 0.3) * np.cos(order * (angle - uniform(rng, 0, 2 * np.pi)))
    alpha = (o.diameter / 2.6 * outline - radius + 0.5).clip(0, 1)[..., None]
    mixed = _empty(scene) * (1 - alpha) + 255 * np.array(o.rgb) * alpha
    return (mixed + 0.5).clip(0, 255).astype(np.uint8)


MALFORMED: dict[str, Callable[[Scene, Random], NDArray[np.uint8]]] = {
    "cut": _cut,
    "two colours": _two_colors,
    "merged": _merged,
    "stretched": _stretched,
    "blob": _blob,
}
