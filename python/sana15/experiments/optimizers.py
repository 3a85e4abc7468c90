"""Do the 8-bit optimizers learn as their fp32 forms do, does CAME differ from AdamW, and what do 16-bit weights lose?

Small models from scratch, several seeds; for one seed every arm sees the same first weights, scenes, noise and noise levels,
so losses are compared seed by seed. Each optimizer's rate is the best of a few, found on a seed that is not reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sana_ext.optim

from ..model.transformer import SanaTransformer
from . import latents
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results
from .growth import TINY
from .intervals import shown
from .judging import Recipe
from .muon import Muon, state_bytes
from .trajectory import Method, Run, groups_of, model_name, run_cells, steps_of, trunk_name
from .trajectory import scratch as scratch_model
from .weights16 import Weights16

CAME_BETAS = (0.9, 0.999, 0.9999)
ADAM_BETAS = (0.9, 0.99)
#: Of a model that is tried at a rate, its seed.
TRIAL_SEED = 77

Make = Callable[[SanaTransformer, Recipe, Run], torch.optim.Optimizer]


def _adamw(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(model, run), lr=recipe.lr, betas=ADAM_BETAS, weight_decay=0.0)


def _adamw8bit(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return sana_ext.optim.AdamW8bit(groups_of(model, run), lr=recipe.lr, betas=ADAM_BETAS, weight_decay=0.0)


def _came(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return sana_ext.optim.CAME8bit(groups_of(model, run), lr=recipe.lr, betas=CAME_BETAS, code=None)


def _came8bit(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return sana_ext.optim.CAME8bit(groups_of(model, run), lr=recipe.lr, betas=CAME_BETAS)


def _muon(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return Muon(model, recipe.lr)


def _muon8bit(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return Muon(model, recipe.lr, bits=8)


def _weights(make: Make, kept: int, by_chance: bool = False) -> Method:
    return Method(make, lambda model, run: Weights16(model, run, kept, by_chance).hooks())


#: Arm -> how it trains. The last four have 16-bit weights in the forward pass, and keep 16, 16, 24 or 32 bits of them.
METHODS = {
    "adamw": Method(_adamw),
    "adamw8bit": Method(_adamw8bit),
    "came": Method(_came),
    "came8bit": Method(_came8bit),
    "muon": Method(_muon),
    "muon8bit": Method(_muon8bit),
    "came8bit_bf16_nearest": _weights(_came8bit, 16),
    "came8bit_bf16_by_chance": _weights(_came8bit, 16, by_chance=True),
    "came8bit_24_bits": _weights(_came8bit, 24),
    "came8bit_bf16_master": _weights(_came8bit, 32),
}
ARMS_32 = ("adamw", "adamw8bit", "came", "came8bit", "muon", "muon8bit")
#: Rates over the recipe's: the best of the trials in the report.
RATES = {"adamw": 2.0, "came": 0.5, "muon": 2.0}


def rate_of(arm: str) -> float:
    return RATES[family(arm)]


def compared(arm: str) -> str:
    """Returns the arm that an arm's loss is set against: the fp32 form, or fp32 weights."""
    return family(arm) if arm in ARMS_32 else "came8bit"


def family(arm: str) -> str:
    """Returns the fp32 optimizer whose rate an arm takes."""
    return next(name for name in RATES if arm.startswith(name))


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        rates: over the recipe's, tried for each of adamw, came and muon, `trial` steps each. marks: steps at which models are judged.
        timed: steps whose time is taken, alternating between the optimizers.
    """

    arms: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 4
    rates: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    trial: int = 500
    marks: tuple[int, ...] = (500, 2000)
    timed: int = 20
    recipe: Recipe = field(default_factory=Recipe)


BUDGETS = {
    "smoke": Options(
        arms=("came", "came8bit", "muon8bit", "came8bit_bf16_by_chance"), seeds=(0,), layers=1, rates=(1.0,), trial=1,
        marks=(2,), timed=1, recipe=TINY,
    ),
    "small": Options(seeds=(0,), marks=(500,), trial=200),
    "full": Options(),
}  # fmt: skip


def trial(options: Options, name: str, rate: float) -> Run:
    return Run(f"rate-{name}-{rate:g}", TRIAL_SEED, options.layers, lr=rate)


def run_of(options: Options, arm: str, seed: int) -> Run:
    return Run(f"optimizer-{arm}", seed, options.layers, lr=rate_of(arm))


def timed(place: Place, options: Options) -> dict[str, Any]:
    """Medians over steps of the update alone, in milliseconds, and bytes of state a parameter; optimizers alternate."""
    models: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    for arm in options.arms:
        if arm not in ARMS_32:
            continue
        model = scratch_model(options.layers, options.recipe.width, 0)
        models[arm], times[arm] = (model, METHODS[arm].make(model, options.recipe, run_of(options, arm, 0))), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.timed + 1):
        for arm, (model, optimizer) in models.items():
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            began = time.perf_counter()
            optimizer.step()
            times[arm].append(time.perf_counter() - began)
    weights = sum(p.numel() for p in next(iter(models.values()))[0].parameters())
    return {
        arm: {"ms": 1e3 * sorted(t[1:])[len(t[1:]) // 2], "bytes": state_bytes(models[arm][1]) / weights}
        for arm, t in times.items()
    }


def cells(options: Options) -> list[Cell]:
    found, recipe = latents.cells(options.recipe.scenes), options.recipe
    for name in dict.fromkeys(map(family, options.arms)):
        for rate in options.rates:
            found += run_cells(trial(options, name, rate), (options.trial,), recipe, METHODS[name])
    for seed in options.seeds:
        for arm in options.arms:
            found += run_cells(run_of(options, arm, seed), options.marks, recipe, METHODS[arm])
    return [*found, Cell("timed", partial(timed, options=options))]


def report(options: Options, results: Results, folder: Path) -> Report:
    """Losses at every mark, each arm's difference from its fp32 form of the same seed, state and time."""
    recipe, timing = options.recipe, results.get("timed", {})
    lines = [
        f"{options.layers} blocks of width {recipe.width}, batch {recipe.batch}; held-out flow loss, means over seeds with "
        "95 % intervals; the differences are paired by seed. Each family takes the best rate of its trials.",
        "",
        "| arm | rate | seeds | " + " | ".join(f"{steps_of(m, recipe)} steps" for m in options.marks)
        + " | minus its fp32 form | state, bytes a weight | step, ms |",
        "|---" * (6 + len(options.marks)) + "|",
    ]  # fmt: skip
    last = options.marks[-1]
    for arm in options.arms:
        values = {m: _losses(options, results, arm, m) for m in options.marks}
        own, base = values[last], _losses(options, results, compared(arm), last)
        paired = [own[s] - base[s] for s in own if s in base] if arm != compared(arm) else []
        cost = timing.get(arm)
        row = [arm, f"{recipe.lr * rate_of(arm):g}", str(len(own))]
        row += [shown(list(values[m].values()), 4) for m in options.marks]
        row += [shown(paired, 4, "+"), f"{cost['bytes']:.2f}" if cost else "-", f"{cost['ms']:.2f}" if cost else "-"]
        lines.append(f"| {' | '.join(row)} |")
    both = [_losses(options, results, name, last) for name in ("came", "adamw")]
    if paired := [both[0][s] - both[1][s] for s in both[0] if s in both[1]]:
        lines += ["", f"CAME minus AdamW, paired: {shown(paired, 4, '+')}."]
    lines += ["", f"Held-out loss after {steps_of(options.trial, recipe)} steps, seed {TRIAL_SEED}, by rate:", ""]
    lines += [
        "| | " + " | ".join(f"{r * recipe.lr:g}" for r in options.rates) + " |",
        "|---" * (1 + len(options.rates)) + "|",
    ]
    for name in dict.fromkeys(map(family, options.arms)):
        names = [model_name(trial(options, name, rate), options.trial) for rate in options.rates]
        row = [f"{results[n]['loss']:.4f}" if n in results else "-" for n in names]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return Report("\n".join(lines), partial(_draw, options, results))


def _losses(options: Options, results: Results, arm: str, mark: int) -> dict[int, float]:
    names = {seed: model_name(run_of(options, arm, seed), mark) for seed in options.seeds}
    return {seed: results[name]["loss"] for seed, name in names.items() if name in results}


def _draw(options: Options, results: Results, path: Path) -> None:
    with axes_of(path, xlabel="step of the trunk", ylabel="training loss, mean of 50 steps", yscale="log") as axes:
        for number, arm in enumerate(options.arms):
            run = run_of(options, arm, options.seeds[0])
            names = [trunk_name(run, mark) for mark in options.marks]
            losses = [loss for name in names if name in results for loss in results[name]["losses"]]
            style = "--" if "bit" in arm or "bf16" in arm else "-"
            axes.plot(
                [50 * (i + 1) for i in range(len(losses))], losses, style, color=f"C{number}", label=arm, linewidth=0.8
            )


EXPERIMENT = Experiment("optimizers", BUDGETS, cells, report)
