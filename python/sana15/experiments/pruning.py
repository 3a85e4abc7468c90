"""Measures what depth pruning costs, how much of it healing brings back, and whether training that depth would be better.

The sources are the growth experiment's models from scratch, one a seed. Each is pruned by every strategy to two thirds, half
and a third of its depth; score and loss are taken before pruning, after it and after healing, on the same prompts and noise.
The comparison is a model of that depth trained from scratch with the compute of source and healing together.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from ..model.checkpoint import load_transformer
from ..model.depth import Watched, with_blocks
from ..model.transformer import SanaTransformer
from ..pruning.folder import prune_folder
from ..pruning.healing import BATCH, DISTILL, LR, LR_LIMIT, NOISES, PLAIN_PART, Healing
from ..pruning.importance import Importance, block_importance
from ..pruning.removal import choose, highest
from ..pruning.trajectory import CalibrationBatch, calibration, calibration_prompts
from ..sampling.pipeline import Pipeline
from ..storage.files import read_json, replacing
from . import latents
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results
from .growth import TINY
from .intervals import shown
from .judging import Recipe, held_out_loss, overall, scores, test_prompts
from .trajectory import Run, flops, model_name, model_path, run_cells, step_flops, steps_of

DRAWS = 2000
#: "authors" is the released code's rule (NVlabs/Sana, issue 269): 1 - |cosine|. "contiguous" leaves out neighbours.
STRATEGIES = ("importance", "authors", "loss", "learned", "contiguous", "uniform", "random")
#: Most steps of one cell of the comparison from scratch, so that it stays below eight minutes.
TRUNK = 2000


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        blocks, mark: of the sources, growth's `scratch` runs. keep: blocks that stay. n: images per prompt.
        count: calibration prompts. heal: steps of healing, whose rates follow `rates` (they are the package's own).
    """

    by: tuple[str, ...] = STRATEGIES
    blocks: int = 12
    mark: int = 2000
    keep: tuple[int, ...] = (8, 6, 4)
    seeds: tuple[int, ...] = (0, 1, 2)
    n: int = 1
    count: int = 100
    heal: int = 100
    distill: float = DISTILL
    rates: tuple[float, ...] = (LR, LR_LIMIT, PLAIN_PART)
    recipe: Recipe = field(default_factory=Recipe)


BUDGETS = {
    "smoke": Options(
        by=("importance", "authors", "contiguous"),
        blocks=2,
        mark=2,
        keep=(1,),
        seeds=(0,),
        count=2,
        heal=1,
        recipe=TINY,
    ),
    "small": Options(by=("importance", "learned", "uniform"), seeds=(0,)),
    "full": Options(),
}


def source(options: Options, seed: int) -> Run:
    return Run("scratch", seed, options.blocks)


def source_folder(place: Place, options: Options, seed: int) -> Path:
    return place.common / model_path(source(options, seed), options.mark, options.recipe)


def work_path(options: Options, seed: int, name: str) -> str:
    """Returns the path, below the common folder, of what is known of a source's blocks."""
    return f"{source(options, seed).path(options.recipe)}/pruning-{options.mark}/{name}.json"


def calibrated(place: Place, options: Options, seed: int) -> tuple[Pipeline, Iterator[CalibrationBatch]]:
    pipe = Pipeline.from_pretrained(source_folder(place, options, seed), device=place.device)
    asked = calibration_prompts(pipe, None, options.count, seed)
    return pipe, calibration(pipe, asked, steps=options.recipe.sampler_steps, seed=seed)


@torch.no_grad()
def authors_rule(model: SanaTransformer, batches: Sequence[CalibrationBatch]) -> list[float]:
    """Each block's mean of 1 - |cosine| of its input and output along the width."""
    sums = np.zeros(model.config.num_layers)
    for batch in batches:
        found: list[float] = []

        def measure(before: torch.Tensor, after: torch.Tensor, found: list[float] = found) -> None:
            found.append((1 - F.cosine_similarity(before.double(), after.double(), dim=-1).abs()).mean().item())

        watched = with_blocks(model, [Watched(block, measure) for block in model.transformer_blocks])
        watched(batch.latents, batch.text, batch.timestep, batch.mask)
        sums += np.array(found)
    return (sums / len(batches)).tolist()


def measured(place: Place, options: Options, seed: int) -> dict[str, Any]:
    """Measures importance, the authors' rule and loss of the blocks once, for all depths; and scores the source."""
    pipe, batches = calibrated(place, options, seed)
    kept = list(batches)
    found = block_importance(pipe.transformer, kept)
    rule = authors_rule(pipe.transformer, kept)
    found.save(_made(place, options, seed, "importance"))
    _made(place, options, seed, "authors").write_text(json.dumps({"rule": rule}) + "\n", encoding="utf-8")
    folder = source_folder(place, options, seed)
    return {
        "seed": seed, "cosine": found.cosine, "authors": rule, "loss_change": found.loss_change,
        "whole": scores(folder, options.recipe, place.device, options.n),
        "loss": held_out_loss(pipe.transformer, options.recipe, place),
    }  # fmt: skip


def _made(place: Place, options: Options, seed: int, name: str) -> Path:
    path = place.common / work_path(options, seed, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def chosen(place: Place, options: Options, by: str, keep: int, seed: int) -> list[int]:
    """The blocks that stay."""
    layers = options.blocks
    if by == "uniform":
        return [i * layers // keep for i in range(keep)]
    if by == "random":
        return sorted(random.Random(f"{seed}/{keep}").sample(range(layers), keep))
    if by == "authors":
        return highest(read_json(_made(place, options, seed, "authors"))["rule"], keep)
    if by in ("importance", "loss", "contiguous"):
        importance = Importance.load(_made(place, options, seed, "importance"))
        if by == "contiguous":
            return contiguous(importance.cosine, keep)
        return choose(None, layers, keep, by, importance=importance).kept
    pipe, batches = calibrated(place, options, seed)
    return choose(pipe.transformer, layers, keep, by, batches=batches, seed=seed, flow_shift=pipe.flow_shift).kept


def contiguous(importance: Sequence[float], keep: int) -> list[int]:
    """The blocks outside that run of neighbours which has the least importance in all."""
    layers = len(importance)
    first = min(range(keep + 1), key=lambda i: sum(importance[i : i + layers - keep]))
    return [i for i in range(layers) if not first <= i < first + layers - keep]


def pruned(place: Place, options: Options, by: str, keep: int, seed: int) -> dict[str, Any]:
    kept = chosen(place, options, by, keep, seed)
    with replacing(_made(place, options, seed, f"kept-{by}-{keep}")) as path:
        path.write_text(json.dumps({"kept": kept}) + "\n", encoding="utf-8")
    return {"by": by, "keep": keep, "seed": seed, "kept": kept} | _judged(place, options, kept, seed, None)


def healed(place: Place, options: Options, by: str, keep: int, seed: int) -> dict[str, Any]:
    kept = read_json(_made(place, options, seed, f"kept-{by}-{keep}"))["kept"]
    healing = Healing(options.heal, seed=seed, distill=options.distill)
    return {"by": by, "keep": keep, "seed": seed} | _judged(place, options, kept, seed, healing)


def _judged(place: Place, options: Options, kept: list[int], seed: int, heal: Healing | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        target = Path(work, "pruned")
        prune_folder(
            source_folder(place, options, seed), target, by="indices", indices=kept, heal=heal, device=place.device
        )
        model = load_transformer(target / "transformer").to(place.device)
        return {
            "scores": scores(target, options.recipe, place.device, options.n),
            "loss": held_out_loss(model, options.recipe, place),
        }


def healing_flops(options: Options, keep: int) -> float:
    """FLOPs of healing: a step of the student, and the source's forward pass as its teacher."""
    samples = options.heal * BATCH * NOISES / options.recipe.batch
    return samples * (
        step_flops(Run("", 0, keep), options.recipe) + step_flops(Run("", 0, options.blocks), options.recipe) / 3
    )


def comparison(options: Options, keep: int, seed: int) -> tuple[Run, int]:
    """A run from scratch at the pruned depth, and the mark at which it has had the compute of source and healing."""
    run = Run(f"depth_{keep}", seed, keep)
    total = flops(source(options, seed), options.mark, options.recipe) + healing_flops(options, keep)
    return run, round(total / step_flops(run, options.recipe) / (1 + options.recipe.decay_part))


def cells(options: Options) -> list[Cell]:
    found, recipe = latents.cells(options.recipe.scenes), options.recipe
    for seed in options.seeds:
        found += run_cells(
            source(options, seed), (options.mark,), recipe, trunk_only=(options.mark // 4, options.mark // 2)
        )
        model, known = model_name(source(options, seed), options.mark), f"measured-{seed}"
        made = work_path(options, seed, "authors")
        found.append(Cell(known, partial(measured, options=options, seed=seed), (model,), made))
        for keep in options.keep:
            for by in options.by:
                given: dict[str, Any] = {"options": options, "by": by, "keep": keep, "seed": seed}
                name, made = f"pruned-{by}-{keep}-{seed}", work_path(options, seed, f"kept-{by}-{keep}")
                found.append(Cell(name, partial(pruned, **given), (known, model), made))
                found.append(Cell(f"healed-{by}-{keep}-{seed}", partial(healed, **given), (name, model)))
            run, mark = comparison(options, keep, seed)
            between = [m for m in range(TRUNK, mark, TRUNK) if mark - m > TRUNK // 4]
            found += run_cells(run, (mark,), recipe, trunk_only=between)
    return found


def recovered(
    whole: NDArray[np.float64], pruned: NDArray[np.float64], healed: NDArray[np.float64], tags: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Values with 95 % intervals of a bootstrap that draws prompts within their categories, and seeds.

    Args:
        whole: [seeds, P] score of each prompt before pruning. pruned, healed: [seeds, P].

    Returns:
        "pruned", "healed": scores; "lost": before minus pruned; "recovered": (healed - pruned) / (before - pruned), NaN
        where nothing is lost.
    """
    rng = np.random.default_rng(0)
    kinds, found = np.array(tags), []
    for draw in range(DRAWS + 1):
        seeds, rows = np.arange(len(pruned)), np.arange(len(tags))
        if draw:
            seeds = rng.integers(len(pruned), size=len(pruned))
            rows = np.concatenate(
                [rng.choice(np.flatnonzero(kinds == t), (kinds == t).sum()) for t in dict.fromkeys(tags)]
            )
        drawn = [tags[int(i)] for i in rows]
        before, after, again = (float(overall(x[seeds][:, rows].mean(0), drawn)) for x in (whole, pruned, healed))
        lost = before - after
        found.append((after, again, lost, (again - after) / lost if lost else np.nan))
    table = np.array(found)
    names = ("pruned", "healed", "lost", "recovered")
    return {name: (float(column[0]), *_interval(column[1:])) for name, column in zip(names, table.T)}


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    there = values[~np.isnan(values)]
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    return float(low), float(high)


def report(options: Options, results: Results, folder: Path) -> Report:
    tags = [e["tag"] for e in test_prompts(options.recipe)]
    seeds = [s for s in options.seeds if f"measured-{s}" in results]
    if not seeds:
        return Report("No model before pruning is scored yet.")
    before = [results[f"measured-{s}"] for s in seeds]
    whole = [float(overall(np.array(b["whole"]), tags)) for b in before]
    lines = [
        f"{options.blocks} blocks of width {options.recipe.width}; {len(tags)} prompts, {options.n} images each; healing: "
        f"{options.heal} steps of {BATCH} scenes at {NOISES} noise levels, distillation {options.distill:g}. Before "
        f"pruning: score {shown(whole)}, loss {shown([b['loss'] for b in before], 4)}. Scores: 95 % intervals of a "
        "bootstrap over prompts and seeds; losses: means over seeds.",
        "",
        "| blocks | by | seeds | pruned | healed | part of the loss recovered | held-out loss, pruned | healed |",
        "|---" * 8 + "|",
    ]
    points: dict[str, dict[int, tuple[float, float, float]]] = {}
    for keep in options.keep:
        for by in options.by:
            there = [s for s in seeds if f"healed-{by}-{keep}-{s}" in results]
            if not there:
                continue
            rows = [[results[f"{what}-{by}-{keep}-{s}"] for s in there] for what in ("pruned", "healed")]
            cut, again = (np.array([r["scores"] for r in row]) for row in rows)
            numbers = recovered(np.array([results[f"measured-{s}"]["whole"] for s in there]), cut, again, tags)
            spread = " | ".join(_shown(*numbers[name]) for name in ("pruned", "healed", "recovered"))
            losses = " | ".join(shown([r["loss"] for r in row], 4) for row in rows)
            lines.append(f"| {keep} | {by} | {len(there)} | {spread} | {losses} |")
            points.setdefault(by, {})[keep] = numbers["healed"]
        lines += _compared(options, results, keep)
    return Report("\n".join(lines), partial(_draw, float(np.mean(whole)), points))


def _shown(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} - {high:.3f})" if np.isfinite(value) else "-"


def _compared(options: Options, results: Results, keep: int) -> list[str]:
    """The row of models of that depth from scratch with the compute of source and healing."""
    runs = [comparison(options, keep, s) for s in options.seeds]
    there = [results[model_name(*pair)] for pair in runs if model_name(*pair) in results]
    if not there:
        return []
    steps = steps_of(runs[0][1], options.recipe)
    score, loss = shown([r["score"] for r in there]), shown([r["loss"] for r in there], 4)
    return [f"| {keep} | from scratch, {steps} steps | {len(there)} | - | {score} | - | - | {loss} |"]


def _draw(whole: float, points: dict[str, dict[int, tuple[float, float, float]]], path: Path) -> None:
    with axes_of(path, xlabel="blocks that stay", ylabel="score after healing") as axes:
        for number, (by, row) in enumerate(points.items()):
            blocks = np.array(sorted(row)) + 0.08 * number
            value, low, high = np.array([row[k] for k in sorted(row)]).T
            error = [value - low, high - value]
            axes.errorbar(blocks, value, yerr=error, fmt="o-", label=by, linewidth=1, markersize=3)
        axes.axhline(whole, color="gray", linewidth=0.8, label="before pruning")


EXPERIMENT = Experiment("pruning", BUDGETS, cells, report)
