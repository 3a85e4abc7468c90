"""A scene: what the renderer draws. Sampling one that shows what a Spec asks for, and nothing else.

Everything is drawn from `random.Random.random()`, whose sequence Python promises to keep, so that a seed means the same
scene on every machine.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from .spec import Spec
from .vocabulary import COLOR_NAMES, COLORS, IMAGE_SIZE, MAX_DIAMETER, MIN_DIAMETER

MARGIN = 2.0  # pixels between an object's box and the border
GAP = 4.0  # pixels between the boxes of two objects
# More objects are smaller, so that they fit.
LARGEST = {1: MAX_DIAMETER, 2: MAX_DIAMETER, 3: 22.0, 4: 20.0, 5: 17.0}
# A shown relation is clear: the offset across it is at most this part of the offset along it.
MAX_SLOPE = 0.45
COLOR_JITTER = 0.035
SAME_COLOR = 0.5  # the part of the counting scenes in which all objects have one colour

T = TypeVar("T")


@dataclass(frozen=True)
class Object:
    """One drawn object: centre and diameter in pixels, rgb in 0..1 (the named colour with its jitter)."""

    shape: str
    color: str
    cx: float
    cy: float
    diameter: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Background:
    """Grey level, the light (its change over the picture in x and y), the texture's strength and seed."""

    grey: float
    light: tuple[float, float]
    texture: float
    seed: int


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: Background


def pick(rng: Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def uniform(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def sample_scene(spec: Spec, rng: Random, allowed: Callable[[str, str], bool] | None = None) -> Scene:
    """A scene that shows exactly what `spec` asks for.

    Colours that the spec leaves open, sizes, places and the background are random.

    Args:
        spec: at most 5 objects in all.
        rng: the only source of randomness.
        allowed: says whether an open colour may be used: allowed(shape, color). None allows all.
    """
    shapes = [clause.shape for clause in spec.clauses for _ in range(clause.count)]
    if len(shapes) not in LARGEST:
        raise ValueError(f"a scene has 1 to {max(LARGEST)} objects, got {len(shapes)}")
    colors: list[str] = []
    for clause in spec.clauses:
        open_to = [c for c in COLOR_NAMES if allowed is None or allowed(clause.shape, c)]
        first = clause.color or pick(rng, open_to)
        same = clause.color is not None or rng.random() < SAME_COLOR
        colors += [first] + [first if same else pick(rng, open_to) for _ in range(clause.count - 1)]
    diameters, centres = _layout(len(shapes), spec.relation, rng)
    objects = tuple(
        Object(shape, color, cx, cy, diameter, _jittered(color, rng))
        for shape, color, diameter, (cx, cy) in zip(shapes, colors, diameters, centres)
    )
    return Scene(objects, sample_background(rng))


def sample_background(rng: Random) -> Background:
    angle, strength = uniform(rng, 0, 2 * math.pi), uniform(rng, 0, 0.10)
    return Background(
        grey=uniform(rng, 0.42, 0.60),
        light=(strength * math.cos(angle), strength * math.sin(angle)),
        texture=uniform(rng, 0, 0.03),
        seed=int(rng.random() * 2**32),
    )


def _jittered(color: str, rng: Random) -> tuple[float, float, float]:
    r, g, b = (min(1.0, max(0.0, c + uniform(rng, -COLOR_JITTER, COLOR_JITTER))) for c in COLORS[color])
    return (r, g, b)


def _layout(n: int, relation: str | None, rng: Random) -> tuple[list[float], list[tuple[float, float]]]:
    """Diameters and centres of n objects whose boxes keep MARGIN and GAP; with a relation: reference, then subject."""
    largest = LARGEST[n]
    while True:
        diameters = [uniform(rng, MIN_DIAMETER, largest) for _ in range(n)]
        for _ in range(20):
            centres: list[tuple[float, float]] = []
            for diameter in diameters:
                for _ in range(10):
                    inset = MARGIN + diameter / 2
                    place = (uniform(rng, inset, IMAGE_SIZE - inset), uniform(rng, inset, IMAGE_SIZE - inset))
                    if all(_apart(place, diameter, *other) for other in zip(centres, diameters)):
                        centres.append(place)
                        break
                else:
                    break
            if len(centres) == n and (relation is None or _shows(relation, *centres)):
                return diameters, centres
        # These sizes are hard to place: take smaller ones, so that this ends.
        largest = max(MIN_DIAMETER, largest - 0.25)


def _apart(a: tuple[float, float], a_diameter: float, b: tuple[float, float], b_diameter: float) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= (a_diameter + b_diameter) / 2 + GAP


def _shows(relation: str, reference: tuple[float, float], subject: tuple[float, float]) -> bool:
    dx, dy = subject[0] - reference[0], subject[1] - reference[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) <= MAX_SLOPE * along
