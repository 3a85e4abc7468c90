"""Measures what growth in depth saves: a base grown to three times its depth against that depth from scratch.

The base has 4 blocks; partial preservation and the other strategies grow its trunk to 12 and train on. Late expansion
begins with one block and is grown when most of the steps are done. All arms of a seed see the same scenes and noise.
The loss is the flow loss of scenes that no run trains on, the score the exact checker's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sana_ext.optim

from ..model.transformer import SanaTransformer
from . import latents
from .figure import panels_of
from .grid import Cell, Experiment, Report, Results
from .intervals import crossing, over_seeds, shown
from .judging import Recipe
from .trajectory import Method, Origin, Run, groups_of, model_name, run_cells, step_flops, steps_of

#: Arms of one seed -> arguments of growth from the base. `drop_one` leaves out its last block, as the paper does its last two.
ABLATIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "drop_one": (("strategy", "partial_preservation"), ("keep", 3)),
    "interleave": (("strategy", "interleave"),),
    "cyclic": (("strategy", "cyclic"),),
    "block_replication": (("strategy", "block_replication"),),
    "stack": (("strategy", "stack"),),
    "new_blocks_faster": (("strategy", "partial_preservation"), ("keep", 4)),
    "came8bit": (("strategy", "partial_preservation"), ("keep", 4)),
    "longer_base": (("strategy", "partial_preservation"), ("keep", 4)),
}
PRESERVED = (("strategy", "partial_preservation"), ("keep", 4))
LONGER = 2  # steps of the base over those of the others, in the arm of that name
FASTER = 2.0  # rate of new blocks over that of old ones, in the arm of that name
CAME_RATE = 1 / 3  # of AdamW's: CAME's updates have rms 1, AdamW's mostly less


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        marks: steps at which base and scratch are judged. grown: the same for grown arms, counted from growth.
        late: steps of the one block of late expansion before it is grown, of `marks[-1]` in all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    base: int = 4
    layers: int = 12
    marks: tuple[int, ...] = (500, 1000, 2000)
    grown: tuple[int, ...] = (250, 500, 1000, 2000)
    late: int = 1600
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    ablation_marks: tuple[int, ...] = (250, 1000)
    recipe: Recipe = field(default_factory=Recipe)


TINY = Recipe(scenes=128, batch=4, judged=64, every=60, sampler_steps=2)
BUDGETS = {
    "smoke": Options(
        seeds=(0,), base=1, layers=2, marks=(1, 2), grown=(1, 2), late=1, ablations=("cyclic",), ablation_marks=(1,),
        recipe=TINY,
    ),
    "small": Options(seeds=(0,), ablations=("interleave",)),
    "full": Options(),
}  # fmt: skip


def base(options: Options, seed: int) -> Run:
    return Run("base", seed, options.base)


def scratch(options: Options, seed: int) -> Run:
    return Run("scratch", seed, options.layers)


def grown(options: Options, seed: int, name: str = "partial_preservation") -> Run:
    """An arm that begins with the base's last trunk; its marks count from there."""
    growth = dict(ABLATIONS.get(name, PRESERVED))
    growth = {k: min(v, options.base) if k == "keep" else v for k, v in growth.items()}
    mark = options.marks[-1] * (LONGER if name == "longer_base" else 1)
    start = Origin(base(options, seed), mark, tuple(growth.items()))
    lr = CAME_RATE if name == "came8bit" else 1.0
    return Run(name, seed, options.layers, start, lr=lr, new_rate=FASTER if name == "new_blocks_faster" else 1.0)


def late(options: Options, seed: int) -> tuple[Run, Run]:
    """The one block, and what it is grown to; steps are counted through."""
    one = Run("one_block", seed, 1)
    start = Origin(one, options.late, (("strategy", "partial_preservation"), ("keep", 1)))
    return one, Run("late_expansion", seed, options.layers, start, first=options.late)


def came8bit(model: SanaTransformer, recipe: Recipe, run: Run) -> Any:
    return sana_ext.optim.CAME8bit(groups_of(model, run), lr=recipe.lr, bias_correction=True)


def cells(options: Options) -> list[Cell]:
    found, recipe = latents.cells(options.recipe.scenes), options.recipe
    for seed in options.seeds:
        longer = "longer_base" in options.ablations and seed == options.seeds[0]
        on = (LONGER * options.marks[-1],) if longer else ()
        found += run_cells(base(options, seed), options.marks, recipe, trunk_only=on)
        found += run_cells(scratch(options, seed), options.marks, recipe)
        found += run_cells(grown(options, seed), options.grown, recipe)
        one, expanded = late(options, seed)
        found += run_cells(one, (), recipe, trunk_only=(options.late,))
        found += run_cells(expanded, options.marks[-1:], recipe)
    for name in options.ablations:
        method = Method(make=came8bit) if name == "came8bit" else Method()
        found += run_cells(grown(options, options.seeds[0], name), options.ablation_marks, recipe, method)
    return found


@dataclass(frozen=True)
class Arm:
    """An arm's runs, the marks at which they are judged, and the large model's steps behind each."""

    name: str
    runs: tuple[Run, ...]
    marks: tuple[int, ...]

    def values(self, results: Results, mark: int, key: str) -> list[float]:
        names = [model_name(run, mark) for run in self.runs]
        return [results[name][key] for name in names if name in results]

    def steps(self, mark: int, recipe: Recipe) -> int:
        """Steps at the arm's own depth."""
        return steps_of(mark, recipe) - self.runs[0].first


def arms(options: Options) -> list[Arm]:
    seeds = options.seeds
    return [
        Arm("base", tuple(base(options, s) for s in seeds), options.marks),
        Arm("scratch", tuple(scratch(options, s) for s in seeds), options.marks),
        Arm("partial_preservation", tuple(grown(options, s) for s in seeds), options.grown),
        Arm("late_expansion", tuple(late(options, s)[1] for s in seeds), options.marks[-1:]),
        *(Arm(name, (grown(options, seeds[0], name),), options.ablation_marks) for name in options.ablations),
    ]


def report(options: Options, results: Results, folder: Path) -> Report:
    recipe = options.recipe
    unit = step_flops(scratch(options, 0), recipe) * steps_of(options.marks[-1], recipe)
    lines = [
        f"Width {recipe.width}, batch {recipe.batch}, AdamW at {recipe.lr:g}; base {options.base} blocks, all others "
        f"{options.layers}. A model of a mark is the trunk's, its rate let fall to zero over {recipe.decay_part:.0%} more "
        f"steps, which are counted. Compute 1 is that of scratch at its last mark; a grown arm's includes its source's.",
        "",
        "| arm | steps at its depth | compute | seeds | held-out loss | score |",
        "|---" * 6 + "|",
    ]
    for arm in arms(options):
        for mark in arm.marks:
            if losses := arm.values(results, mark, "loss"):
                cost = arm.values(results, mark, "flops")[0] / unit
                lines.append(
                    f"| {arm.name} | {arm.steps(mark, recipe)} | {cost:.3f} | {len(losses)} | {shown(losses, 4)} | "
                    f"{shown(arm.values(results, mark, 'score'))} |"
                )
    lines += ["", *saved(options, results)]
    return Report("\n".join(lines), partial(_draw, options, results, unit))


def saved(options: Options, results: Results) -> list[str]:
    """Says how many steps and how much compute growth needs to the losses of scratch, and where late expansion ends."""
    recipe, last = options.recipe, options.marks[-1]
    _, whole, preserved, expanded, *_ = arms(options)
    lines = [
        "Partial preservation's way to the loss that scratch has at a mark, seed by seed; saved are steps at full depth, and "
        "compute with all of the base's counted.",
        "",
        "| to scratch's loss at | seeds | steps saved | compute saved | not reached |",
        "|---" * 5 + "|",
    ]
    for mark in options.marks:
        found, missed = _saved_at(options, results, preserved, whole, mark)
        if found or missed:
            more = "at least " if _reached_at_once(options, results, preserved, whole, mark) else ""
            steps, compute = (more + _percent([row[i] for row in found]) for i in range(2))
            lines.append(f"| {steps_of(mark, recipe)} steps | {len(found) + missed} | {steps} | {compute} | {missed} |")
    names = [tuple(model_name(run, last) for run in pair) for pair in zip(expanded.runs, whole.runs)]
    gaps = [
        results[own]["loss"] - results[other]["loss"] for own, other in names if own in results and other in results
    ]
    if gaps:
        lines += [
            "",
            f"Late expansion, {options.late} of {last} steps with one block, ends {shown(gaps, 4, '+')} from scratch's loss.",
        ]
    return lines


def _saved_at(
    options: Options, results: Results, preserved: Arm, whole: Arm, mark: int
) -> tuple[list[tuple[float, float]], int]:
    """Shares of steps and compute saved by each seed, and how many seeds do not reach the loss."""
    found, missed = [], 0
    for own, target in zip(preserved.runs, whole.runs):
        names = [model_name(own, m) for m in options.grown]
        goal = results.get(model_name(target, mark))
        if goal is None or not all(name in results for name in names):
            continue
        losses = [results[name]["loss"] for name in names]
        steps = crossing([steps_of(m, options.recipe) for m in options.grown], losses, goal["loss"])
        compute = crossing([results[name]["flops"] for name in names], losses, goal["loss"])
        if steps is None or compute is None:
            missed += 1
        else:
            found.append((1 - steps / goal["steps"], 1 - compute / goal["flops"]))
    return found, missed


def _reached_at_once(options: Options, results: Results, preserved: Arm, whole: Arm, mark: int) -> bool:
    """Tells whether some seed is below scratch's loss at the first mark, so that what it saves is more than is told."""
    names = [(model_name(o, options.grown[0]), model_name(t, mark)) for o, t in zip(preserved.runs, whole.runs)]
    pairs = [(results[own]["loss"], results[other]["loss"]) for own, other in names if {own, other} <= results.keys()]
    return any(own <= other for own, other in pairs)


def _percent(values: Sequence[float]) -> str:
    return f"{shown([100 * v for v in values], 0)} %" if values else "-"


def _draw(options: Options, results: Results, unit: float, path: Path) -> None:
    shared = {"xlabel": "training compute (scratch = 1)", "xscale": "log"}
    kinds = ("loss", "score")
    labels = ("held-out flow loss", "score of the exact checker")
    with panels_of(path, [shared | {"ylabel": label} for label in labels]) as panels:
        for number, arm in enumerate(arms(options)):
            marks = [m for m in arm.marks if arm.values(results, m, "loss")]
            for axes, key in zip(panels, kinds):
                if not marks:
                    continue
                means, halves = zip(*(over_seeds(arm.values(results, m, key)) for m in marks))
                axes.errorbar(
                    [arm.values(results, m, "flops")[0] / unit for m in marks], means,
                    yerr=halves if max(halves) < 1 else None, fmt="o-" if len(arm.runs) > 1 else "x--",
                    color=f"C{number % 10}", label=arm.name, linewidth=1, markersize=3,
                )  # fmt: skip


EXPERIMENT = Experiment("growth", BUDGETS, cells, report)
