"""Judges the experiments' models: the flow loss of held-out scenes, and the exact checker's score of what they draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.transformer import SanaTransformer
from ..sampling import flow
from ..sampling.pipeline import Pipeline
from ..scenes.checker import check
from ..scenes.testset import load as test_set
from . import latents
from .grid import Place

FLOW_SHIFT = 2.0  # of the mini model, see configs/mini.yaml


@dataclass(frozen=True)
class Recipe:
    """The settings that the runs of an experiment share.

    Attributes:
        width: of the transformer. scenes: of the data set. batch: scenes of a step. decay_part: steps of a branch over
            those of its mark. judged: held-out scenes, a multiple of 64. every: every how many prompts of the test set
            are drawn and checked.
    """

    width: int = 64
    scenes: int = 4 * latents.PART
    batch: int = 32
    lr: float = 4e-3
    decay_part: float = 0.2
    judged: int = 512
    every: int = 5
    sampler_steps: int = 20


def velocity_of(model: SanaTransformer, text: torch.Tensor, mask: torch.Tensor) -> flow.Velocity:
    return lambda x, t: model(x, text, t, mask)


def held_out_losses(model: SanaTransformer, recipe: Recipe, place: Place) -> Iterator[torch.Tensor]:
    """Yields [B] flow losses with text of held-out scenes, on noise that is the same for every model."""
    x0s, prompts = latents.held_out(recipe.judged, place.device)
    text_of = latents.load(place.common, recipe.scenes, place.device).encode
    for number in range(0, len(x0s), latents.ENCODED):
        x0 = x0s[number : number + latents.ENCODED]
        generator = torch.Generator().manual_seed(latents.HELD_OUT + number)
        noise = torch.randn(x0.shape, generator=generator).to(place.device)
        sigma = flow.sample_sigmas(len(x0), generator, flow_shift=FLOW_SHIFT, stratified=True).to(place.device)
        yield flow.loss(velocity_of(model, *text_of(prompts[number : number + len(x0)])), x0, noise, sigma)


@torch.no_grad()
def held_out_loss(model: SanaTransformer, recipe: Recipe, place: Place) -> float:
    """Mean flow loss of the held-out scenes."""
    return torch.cat(list(held_out_losses(model, recipe, place))).mean().item()


def test_prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """The part of the test set that models are scored on."""
    return test_set()[:: recipe.every]


def scores(folder: Path, recipe: Recipe, device: str, n: int = 1) -> list[float]:
    """For every prompt the share of its n images that the exact checker accepts; same noise for every model."""
    entries = test_prompts(recipe)
    pipe = Pipeline.from_pretrained(folder, device=device)
    made = pipe([e["prompt"] for e in entries], n=n, seed=777, steps=recipe.sampler_steps, batch_size=64)
    return [float(np.mean([check(np.asarray(p), e).correct for p in images])) for e, images in zip(entries, made)]


def judged(folder: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """`scores` by prompt, and `score`, the mean of the categories' means."""
    values = scores(folder, recipe, device)
    return {"scores": values, "score": float(overall(values, [e["tag"] for e in test_prompts(recipe)]))}


def overall(values: NDArray[np.float64] | Sequence[float], tags: Sequence[str]) -> NDArray[np.float64]:
    """The mean of the categories' means over the last axis, as GenEval has it."""
    kinds, table = np.array(tags), np.asarray(values, dtype=np.float64)
    return np.mean([table[..., kinds == tag].mean(-1) for tag in dict.fromkeys(tags)], axis=0)
