"""Training runs that experiments share: a trunk at a constant rate, and at each mark a branch whose rate falls to zero.

The trunk (warm-up, then constant) never needs to know where it ends, so every mark's model is one that was trained for
just so many steps: its branch goes on from the mark for `decay_part` of the mark's steps. A grown run begins with
the weights of another run's trunk. All draws of a step depend on (seed, step) only, so arms of a seed see the same
scenes, noise and noise levels, and a cell that is computed again makes the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..growth.growing import grow
from ..growth.optimizer import block_groups, block_multipliers
from ..model.checkpoint import save_transformer
from ..model.config import SanaConfig
from ..model.folder import MINI
from ..model.transformer import SanaTransformer
from ..sampling import flow
from ..storage.files import read_json, read_tensors, staging
from ..training.checkpoints import checkpoints, resume, save
from ..training.distillation import training_loss
from ..training.loop import fit
from ..training.tasks import initialise
from . import latents
from .grid import Cell, Place
from .judging import FLOW_SHIFT, Recipe, held_out_loss, judged, velocity_of

HEAD = 32  # width of an attention head, as in every published SANA
CAPTION_DROP = 0.1
WARMUP = 100
CLIP = 1.0
RESULT = "result.json"

Around = Callable[[int], AbstractContextManager[None]]
After = Callable[[int], None]


@dataclass(frozen=True)
class Origin:
    """The beginning of a grown run: another run's trunk at a mark, and the arguments of growth."""

    run: Run
    mark: int
    growth: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: of the arm. seed: of first weights and all draws. layers: blocks.
        start: None for one from scratch. first: steps that count as done at its start, so that marks are of a whole run.
        lr: over the recipe's. new_rate: rate of a grown run's new blocks over that of its old ones.
    """

    name: str
    seed: int
    layers: int
    start: Origin | None = None
    first: int = 0
    lr: float = 1.0
    new_rate: float = 1.0

    def path(self, recipe: Recipe) -> str:
        """Returns the run's folder below the common one: other settings, another folder."""
        about = json.dumps([dataclasses.asdict(recipe), dataclasses.asdict(self)], sort_keys=True)
        return f"runs/{self.name}-{self.seed}-{hashlib.sha256(about.encode()).hexdigest()[:10]}"


def steps_of(mark: int, recipe: Recipe) -> int:
    """Returns the steps behind the model of a mark: the trunk's and the branch's."""
    return mark + round(recipe.decay_part * mark)


def groups_of(model: SanaTransformer, run: Run) -> list[dict[str, Any]]:
    """Returns parameter groups by rate: two for a run whose new blocks have a rate of their own."""
    blocks = model.growth_map or []
    multipliers = [] if run.new_rate == 1.0 else block_multipliers(blocks, 1.0, run.new_rate)
    return block_groups(model.named_parameters(), multipliers, blocks if multipliers else [])


def adamw(model: SanaTransformer, recipe: Recipe, run: Run) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of(model, run), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def no_hooks(model: SanaTransformer, run: Run) -> tuple[Around, After]:
    return lambda step: nullcontext(), lambda step: None


@dataclass(frozen=True)
class Method:
    """The way a run trains.

    Attributes:
        make: the optimizer. hooks: a context around each step's loss and gradient, and what is called after its update.
        velocity: (model, text, mask) -> what predicts.
    """

    make: Callable[[SanaTransformer, Recipe, Run], torch.optim.Optimizer] = adamw
    hooks: Callable[[SanaTransformer, Run], tuple[Around, After]] = no_hooks
    velocity: Callable[[SanaTransformer, torch.Tensor, torch.Tensor], flow.Velocity] = velocity_of


def run_cells(
    run: Run, marks: Sequence[int], recipe: Recipe, method: Method = Method(), trunk_only: Sequence[int] = ()
) -> list[Cell]:
    """The cells of a run: for every mark its trunk, from the one before, and its evaluated model.

    Args:
        marks: steps, ascending. trunk_only: marks where another run begins and no model is judged.
    """
    found: list[Cell] = []
    before, scenes = run.first, tuple(cell.name for cell in latents.cells(recipe.scenes))
    last = () if run.start is None else (trunk_name(run.start.run, run.start.mark),)
    for mark in sorted({*marks, *trunk_only}):
        given: dict[str, Any] = {"run": run, "recipe": recipe, "method": method}
        trunk = Cell(
            trunk_name(run, mark), partial(_trunk, before=before, mark=mark, **given), (*scenes, *last),
            made=f"{run.path(recipe)}/trunk-{mark}",
        )  # fmt: skip
        found.append(trunk)
        last, before = (trunk.name,), mark
        if mark in marks:
            found.append(Cell(
                model_name(run, mark), partial(_model, mark=mark, **given), (*scenes, trunk.name),
                made=model_path(run, mark, recipe),
            ))  # fmt: skip
    return found


def trunk_name(run: Run, mark: int) -> str:
    return f"{run.name}-{run.seed}-trunk-{mark}"


def model_name(run: Run, mark: int) -> str:
    """Returns the name of the cell whose result has `loss`, `score`, `scores`, `steps` and `flops` of a mark's model."""
    return f"{run.name}-{run.seed}-model-{mark}"


def model_path(run: Run, mark: int, recipe: Recipe) -> str:
    """Returns the path of a mark's pipeline folder below the common one."""
    return f"{run.path(recipe)}/model-{mark}"


def first_model(run: Run, recipe: Recipe, place: Place) -> SanaTransformer:
    """The model that a run begins with, in training mode."""
    if run.start is None:
        return scratch(run.layers, recipe.width, run.seed).to(place.device)
    source = scratch(run.start.run.layers, recipe.width, run.seed)
    folder = place.common / run.start.run.path(recipe) / f"trunk-{run.start.mark}"
    source.load_state_dict(read_tensors(checkpoints(folder)[run.start.mark] / "weights.safetensors"))
    return grow(source, run.layers, seed=run.seed, **dict(run.start.growth)).train().to(place.device)


def scratch(layers: int, width: int, seed: int) -> SanaTransformer:
    """A model with SANA's random first weights, in training mode; `layers` blocks of `width`."""
    heads = width // HEAD
    config = dataclasses.replace(
        SanaConfig.load(MINI / "transformer"), num_layers=layers, num_attention_heads=heads,
        num_cross_attention_heads=heads, cross_attention_head_dim=HEAD, cross_attention_dim=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SanaTransformer(config)
        initialise(model)
    return model.train()


def fitted(
    model: SanaTransformer,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rate: Callable[[int], float],
    place: Place,
    recipe: Recipe,
    run: Run,
    method: Method = Method(),
) -> list[float]:
    """Trains a model on the data set and returns each step's loss."""
    data, losses = latents.load(place.common, recipe.scenes, place.device), []
    around, after = method.hooks(model, run)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        x0, text, mask = data.batch(recipe.batch, CAPTION_DROP, generator)
        return training_loss(
            method.velocity(model, text, mask), x0, generator, flow_shift=FLOW_SHIFT, stratified=True,
            flow_weight=1.0, distillation=None, distill=0.0,
        )  # fmt: skip

    def done(step: int, value: torch.Tensor, norm: torch.Tensor) -> None:
        losses.append(value.item())
        after(step)

    fit(loss, list(model.parameters()), optimizer, steps, seed=run.seed, rate=rate, clip=CLIP, around=around, done=done)
    return losses


def _trunk(place: Place, run: Run, recipe: Recipe, method: Method, before: int, mark: int) -> dict[str, Any]:
    """Trains on from the mark before, at a constant rate."""
    target = place.common / run.path(recipe) / f"trunk-{mark}"
    if (target / RESULT).exists():
        return read_json(target / RESULT)
    shutil.rmtree(target, ignore_errors=True)
    model, optimizer = _stored(place, run, recipe, method, before)
    rate = recipe.lr * run.lr
    losses = fitted(
        model, optimizer, range(before, mark), lambda step: rate * min(1.0, (step - run.first + 1) / WARMUP), place,
        recipe, run, method,
    )  # fmt: skip
    target.mkdir(parents=True)
    save(target, mark, model, dict(model.state_dict()), optimizer, keep=1)
    return _recorded(target, {"run": run.name, "seed": run.seed, "mark": mark, "losses": _thinned(losses)})


def _model(place: Place, run: Run, recipe: Recipe, method: Method, mark: int) -> dict[str, Any]:
    """Trains the branch of a mark, writes its pipeline folder and judges it."""
    target = place.common / model_path(run, mark, recipe)
    if (target / RESULT).exists():
        return read_json(target / RESULT)
    model, optimizer = _stored(place, run, recipe, method, mark)
    end = steps_of(mark, recipe)
    rate = recipe.lr * run.lr / max(end - mark, 1)
    fitted(model, optimizer, range(mark, end), lambda step: rate * (end - step), place, recipe, run, method)
    shutil.rmtree(target, ignore_errors=True)
    write_pipeline(model.eval(), target)
    found = {"run": run.name, "seed": run.seed, "mark": mark, "steps": end, "layers": run.layers}
    found |= {"flops": flops(run, mark, recipe), "loss": held_out_loss(model, recipe, place)}
    return _recorded(target, found | judged(target, recipe, place.device))


def _stored(
    place: Place, run: Run, recipe: Recipe, method: Method, mark: int
) -> tuple[SanaTransformer, torch.optim.Optimizer]:
    """The model and optimizer of a run after a step of its trunk."""
    model = first_model(run, recipe, place)
    optimizer = method.make(model, recipe, run)
    if mark > run.first:
        resume(place.common / run.path(recipe) / f"trunk-{mark}", model, optimizer)
    return model, optimizer


def _recorded(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    (folder / RESULT).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _thinned(losses: Sequence[float], window: int = 50) -> list[float]:
    """Returns the means of `window` steps each."""
    return [float(np.mean(losses[i : i + window])) for i in range(0, len(losses), window)]


def write_pipeline(model: SanaTransformer, target: Path) -> None:
    """Writes a pipeline folder: the mini model's with another transformer."""
    with staging(target) as made:
        shutil.copytree(MINI, made, ignore=shutil.ignore_patterns("transformer"))
        save_transformer(model, made / "transformer")
        made.rename(target)


def flops(run: Run, mark: int, recipe: Recipe) -> float:
    """Training FLOPs behind a mark's model, those of the runs it was grown from included."""
    return trunk_flops(run, mark, recipe) + step_flops(run, recipe) * (steps_of(mark, recipe) - mark)


def trunk_flops(run: Run, mark: int, recipe: Recipe) -> float:
    """Training FLOPs behind a trunk at a mark."""
    own = step_flops(run, recipe) * (mark - run.first)
    return own if run.start is None else own + trunk_flops(run.start.run, run.start.mark, recipe)


def step_flops(run: Run, recipe: Recipe) -> float:
    """FLOPs of a step: 6 for each weight of a block and token (cross-attention's keys and values aside).

    Attention between tokens and the embeddings are left out: they are small, and the embeddings the same for all depths.
    """
    config = SanaConfig.load(MINI / "transformer")
    C, F, tokens = recipe.width, int(config.mlp_ratio * recipe.width), recipe.batch * config.sample_size**2
    weights = 4 * C * C + 2 * C * C + 2 * C * F + 2 * 9 * F + F * C
    return 6.0 * weights * tokens * run.layers
