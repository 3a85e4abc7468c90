"""`sana15 prune`: depth pruning from folder to folder, one tensor in memory at a time where nothing must be measured."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..device import resolved
from ..growth.growing import grown_weights
from ..model.folder import SETTINGS, ModelFolder, recorded_blocks
from ..sampling.pipeline import Pipeline
from ..storage.concurrency import claiming, require_one_process
from ..storage.values import parse_bytes
from ..storage.weights import weights_sha256
from .choice import Choice
from .healing import DISTILL, Healing, heal_on_scenes
from .importance import Importance
from .removal import check_keep, choose, pruned_config, strategy
from .samples import Samples, heal_on_samples
from .trajectory import calibration, calibration_prompts

_logger = logging.getLogger(__name__)


@claiming(lambda given: given["target"], new=True)
def prune_folder(
    source: str | Path,
    target: str | Path,
    *,
    keep: int | None = None,
    by: str | None = None,
    importance: Importance | None = None,
    indices: Sequence[int] | None = None,
    prompts: str | None = None,
    count: int = 100,
    sampling_steps: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    shard_bytes: int | None = None,
    heal: Healing | None = None,
    device: str = "auto",
    **options: Any,
) -> Choice:
    """A pruned model from a transformer folder or a whole pipeline folder in diffusers' layout.

    Other parts of a pipeline are copied. The kept blocks, and what they were chosen on, are recorded under `pruning` in the
    target's sana15.json.

    Args:
        source: a folder; or "mini".
        target: must not exist; it appears when everything is written.
        keep, by, importance, indices, seed, options: as in sana15.prune. Without `importance` or `indices` the source must
            be a pipeline: it is loaded and calibrated.
        prompts, count, sampling_steps, batch_size: of the calibration, see sana15 importance; and of a healing on samples.
        shard_bytes: the most that a weights file may hold. Default: as the source's largest file, at least 5 GB.
        heal: how the pruned model is trained before the target appears; of pipelines.
        device: of measuring and healing: auto (the GPU where there is one), cpu or cuda.

    Returns:
        What was kept.

    Raises:
        ValueError: arguments that cannot be. FileNotFoundError, DataError: the source is bad. In every case the source is
        untouched and the target is not there.
    """
    origin, target = ModelFolder(source), Path(target)
    origin.check_target(target)
    by = strategy(by, indices is not None, importance is not None)
    measuring = indices is None and importance is None
    _check(origin, keep, by, indices, heal, measuring)
    layers, weights = origin.config.num_layers, origin.weights()
    pipe = Pipeline.from_pretrained(origin.root, device=resolved(device)) if measuring or heal is not None else None
    heal = heal.of_model(pipe.text) if heal is not None and pipe is not None else heal
    samples = Samples() if heal is not None and heal.data == "samples" else None
    if prompts is not None and not measuring and samples is None:
        raise ValueError(
            "prompts are for measuring and healing on samples; with indices or an importance nothing is measured"
        )
    model, batches, measured = None, None, None
    if pipe is not None and (measuring or samples is not None):
        chosen = calibration_prompts(pipe, prompts, count, seed)
        measured = _measured(prompts, len(chosen), sampling_steps, seed)
        at = None if measuring else [0]
        batches = calibration(pipe, chosen, steps=sampling_steps, at=at, seed=seed, batch_size=batch_size)
        batches = batches if samples is None else samples.remember(batches)
    if pipe is not None and measuring:
        model = pipe.transformer
        options = {"flow_shift": pipe.flow_shift} | options if by in ("search", "learned") else options
    choice = choose(
        model, layers, keep, by, importance=importance, batches=batches if measuring else None, indices=indices,
        seed=seed, **options,
    )  # fmt: skip
    deque(() if measuring else batches or (), maxlen=0)  # sampled for the healing alone
    heal = heal and heal.for_kept(choice.kept, layers)
    settings = _recorded(origin.settings(), choice, layers, heal, measured)
    config = pruned_config(origin.config, choice.kept)
    pruned = grown_weights(weights, config, choice.kept, seed=0)

    def healed(whole: Path, transformer: Path) -> Path:
        if heal is not None and pipe is not None:
            heal_on_scenes(whole, pipe, heal) if samples is None else heal_on_samples(whole, pipe, samples, heal)
        return whole

    origin.rewrite(target, config, pruned, settings, shard_bytes=shard_bytes, finish=healed)
    return choice


def _check(
    origin: ModelFolder,
    keep: int | None,
    by: str,
    indices: Sequence[int] | None,
    heal: Healing | None,
    measuring: bool,
) -> None:
    """ValueError for what cannot be, before anything is loaded."""
    layers = origin.config.num_layers
    if heal is not None or by in ("search", "learned"):
        require_one_process("healing")
    if keep is not None:
        check_keep(keep, layers)
    if heal is not None:
        if keep == layers or (indices is not None and [*indices] == [*range(layers)]):
            raise ValueError(f"all {layers} blocks are kept: there is nothing to heal")
        if not origin.pipeline:
            raise ValueError(f"{origin.root} is a transformer alone and cannot be healed; it takes a whole pipeline")
    if measuring and not origin.pipeline:
        raise ValueError(
            f"{origin.root} is a transformer alone and cannot be calibrated; pass an importance or indices"
        )


def _measured(prompts: str | None, count: int, steps: int, seed: int) -> dict[str, Any]:
    """Describes a calibration for the record."""
    return {
        "seed": seed,
        "calibration": {"prompts": None if prompts is None else str(prompts), "count": count, "steps": steps},
    }


def _recorded(
    settings: dict[str, Any],
    choice: Choice,
    layers: int,
    heal: Healing | None,
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """The source's settings with the pruning, and its growth map with the blocks that are left."""
    settings["pruning"] = {"by": choice.by, "source_layers": layers, "kept": choice.kept, "spent": choice.spent}
    if choice.removed:
        settings["pruning"]["removed"] = choice.removed
    settings["pruning"] |= measured or {}
    if heal is not None:
        settings["pruning"]["healing"] = dataclasses.asdict(heal)
    growth = settings.get("growth")
    if isinstance(growth, dict) and isinstance(growth.get("map"), list) and len(growth["map"]) == layers:
        growth["map"] = [growth["map"][i] for i in choice.kept]
    return settings


def read_indices(text: str, layers: int) -> list[int]:
    """Block numbers from "0,1,3", from a JSON list in a file, or from the sana15.json of a pruned folder (or the folder).

    Args:
        layers: blocks of the model that they are for; those of a pruned folder must come from a model of this depth.

    Raises:
        ValueError: no such list, or one for another depth; DataError: a file without one.
    """
    if re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text):
        return [int(number) for number in text.split(",")]
    path = Path(text)
    if path.is_dir():
        path = path / SETTINGS
    if not path.exists():
        raise ValueError(f"--indices must be numbers as in 0,1,3 or a file that exists, got {text!r}")
    kept, depth = recorded_blocks(path)
    if depth not in (None, layers):
        raise ValueError(f"{path} tells of a model of {depth} blocks that was pruned, the source has {layers}")
    return kept


#: The strategy that an option of the command, and of sana15.prune, belongs to.
STRATEGY_OPTIONS = {
    "candidates": "search", "trial_steps": "search", "learning_steps": "learned", "group": "learned", "rank": "learned",
}  # fmt: skip


def strategy_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of the chosen strategy; ValueError for another's."""
    options = {name: value for name in STRATEGY_OPTIONS if (value := getattr(args, name)) is not None}
    for name in options:
        if args.by != STRATEGY_OPTIONS[name]:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --by {STRATEGY_OPTIONS[name]}")
    return options


def run(args: argparse.Namespace) -> None:
    """`sana15 prune`."""
    options = strategy_options(args)
    if args.indices is None and args.keep is None:
        raise ValueError("--keep says how many blocks stay")
    for name in ("distill", "heal_on", "heal_batch", "heal_lr"):
        if args.heal is None and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --heal")
    source = ModelFolder(args.source)
    indices = None if args.indices is None else read_indices(args.indices, source.config.num_layers)
    importance = None
    if args.importance:
        importance = Importance.load(args.importance)
        measured = importance.settings.get("model", {})
        if measured.get("sha256") and measured["sha256"] != weights_sha256(source.transformer):
            _logger.warning("note: %s was measured on other weights (%s)", args.importance, measured.get("name"))
    heal = None
    if args.heal is not None:
        heal = Healing(
            steps=args.heal, lr=args.heal_lr, batch_size=args.heal_batch, seed=args.seed,
            distill=DISTILL if args.distill is None else args.distill, data=args.heal_on,
        )  # fmt: skip
    choice = prune_folder(
        args.source, args.target, keep=args.keep, by=args.by, seed=args.seed, prompts=args.prompts, count=args.count,
        sampling_steps=args.steps, batch_size=args.batch_size,
        importance=importance, indices=indices,
        shard_bytes=parse_bytes(args.shard_size) if args.shard_size else None,
        heal=heal, device=args.device, **options,
    )  # fmt: skip
    print(f"{args.target}: {len(choice.kept)} blocks kept by {choice.by}: {' '.join(map(str, choice.kept))}")
    if choice.spent:
        print(f"spent: {', '.join(f'{value} {name}' for name, value in choice.spent.items())}")
    if heal is not None:
        h = ModelFolder(args.target).settings()["pruning"]["healing"]
        print(
            f"healed: {h['steps']} steps of {h['batch_size']} {h['data']} at {h['noises']} noise levels, "
            f"distillation {h['distill']:g}, rate {h['lr']:.2g}"
        )
