"""Does CAME with an 8-bit first moment learn as CAME with an fp32 one does? The mini model's first steps, several seeds.

Every optimizer sees the same batches, noise and initial weights for the same seed, so losses are compared seed by seed.
Each cell is a run of `sana15 train` itself.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..model.folder import MINI
from ..training.config import load_config
from ..training.run import train
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results

#: lr and betas: AdamW's of configs/mini.yaml; CAME's betas from its paper, its rate the best of three tried with fp32.
SETTINGS = {
    "adamw": (1.5e-3, [0.9, 0.99]),
    "adamw8bit": (1.5e-3, [0.9, 0.99]),
    "came": (5e-4, [0.9, 0.999, 0.9999]),
    "came8bit": (5e-4, [0.9, 0.999, 0.9999]),
}
#: Of the steps, the last part over which the loss is averaged.
LAST = 0.25


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment. `compile` pays from a few hundred steps on."""

    optimizers: tuple[str, ...] = tuple(SETTINGS)
    seeds: tuple[int, ...] = (0,)
    steps: int = 400
    batch: int = 32
    compile: bool = False


BUDGETS = {
    "smoke": Options(steps=2, batch=2),
    "small": Options(steps=200),
    "full": Options(seeds=(0, 1, 2)),
}


def trained(place: Place, options: Options, optimizer: str, seed: int) -> dict[str, Any]:
    """Trains with one optimizer and returns the losses that its run logged, by step."""
    lr, betas = SETTINGS[optimizer]
    out = place.folder / f"{optimizer}-{seed}"
    given = {
        "out": out, "optimizer": optimizer, "lr": lr, "betas": betas, "seed": seed, "steps": options.steps,
        "batch_size": options.batch, "warmup": options.steps // 10, "precision": "bf16", "device": place.device,
        "save_every": max(options.steps // 2, 1), "sample_every": 10 * options.steps, "sample_steps": 1,
        "log_every": 10, "ema": 0.99, "transformer.autoencoder": MINI / "vae",
        "transformer.text_encoder": MINI / "text_encoder", "transformer.flow_shift": 2.0,
        "transformer.compile": str(options.compile).lower(),
    }  # fmt: skip
    train(load_config(None, [f"{key}={value}" for key, value in given.items()]))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"optimizer": optimizer, "seed": seed, "losses": {r["step"]: r["loss"] for r in lines if "loss" in r}}


def cells(options: Options) -> list[Cell]:
    return [
        Cell(f"{optimizer}-{seed}", partial(trained, options=options, optimizer=optimizer, seed=seed))
        for seed in options.seeds
        for optimizer in options.optimizers
    ]


def report(options: Options, results: Results, folder: Path) -> Report:
    """Final loss by seed, and the difference to fp32 CAME of the same seed against the spread over seeds."""
    curves = {(r["optimizer"], r["seed"]): {int(s): v for s, v in r["losses"].items()} for r in results.values()}
    final = {
        key: statistics.fmean(v for step, v in curve.items() if step > (1 - LAST) * max(curve))
        for key, curve in curves.items()
    }
    lines = [
        f"Mean loss of the last quarter of {options.steps} steps, batch {options.batch}.",
        "",
        "| optimizer | loss by seed | mean | standard deviation over seeds | minus fp32 CAME, by seed |",
        "|---" * 5 + "|",
    ]
    for optimizer in options.optimizers:
        seeds = [seed for seed in options.seeds if (optimizer, seed) in final]
        if not seeds:
            continue
        values = [final[optimizer, seed] for seed in seeds]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
        base = [f"{final[optimizer, s] - final['came', s]:+.4f}" for s in seeds if ("came", s) in final]
        by_seed = ", ".join(f"{v:.4f}" for v in values)
        lines.append(f"| {optimizer} | {by_seed} | {statistics.fmean(values):.4f} | {spread} | {', '.join(base)} |")
    return Report("\n".join(lines), partial(_draw, options, curves))


def _draw(options: Options, curves: dict[tuple[str, int], dict[int, float]], path: Path) -> None:
    with axes_of(path, xlabel="step", ylabel="flow loss, mean of 10 steps", yscale="log") as axes:
        for number, optimizer in enumerate(options.optimizers):
            for place, seed in enumerate(s for s in options.seeds if (optimizer, s) in curves):
                curve = curves[optimizer, seed]
                style = "--" if optimizer.endswith("8bit") else "-"
                label = optimizer if place == 0 else None
                axes.plot(list(curve), list(curve.values()), style, color=f"C{number}", linewidth=0.8, label=label)


EXPERIMENT = Experiment("optimizers", BUDGETS, cells, report)
