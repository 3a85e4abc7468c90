"""The training data of the mini model: an endless stream of prompts and scenes without anything that is held out."""

from collections.abc import Mapping
from random import Random

import numpy as np
from numpy.typing import NDArray

from .prompts import wording
from .render import render_batch
from .scene import Scene, pick, sample_scene
from .spec import Clause, Spec
from .testset import HELD_OUT_PAIRS, forbidden_prompts, is_held_out, prompt_key
from .vocabulary import CATEGORIES, COLOR_NAMES, MAX_COUNT, RELATIONS, SHAPES

# The categories with more to learn come more often, position less: it is learned first of the hard ones.
WEIGHTS = {"single_object": 2, "two_object": 2, "counting": 3, "colors": 2, "position": 2, "color_attr": 4}


def sample_spec(category: str, rng: Random) -> Spec:
    """A random spec of one of GenEval's six categories; held-out ones come too."""
    first, second = pick(rng, SHAPES), pick(rng, SHAPES)
    while second == first:
        second = pick(rng, SHAPES)
    if category == "single_object":
        return Spec((Clause(first),))
    if category == "counting":
        return Spec((Clause(first, 2 + int(rng.random() * (MAX_COUNT - 1))),))
    if category == "colors":
        return Spec((Clause(first, 1, pick(rng, COLOR_NAMES)),))
    if category == "two_object":
        return Spec((Clause(first), Clause(second)))
    if category == "position":
        return Spec((Clause(first), Clause(second)), pick(rng, RELATIONS))
    if category == "color_attr":
        color, other = pick(rng, COLOR_NAMES), pick(rng, COLOR_NAMES)
        while other == color:
            other = pick(rng, COLOR_NAMES)
        return Spec((Clause(first, 1, color), Clause(second, 1, other)))
    raise ValueError(f"unknown category {category!r}; the categories are {', '.join(CATEGORIES)}")


def sample_training(rng: Random, weights: Mapping[str, float] = WEIGHTS) -> tuple[str, Scene]:
    """One training pair, prompt and scene, with nothing held out in either.

    Args:
        rng: the only source of randomness; `random.Random(seed)`.
        weights: how often each category comes, relative to the others; a category that is missing never comes.
    """
    category = rng.choices(list(weights), list(weights.values()))[0]
    spec = sample_spec(category, rng)
    while is_held_out(spec):
        spec = sample_spec(category, rng)
    prompt = wording(spec, rng)
    while prompt_key(prompt) in forbidden_prompts():
        prompt = wording(spec, rng)
    return prompt, sample_scene(spec, rng, allowed=lambda shape, color: (shape, color) not in HELD_OUT_PAIRS)


def training_batch(
    rng: Random, count: int, weights: Mapping[str, float] = WEIGHTS
) -> tuple[list[str], NDArray[np.uint8]]:
    """`count` training pairs, rendered: prompts and pictures [count, 64, 64, 3] uint8."""
    pairs = [sample_training(rng, weights) for _ in range(count)]
    return [prompt for prompt, _ in pairs], render_batch([scene for _, scene in pairs])
