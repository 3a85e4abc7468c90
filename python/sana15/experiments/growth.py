"""Measures how a grown mini model trains on: every strategy's loss at the start and after some steps, beside two controls.

12 blocks to 18; `source` trains on with its 12, `scratch` starts with 18 blocks of random weights (autoencoder and text
encoder are the mini model's everywhere). All arms of a seed see the same images, prompts, noise and noise levels. The
optimizer is AdamW, as in configs/mini.yaml: the first some hundred steps of CAME are many times its rate, which would
spoil a model that is trained already. Rates are constant and not tuned by arm, so that arms compare by their starts. The
loss is the flow loss of rendered scenes that no run trains on, with the averaged weights.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..growth.folder import grow_folder
from ..model.checkpoint import save_transformer
from ..model.config import SanaConfig
from ..model.folder import MINI
from ..model.transformer import SanaTransformer
from ..sampling import flow
from ..sampling.pipeline import Pipeline
from ..storage.files import staging
from ..training.config import TrainConfig, TransformerConfig
from ..training.data import SceneBatches
from ..training.run import train
from ..training.tasks import initialise
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results

#: Arm -> arguments of growth; None: no growth.
ARMS: dict[str, dict[str, Any] | None] = {
    "source": None,
    "partial_preservation-12": {"strategy": "partial_preservation", "keep": 12},
    "partial_preservation-10": {"strategy": "partial_preservation", "keep": 10},  # the paper drops the last two
    "interleave": {"strategy": "interleave"},
    "cyclic": {"strategy": "cyclic"},
    "block_replication": {"strategy": "block_replication"},
    "stack": {"strategy": "stack"},
    "scratch": None,
}
HELD_OUT = 987_654_321  # seed of the images and noise that judge
BATCH_JUDGED = 64


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment.

    Attributes:
        at: steps at which the loss is taken, ascending. batch: images of a step.
        lr: of all arms but scratch, which takes scratch_lr, that of configs/mini.yaml.
        judged: held-out scenes, a multiple of 64.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0,)
    layers: int = 18
    at: tuple[int, ...] = (50, 100, 200)
    batch: int = 64
    warmup: int = 20
    lr: float = 2e-4
    scratch_lr: float = 1.5e-3
    judged: int = 512

    def rate(self, arm: str) -> float:
        return self.scratch_lr if arm == "scratch" else self.lr


BUDGETS = {
    "smoke": Options(arms=("interleave", "scratch"), at=(1, 2), batch=2, judged=64),
    "small": Options(),
    "full": Options(seeds=(0, 1, 2)),
}


@torch.no_grad()
def held_out_loss(folder: Path, options: Options, device: str) -> float:
    """Mean flow loss with text of the model in a pipeline folder."""
    pipe = Pipeline.from_pretrained(folder, device=device)
    batches = SceneBatches(HELD_OUT, BATCH_JUDGED, options.judged // BATCH_JUDGED)
    losses = []
    for batch in (batches[i] for i in range(len(batches))):
        generator = torch.Generator().manual_seed(HELD_OUT + batch.step)
        x0 = pipe.autoencoder.encode(batch.pictures.to(pipe.device))
        text, mask = pipe.text.encode(batch.prompts)
        noise = torch.randn(x0.shape, generator=generator).to(pipe.device)
        sigma = flow.sample_sigmas(len(x0), generator, flow_shift=pipe.flow_shift, stratified=True).to(pipe.device)

        def velocity(
            x: torch.Tensor, t: torch.Tensor, text: torch.Tensor = text, mask: torch.Tensor = mask
        ) -> torch.Tensor:
            return pipe.transformer(x, text, t, mask)

        losses.append(flow.loss(velocity, x0, noise, sigma))
    return torch.cat(losses).mean().item()


def start(folder: Path, arm: str, layers: int, seed: int) -> None:
    """Makes the pipeline folder that an arm's training starts from."""
    growth = ARMS[arm]
    if growth is not None:
        grow_folder("mini", folder, layers=layers, seed=seed, **growth)
        return
    with staging(folder) as staged:
        shutil.copytree(MINI, staged)
        if arm == "scratch":
            torch.manual_seed(seed)
            model = SanaTransformer(dataclasses.replace(SanaConfig.load(MINI / "transformer"), num_layers=layers))
            initialise(model)
            shutil.rmtree(staged / "transformer")
            save_transformer(model, staged / "transformer")
        staged.rename(folder)


def trained(place: Place, options: Options, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains an arm on to a step, from where the cell before stopped; 0 makes its start. The loss of what is there then."""
    folder = place.folder / f"{arm}-{seed}-start"
    if not folder.exists():
        start(folder, arm, options.layers, seed)
    made = folder
    if steps:
        transformer = TransformerConfig(
            autoencoder=str(folder / "vae"), text_encoder=str(folder / "text_encoder"), start=str(folder),
            flow_shift=Pipeline.from_pretrained(folder).flow_shift, export="fp32",
        )  # fmt: skip
        made = train(TrainConfig(
            out=str(place.folder / f"{arm}-{seed}"), seed=seed, steps=steps, batch_size=options.batch,
            warmup=options.warmup, ema=0.95, lr=options.rate(arm), precision="bf16", device=place.device,
            save_every=steps, keep=1, sample_every=10**9, sample_steps=1, transformer=transformer,
        ))  # fmt: skip
    return {"arm": arm, "seed": seed, "steps": steps, "loss": held_out_loss(made, options, place.device)}


def cells(options: Options) -> list[Cell]:
    found = []
    for seed in options.seeds:
        for arm in options.arms:
            before: tuple[str, ...] = ()
            for steps in (0, *options.at):
                name = f"{arm}-{seed}-at-{steps}"
                run = partial(trained, options=options, arm=arm, seed=seed, steps=steps)
                found.append(Cell(name, run, before))
                before = (name,)
    return found


def report(options: Options, results: Results, folder: Path) -> Report:
    """Means over seeds, and the largest distance of a seed from its mean."""
    losses: dict[tuple[str, int], list[float]] = {}
    for result in results.values():
        losses.setdefault((result["arm"], result["steps"]), []).append(result["loss"])
    marks = (0, *options.at)
    lines = [
        f"Flow loss of {options.judged} held-out scenes; AdamW, batch {options.batch}.",
        "",
        "| start | blocks | rate | seeds | " + " | ".join(f"{m} steps" for m in marks) + " |",
        "|---" * (4 + len(marks)) + "|",
    ]
    for arm in options.arms:
        runs = len(losses.get((arm, 0), []))
        blocks = SanaConfig.load(MINI / "transformer").num_layers if arm == "source" else options.layers
        row = " | ".join(_shown(losses.get((arm, mark), [])) for mark in marks)
        lines.append(f"| {arm} | {blocks} | {options.rate(arm):g} | {runs} | {row} |")
    return Report("\n".join(lines), partial(_draw, options, losses))


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.4f} ± {max(abs(v - mean) for v in values):.4f}"


def _draw(options: Options, losses: dict[tuple[str, int], list[float]], path: Path) -> None:
    with axes_of(path, xlabel="step", ylabel="flow loss of held-out scenes", yscale="log") as axes:
        for arm in options.arms:
            marks = [m for m in (0, *options.at) if (arm, m) in losses]
            means = [statistics.mean(losses[arm, m]) for m in marks]
            axes.plot(marks, means, "o-", label=arm, linewidth=1, markersize=3)


EXPERIMENT = Experiment("growth", BUDGETS, cells, report)
