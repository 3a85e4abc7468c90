"""Measures what depth pruning costs the mini model, and how much of it a short healing brings back.

12 blocks to 8, 6 and 4 by each strategy; per seed (of calibration, choice and healing) the exact checker's score before
pruning, after it and after healing, on the same prompts and noise.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.config import SanaConfig
from ..model.folder import MINI
from ..pruning.folder import prune_folder
from ..pruning.healing import DISTILL, LR, LR_LIMIT, PLAIN_PART, Healing
from ..pruning.importance import Importance, block_importance
from ..pruning.removal import STRATEGIES, choose
from ..pruning.trajectory import CalibrationBatch, calibration, calibration_prompts
from ..sampling.pipeline import Pipeline
from ..scenes.checker import check
from ..scenes.testset import load
from ..storage.files import replacing
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results

DRAWS = 2000


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        keep: blocks that stay. every: every how many prompts of the test set. n: images per prompt.
        count: calibration prompts. heal: steps of healing, whose rates follow `rates` (they are the package's own).
    """

    by: tuple[str, ...] = tuple(s for s in STRATEGIES if s != "indices")
    keep: tuple[int, ...] = (8, 6, 4)
    seeds: tuple[int, ...] = (0,)
    every: int = 5
    n: int = 2
    steps: int = 20
    count: int = 100
    heal: int = 100
    distill: float = DISTILL
    rates: tuple[float, ...] = (LR, LR_LIMIT, PLAIN_PART)


BUDGETS = {
    "smoke": Options(by=("importance", "loss"), keep=(8,), every=60, n=1, steps=2, count=2, heal=1),
    "small": Options(by=("importance", "learned"), every=10),
    "full": Options(seeds=(0, 1, 2)),
}


def prompts(options: Options) -> list[dict[str, Any]]:
    return load()[:: options.every]


def scores(folder: Path, options: Options, device: str) -> list[float]:
    """Returns for every prompt the part of its images that the exact checker accepts."""
    entries = prompts(options)
    made = Pipeline.from_pretrained(folder, device=device)(
        [e["prompt"] for e in entries], n=options.n, seed=777, steps=options.steps, batch_size=64
    )
    return [float(np.mean([check(np.asarray(p), e).correct for p in images])) for e, images in zip(entries, made)]


def calibrated(options: Options, seed: int, device: str) -> tuple[Pipeline, Iterator[CalibrationBatch]]:
    pipe = Pipeline.from_pretrained(MINI, device=device)
    asked = calibration_prompts(pipe, None, options.count, seed)
    return pipe, calibration(pipe, asked, steps=options.steps, seed=seed)


def measured(place: Place, options: Options, seed: int) -> dict[str, Any]:
    """Measures importance and loss of the blocks once, for all depths."""
    pipe, batches = calibrated(options, seed, place.device)
    with replacing(place.folder / f"importance-{seed}.json") as path:
        block_importance(pipe.transformer, batches).save(path)
    return {"seed": seed}


def searched(place: Place, options: Options, seed: int) -> dict[str, Any]:
    """Searches down to the fewest blocks: more blocks are on its way."""
    pipe, batches = calibrated(options, seed, place.device)
    choice = choose(
        pipe.transformer, pipe.config.num_layers, min(options.keep), "search", batches=batches, seed=seed,
        flow_shift=pipe.flow_shift,
    )  # fmt: skip
    with replacing(place.folder / f"searched-{seed}.json") as path:
        path.write_text(json.dumps(choice.removed) + "\n", encoding="utf-8")
    return {"seed": seed, "removed": choice.removed}


def chosen(place: Place, options: Options, by: str, keep: int, seed: int) -> list[int]:
    """The blocks that stay."""
    layers = SanaConfig.load(MINI / "transformer").num_layers
    if by == "search":
        removed = json.loads((place.folder / f"searched-{seed}.json").read_text(encoding="utf-8"))
        return sorted(set(range(layers)) - set(removed[: layers - keep]))
    if by in ("importance", "loss"):
        importance = Importance.load(place.folder / f"importance-{seed}.json")
        return choose(None, layers, keep, by, importance=importance).kept
    pipe, batches = calibrated(options, seed, place.device)
    return choose(pipe.transformer, layers, keep, by, batches=batches, seed=seed, flow_shift=pipe.flow_shift).kept


def pruned(place: Place, options: Options, by: str, keep: int, seed: int) -> dict[str, Any]:
    kept = chosen(place, options, by, keep, seed)
    with replacing(place.folder / f"kept-{by}-{keep}-{seed}.json") as path:
        path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    return {"by": by, "keep": keep, "seed": seed, "kept": kept, "pruned": _scored(place, options, kept, None)}


def healed(place: Place, options: Options, by: str, keep: int, seed: int) -> dict[str, Any]:
    kept = json.loads((place.folder / f"kept-{by}-{keep}-{seed}.json").read_text(encoding="utf-8"))
    healing = Healing(options.heal, seed=seed, distill=options.distill)
    return {"by": by, "keep": keep, "seed": seed, "healed": _scored(place, options, kept, healing)}


def _scored(place: Place, options: Options, kept: list[int], heal: Healing | None) -> list[float]:
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        target = Path(work, "pruned")
        prune_folder("mini", target, by="indices", indices=kept, heal=heal, device=place.device)
        return scores(target, options, place.device)


def cells(options: Options) -> list[Cell]:
    def whole(place: Place) -> dict[str, Any]:
        return {"whole": scores(MINI, options, place.device)}

    found = [Cell("whole", whole)]
    for seed in options.seeds:
        if {"importance", "loss"} & set(options.by):
            found.append(Cell(f"measured-{seed}", partial(measured, options=options, seed=seed)))
        if "search" in options.by:
            found.append(Cell(f"searched-{seed}", partial(searched, options=options, seed=seed)))
        for by in options.by:
            before = {"search": (f"searched-{seed}",), "learned": ()}.get(by, (f"measured-{seed}",))
            for keep in options.keep:
                given: dict[str, Any] = {"options": options, "by": by, "keep": keep, "seed": seed}
                found.append(Cell(f"pruned-{by}-{keep}-{seed}", partial(pruned, **given), before))
                after = (f"pruned-{by}-{keep}-{seed}",)
                found.append(Cell(f"healed-{by}-{keep}-{seed}", partial(healed, **given), after))
    return found


def overall(values: NDArray[np.float64], tags: Sequence[str]) -> NDArray[np.float64]:
    """The mean of the categories' means over the last axis."""
    kinds = np.array(tags)
    return np.mean([values[..., kinds == tag].mean(-1) for tag in dict.fromkeys(tags)], axis=0)


def recovered(
    whole: NDArray[np.float64], pruned: NDArray[np.float64], healed: NDArray[np.float64], tags: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """Values with 95 % intervals of a bootstrap that draws prompts within their categories, and seeds.

    Args:
        whole: [P] score of each prompt before pruning. pruned, healed: [seeds, P].

    Returns:
        "pruned", "healed": scores; "lost": before minus pruned; "recovered": (healed - pruned) / (before - pruned).
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
        before = float(overall(whole[rows], drawn))
        after, again = (float(overall(x[seeds][:, rows].mean(0), drawn)) for x in (pruned, healed))
        lost = before - after
        found.append((after, again, lost, (again - after) / lost if lost else np.nan))
    table = np.array(found)
    low, high = np.nanquantile(table[1:], [0.025, 0.975], axis=0)
    names = ("pruned", "healed", "lost", "recovered")
    return {name: (float(table[0, i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}


def report(options: Options, results: Results, folder: Path) -> Report:
    if "whole" not in results:
        return Report("The model before pruning is not scored yet.")
    tags = [e["tag"] for e in prompts(options)]
    whole = np.array(results["whole"]["whole"])
    lines = [
        f"{len(tags)} prompts (every {options.every}th of the test set), {options.n} images each, {options.steps} steps; "
        f"healing: {options.heal} steps, distillation {options.distill:g}. Before pruning: {overall(whole, tags):.3f}.",
        "",
        "| blocks | by | seeds | pruned | healed | lost | part of it recovered |",
        "|---" * 7 + "|",
    ]
    points: dict[str, dict[int, tuple[float, float, float]]] = {}
    for keep in options.keep:
        for by in options.by:
            both = [
                (results[f"pruned-{by}-{keep}-{s}"]["pruned"], results[f"healed-{by}-{keep}-{s}"]["healed"])
                for s in options.seeds
                if f"healed-{by}-{keep}-{s}" in results
            ]
            if not both:
                continue
            cut, again = (np.array(rows) for rows in zip(*both))
            numbers = recovered(whole, cut, again, tags)
            shown = " | ".join(f"{v:.3f} ({a:.3f} - {b:.3f})" for v, a, b in numbers.values())
            lines.append(f"| {keep} | {by} | {len(both)} | {shown} |")
            points.setdefault(by, {})[keep] = numbers["healed"]
    return Report("\n".join(lines), partial(_draw, float(overall(whole, tags)), points))


def _draw(whole: float, points: dict[str, dict[int, tuple[float, float, float]]], path: Path) -> None:
    with axes_of(path, xlabel="blocks that stay", ylabel="score after healing") as axes:
        for number, (by, row) in enumerate(points.items()):
            blocks = np.array(sorted(row)) + 0.08 * number
            value, low, high = np.array([row[k] for k in sorted(row)]).T
            error = [value - low, high - value]
            axes.errorbar(blocks, value, yerr=error, fmt="o-", label=by, linewidth=1, markersize=3)
        axes.axhline(whole, color="gray", linewidth=0.8, label="before pruning")


EXPERIMENT = Experiment("pruning", BUDGETS, cells, report)
