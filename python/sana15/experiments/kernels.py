"""Trains the same model with stock PyTorch ops and with these kernels: the loss curves, and the wall time of both.

Three models with the same first weights see the same batches: diffusers' transformer as it is, the same with its blocks
patched, and sana15's. Their steps alternate, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sana_ext

from ..training.distillation import training_loss
from ..training.loop import fit
from . import latents
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results
from .growth import TINY
from .intervals import shown
from .judging import FLOW_SHIFT, Recipe
from .trajectory import CAPTION_DROP, CLIP, WARMUP, scratch

KINDS = ("diffusers", "patched", "sana15")
STEADY = 10  # first steps, whose time is not counted


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment; `steps` of every model, batches of `recipe.batch`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 12
    steps: int = 300
    recipe: Recipe = field(default_factory=Recipe)


BUDGETS = {
    "smoke": Options(seeds=(0,), layers=1, steps=2, recipe=TINY),
    "small": Options(seeds=(0,), steps=100),
    "full": Options(),
}


def trained(place: Place, options: Options, seed: int) -> dict[str, Any]:
    """Trains the three models, step by step in turn."""
    from diffusers import SanaTransformer2DModel

    recipe = options.recipe
    ours = scratch(options.layers, recipe.width, seed).to(place.device)
    found: dict[str, Any] = {"sana15": ours}
    for kind in ("diffusers", "patched"):
        model = SanaTransformer2DModel.from_config(ours.config.to_dict()).to(place.device).train()
        model.load_state_dict(ours.state_dict())
        found[kind] = model
    sana_ext.patch(found["patched"])
    optimizers = {
        kind: torch.optim.AdamW(found[kind].parameters(), betas=(0.9, 0.99), weight_decay=0.0) for kind in KINDS
    }
    data = latents.load(place.common, recipe.scenes, place.device)
    losses: dict[str, list[float]] = {kind: [] for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for step in range(options.steps):
        for kind in KINDS[step % 3 :] + KINDS[: step % 3]:
            began = time.perf_counter()
            fit(
                _loss_of(kind, found[kind], data, recipe), list(found[kind].parameters()), optimizers[kind], [step],
                seed=seed, rate=lambda step: recipe.lr * min(1.0, (step + 1) / WARMUP), clip=CLIP,
                done=partial(_note, losses[kind]),
            )  # fmt: skip
            seconds[kind].append(time.perf_counter() - began)
    steady = STEADY if options.steps > 2 * STEADY else 0
    return {"seed": seed, "losses": losses, "ms": {k: 1e3 * statistics.median(s[steady:]) for k, s in seconds.items()}}


def _note(losses: list[float], step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
    losses.append(loss.item())


def _loss_of(kind: str, model: nn.Module, data: latents.Latents, recipe: Recipe) -> Callable[..., torch.Tensor]:
    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x0, text, mask = data.batch(recipe.batch, CAPTION_DROP, generator)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if kind == "sana15":
                return model(x, text, t, mask)
            return model(x, text, t, encoder_attention_mask=mask, return_dict=False)[0]

        return training_loss(
            velocity,
            x0,
            generator,
            flow_shift=FLOW_SHIFT,
            stratified=True,
            flow_weight=1.0,
            distillation=None,
            distill=0.0,
        )

    return loss


def cells(options: Options) -> list[Cell]:
    found = latents.cells(options.recipe.scenes)
    after = tuple(cell.name for cell in found)
    return [*found, *(Cell(f"trained-{s}", partial(trained, options=options, seed=s), after) for s in options.seeds)]


def report(options: Options, results: Results, folder: Path) -> Report:
    there = [results[f"trained-{s}"] for s in options.seeds if f"trained-{s}" in results]
    last = max(options.steps // 4, 1)
    lines = [
        f"{options.layers} blocks of width {options.recipe.width}, batch {options.recipe.batch}, fp32, AdamW, {options.steps} "
        f"steps. Loss: mean of the last {last} steps. Time: the median step, as a ratio to diffusers' of the same run.",
        "",
        "| ops | seeds | loss | minus diffusers, paired | step, ms | time over diffusers' |",
        "|---" * 6 + "|",
    ]
    for kind in KINDS:
        if there:
            means = [statistics.fmean(r["losses"][kind][-last:]) for r in there]
            paired = [m - statistics.fmean(r["losses"]["diffusers"][-last:]) for m, r in zip(means, there)]
            ratios = [r["ms"][kind] / r["ms"]["diffusers"] for r in there]
            row = (shown(means, 5), shown(paired, 6, "+"), f"{there[0]['ms'][kind]:.1f}", shown(ratios))
            lines.append(f"| {kind} | {len(there)} | {' | '.join(row)} |")
    return Report("\n".join(lines), partial(_draw, there))


def _draw(there: list[dict[str, Any]], path: Path) -> None:
    with axes_of(path, xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log") as axes:
        for number, kind in enumerate(KINDS):
            for place, result in enumerate(there):
                values = result["losses"][kind]
                means = [statistics.fmean(values[i : i + 10]) for i in range(0, len(values), 10)]
                axes.plot(
                    [10 * i for i in range(len(means))], means, ("-", "--", ":")[number], color=f"C{place}",
                    label=kind if place == 0 else None, linewidth=1,
                )  # fmt: skip


EXPERIMENT = Experiment("kernels", BUDGETS, cells, report)
