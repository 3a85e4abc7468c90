"""Trains the learned judge on scenes; every label comes from the renderer's description of what it drew.

python -m sana15.training.judge --out DIR --steps 3000
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss
from tqdm import tqdm

from ..judges.learned import CENTRE, COLOR, GRID, OFFSET, SHAPE, SIZE, STRIDE, WELL_FORMED, LearnedJudge, SceneDetector
from ..model.autoencoder import Autoencoder
from ..model.folder import MINI
from ..scenes.corrupt import KINDS, MALFORMED, wrong_spec
from ..scenes.render import render
from ..scenes.scene import Object, Scene, pick, sample_scene, uniform
from ..scenes.training import WEIGHTS, sample_spec
from ..scenes.vocabulary import COLOR_NAMES, SHAPES
from ..storage.concurrency import claimed, require_one_process, using
from .loop import fit

DAMAGED = 0.4  # part of the pictures with one malformed object
LATENT_NOISE = 0.25  # the largest, in standard deviations of the latents


def sample(rng: Random) -> tuple[Scene, NDArray[np.uint8], int | None]:
    """A scene, its picture, and which of its objects was damaged in the picture (None: none)."""
    category = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    spec = sample_spec(category, rng)
    if rng.random() < 0.3:
        spec = wrong_spec(spec, pick(rng, KINDS[category]), rng)
    scene = sample_scene(spec, rng)
    picture = render(scene)
    if rng.random() >= DAMAGED:
        return scene, picture, None
    at = int(rng.random() * len(scene.objects))
    alone = Scene((scene.objects[at],), scene.background)
    damage = pick(rng, (*MALFORMED.values(), _half_way, _faint))
    before, after = render(alone), damage(alone, rng)
    # What the damage changed of the object alone is changed in the whole picture.
    changed = (before != after).any(-1, keepdims=True)
    return scene, np.where(changed, after, picture), at


def _half_way(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """Between two shapes, as a model paints that cannot decide."""
    (o,) = scene.objects
    other = replace(o, shape=pick(rng, [s for s in SHAPES if s != o.shape]))
    a, b = render(scene), render(Scene((other,), scene.background))
    part = uniform(rng, 0.35, 0.65)
    return (a * part + b * (1 - part) + 0.5).astype(np.uint8)


def _faint(scene: Scene, rng: Random) -> NDArray[np.uint8]:
    """Half-way to the background."""
    part = uniform(rng, 0.25, 0.5)
    empty = render(Scene((), scene.background))
    return (render(scene) * part + empty * (1 - part) + 0.5).astype(np.uint8)


def targets(samples: list[tuple[Scene, int | None]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the network should say, [B, 8, 16, 16] (centre, well formed, offset x and y, size, shape, colour, is object).

    And how much the centre counts in each cell, [B, 16, 16]: not at all in the cells around an object's.
    """
    out = torch.zeros(len(samples), 8, GRID, GRID)
    weight = torch.ones(len(samples), GRID, GRID)
    for b, (scene, damaged) in enumerate(samples):
        for i, o in enumerate(scene.objects):
            x, y = (min(int(c / STRIDE), GRID - 1) for c in (o.cx, o.cy))
            weight[b, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = 0
            out[b, :, y, x] = torch.tensor(_target(o, x, y, i != damaged))
        weight[b][out[b, CENTRE] > 0] = 1
    return out, weight


def _target(o: Object, x: int, y: int, well_formed: bool) -> list[float]:
    offset = [o.cx / STRIDE - x - 0.5, o.cy / STRIDE - y - 0.5]
    return [1, well_formed, *offset, math.log(o.diameter / 20), SHAPES.index(o.shape), COLOR_NAMES.index(o.color), 1]


def loss(out: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    centre = binary_cross_entropy_with_logits(out[:, CENTRE], target[:, 0], weight)
    cells = out.permute(0, 2, 3, 1)[target[:, 7] > 0]  # [objects, 23]
    wanted = target.permute(0, 2, 3, 1)[target[:, 7] > 0]
    well_formed = wanted[:, 1]
    parts = [
        50 * centre,  # one cell in about 130 holds an object
        binary_cross_entropy_with_logits(cells[:, WELL_FORMED], well_formed),
        smooth_l1_loss(cells[:, OFFSET], wanted[:, 2:4]),
        smooth_l1_loss(cells[:, SIZE], wanted[:, 4]),
    ]
    for part, number in ((SHAPE, 5), (COLOR, 6)):  # a damaged object's shape and colour are not asked
        errors = cross_entropy(cells[:, part], wanted[:, number].long(), reduction="none")
        parts.append((errors * well_formed).sum() / well_formed.sum().clamp(min=1))
    return sum(parts[1:], parts[0])


def batch(
    seed: int, step: int, count: int, through: Autoencoder | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, 64, 64], targets and weights of one step; they depend on (seed, step) only.

    Three quarters go through an autoencoder, with a little noise on their latents: so look the pictures of a model.
    """
    rng = Random(f"learned judge {seed}/{step}")
    made = [sample(rng) for _ in range(count)]
    pictures = torch.from_numpy(np.stack([picture for _, picture, _ in made])).permute(0, 3, 1, 2).float() / 127.5 - 1
    if through is not None:
        some = count * 3 // 4
        generator = torch.Generator().manual_seed(int(rng.random() * 2**62))
        with torch.no_grad():
            latents = through.encode(pictures[:some])
            strength = LATENT_NOISE * torch.rand(some, 1, 1, 1, generator=generator)
            pictures[:some] = through.decode(
                latents + strength * torch.randn(latents.shape, generator=generator)
            ).clamp(-1, 1)
    return pictures, *targets([(scene, damaged) for scene, _, damaged in made])


def train_judge(
    steps: int, *, batch_size: int = 64, lr: float = 2e-3, seed: int = 0, autoencoder: str | Path | None = MINI / "vae",
    width: int = 48, blocks: int = 4, report: Callable[[int, float], None] | None = None,
) -> LearnedJudge:  # fmt: skip
    """A judge after `steps` steps of AdamW, warmed up and then cooled down to zero along a cosine."""
    require_one_process("training a judge")
    with using(torch.default_generator):
        torch.manual_seed(seed)
        network = SceneDetector(width, blocks)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    warm_up = max(steps // 20, 1)
    through = Autoencoder.load(autoencoder) if autoencoder else None

    def error(step: int, generator: torch.Generator) -> torch.Tensor:
        pictures, target, weight = batch(seed, step, batch_size, through)
        return loss(network(pictures), target, weight)

    fit(
        error, list(network.parameters()), optimizer, range(steps),
        rate=lambda step: lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1))),
        done=None if report is None else lambda step, error, norm: report(step, error.item()),
    )  # fmt: skip
    about = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed, "pictures": steps * batch_size}
    return LearnedJudge(network, training=about)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the learned judge of scenes on rendered ones.")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=3000, help="of --batch-size pictures (default 3000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder", default=str(MINI / "vae"), metavar="DIR", help="default: the mini model's")
    args = parser.parse_args()
    try:
        require_one_process("training a judge")
        with claimed(args.out):
            _train_to(args)
    except ValueError as error:
        parser.error(str(error))


def _train_to(args: argparse.Namespace) -> None:
    with tqdm(total=args.steps, unit="step", mininterval=5) as bar:

        def report(step: int, error: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{error:.3f}", refresh=False)

        judge = train_judge(
            args.steps, batch_size=args.batch_size, seed=args.seed, autoencoder=args.autoencoder, report=report
        )  # fmt: skip
    judge.save(args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
