"""Small models with search against larger ones without: score against images and against the compute of inference.

The models are the growth experiment's: the base of 4 blocks, 12 blocks from scratch, and the base grown to 12. One image of N
is picked by the learned judge, and by the exact checker itself (the oracle, what a perfect judge would gain).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..judges.learned import LearnedJudge
from ..sampling import flow
from ..sampling.pipeline import Pipeline
from ..scaling.curve import picked_worth
from ..scenes.checker import check_batch
from . import growth, latents
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results
from .intervals import over_seeds, shown
from .judging import Recipe, overall, test_prompts
from .trajectory import Run, model_name, model_path, run_cells, step_flops

PICKED_BY = ("learned", "oracle")


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        n: candidates of a prompt. counts: sizes of the sets that one image is picked of. shards: cells of a model and seed.
        growth: the options of the growth experiment whose models these are.
    """

    n: int = 32
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    shards: int = 4
    growth: growth.Options = field(default_factory=growth.Options)

    @property
    def recipe(self) -> Recipe:
        return self.growth.recipe


BUDGETS = {
    "smoke": Options(n=2, counts=(1, 2), shards=1, growth=growth.BUDGETS["smoke"]),
    "small": Options(n=8, counts=(1, 2, 4, 8), growth=growth.BUDGETS["small"]),
    "full": Options(),
}


def models(options: Options, seed: int) -> dict[str, tuple[Run, int]]:
    """Name -> run and mark of the models of a seed."""
    g = options.growth
    return {
        "base": (growth.base(g, seed), g.marks[-1]),
        "scratch": (growth.scratch(g, seed), g.marks[-1]),
        "grown": (growth.grown(g, seed), g.grown[-1]),
    }


def candidates(place: Place, options: Options, name: str, seed: int, shard: int) -> dict[str, Any]:
    """Makes, judges and checks the candidates of every `shards`-th prompt."""
    run, mark = models(options, seed)[name]
    pipe = Pipeline.from_pretrained(place.common / model_path(run, mark, options.recipe), device=place.device)
    judge = LearnedJudge.load()
    lines = test_prompts(options.recipe)[shard :: options.shards]
    made = pipe(
        [line["prompt"] for line in lines], n=options.n, seed=1000 + shard, steps=options.recipe.sampler_steps,
        batch_size=64,
    )  # fmt: skip
    worth = [
        [float(v.correct) for v in check_batch(np.stack([np.asarray(p) for p in images]), [line] * options.n)]
        for line, images in zip(lines, made)
    ]
    scores = [[verdict.score for verdict in judge.judge(images, line)] for line, images in zip(lines, made)]
    return {"model": name, "seed": seed, "shard": shard, "scores": scores, "worth": worth}


def cells(options: Options) -> list[Cell]:
    g, recipe = options.growth, options.recipe
    found = latents.cells(recipe.scenes)
    for seed in g.seeds:
        found += run_cells(growth.base(g, seed), g.marks, recipe)
        found += run_cells(growth.scratch(g, seed), g.marks, recipe)
        found += run_cells(growth.grown(g, seed), g.grown, recipe)
        for name, (run, mark) in models(options, seed).items():
            for shard in range(options.shards):
                given: dict[str, Any] = {"options": options, "name": name, "seed": seed, "shard": shard}
                found.append(Cell(f"{name}-{seed}-{shard}", partial(candidates, **given), (model_name(run, mark),)))
    return found


def curve(options: Options, results: Results, name: str, seed: int, by: str) -> list[float] | None:
    """The score of one picked of each count; None where a shard is missing."""
    cells = [results.get(f"{name}-{seed}-{shard}") for shard in range(options.shards)]
    if any(cell is None for cell in cells):
        return None
    lines = test_prompts(options.recipe)
    tags = [line["tag"] for shard in range(options.shards) for line in lines[shard :: options.shards]]
    scores, worth = (_joined(cells, key) for key in ("scores", "worth"))
    picked = scores if by == "learned" else worth
    return [
        float(overall(picked_worth(picked[None], worth, count, options.n // count), tags)) for count in options.counts
    ]


def _joined(cells: Sequence[Any], key: str) -> NDArray[np.float64]:
    return np.concatenate([np.array(cell[key], dtype=np.float64) for cell in cells])


def image_flops(options: Options, run: Run) -> float:
    """FLOPs of the blocks for one image: a forward pass a step, two where guidance is on."""
    recipe = options.recipe
    forward = step_flops(run, recipe) / 3 / recipe.batch
    plan = flow.schedule(recipe.sampler_steps, flow_shift=2.0)
    guided = sum(flow.guidance_is_on(s, 2.0, (0.0, 0.9)) for s in plan.sigmas[:-1])
    return forward * (plan.steps + guided)


def report(options: Options, results: Results, folder: Path) -> Report:
    g = options.growth
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for name in ("base", "scratch", "grown"):
        for by in PICKED_BY:
            found = [curve(options, results, name, seed, by) for seed in g.seeds]
            curves[name, by] = [c for c in found if c is not None]
    if not any(curves.values()):
        return Report("No model has all its candidates yet.")
    costs = {name: image_flops(options, run) for name, (run, _) in models(options, g.seeds[0]).items()}
    lines = [
        f"{len(test_prompts(options.recipe))} prompts, {options.n} candidates each; means over disjoint sets of candidates, "
        "then over seeds with 95 % intervals. Compute 1 is one image of the base; the judge's is left out.",
        "",
        "| model | picked by | compute of an image | seeds | " + " | ".join(f"1 of {c}" for c in options.counts) + " |",
        "|---" * (4 + len(options.counts)) + "|",
    ]
    for (name, by), rows in curves.items():
        if rows:
            points = " | ".join(shown([row[i] for row in rows]) for i in range(len(options.counts)))
            lines.append(f"| {name} | {by} | {costs[name] / costs['base']:.1f} | {len(rows)} | {points} |")
    for large in ("scratch", "grown"):
        for by in PICKED_BY:
            lines += _passing(options, curves["base", by], curves[large, by], large, by, costs)
    return Report("\n".join(lines), partial(_draw, options, curves, costs))


def passing(small: Sequence[float], level: float, counts: Sequence[int]) -> int | None:
    """The least count at which one of so many images of the small model scores the level; None where none does."""
    return next((count for count, score in zip(counts, small) if score >= level), None)


def _passing(
    options: Options, small: list[list[float]], large: list[list[float]], name: str, by: str, costs: dict[str, float]
) -> list[str]:
    """Says where the base with search passes one image of a larger model, in the mean over seeds."""
    level = float(np.mean([row[0] for row in large])) if small and large else 0.0
    if not level:  # nothing to pass
        return []
    count = passing(np.mean(small, axis=0).tolist(), level, options.counts)
    if count is None:
        return [
            "",
            f"Picked by {by}, the base does not reach one image of {name} ({level:.3f}) by {options.counts[-1]} images.",
        ]
    price = count * costs["base"] / costs[name]
    return [
        "",
        f"Picked by {by}, 1 of {count} of the base passes one image of {name} ({level:.3f}), at {price:.2f} of its compute.",
    ]


def _draw(
    options: Options, curves: dict[tuple[str, str], list[list[float]]], costs: dict[str, float], path: Path
) -> None:
    with axes_of(path, xlabel="compute of inference (one image of the base = 1)", ylabel="score", xscale="log") as axes:
        for (name, by), rows in curves.items():
            if rows:
                means, halves = zip(*(over_seeds([row[i] for row in rows]) for i in range(len(options.counts))))
                xs = [count * costs[name] / costs["base"] for count in options.counts]
                error = halves if max(halves) < 1 else None
                style = "o-" if by == "learned" else "o:"
                color = {"base": "C0", "scratch": "C1", "grown": "C2"}[name]
                axes.errorbar(
                    xs, means, yerr=error, fmt=style, color=color, label=f"{name}, {by}", linewidth=1, markersize=3
                )


EXPERIMENT = Experiment("sizes", BUDGETS, cells, report)
