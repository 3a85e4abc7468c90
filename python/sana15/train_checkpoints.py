"""A training run's checkpoints: out/checkpoint-00001000/{weights,average,optimizer}.safetensors, renamed into place when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoint import file_weights
from .files import open_tensors
from .growth_training import NAME, grow_optimizer_state, source_name
from .train_config import load_config


def save(
    out: Path,
    step: int,
    module: nn.Module,
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    partial = out / "checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    state = optimizer.state_dict()["state"]
    flat = {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }
    for name, tensors in (("weights", module.state_dict()), ("average", average), ("optimizer", flat)):
        copies = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
        save_file(copies, partial / f"{name}.safetensors", _names(optimizer) if name == "optimizer" else None)
    target = out / f"checkpoint-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in sorted(out.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def resume(out: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, torch.Tensor]]:
    """Loads the newest checkpoint; returns the steps done (0 for a fresh run) and the averaged weights."""
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        return 0, {}
    device = next(module.parameters()).device
    module.load_state_dict(load_file(found[-1] / "weights.safetensors"))
    average = {k: v.to(device) for k, v in load_file(found[-1] / "average.safetensors").items()}
    state = _optimizer_state(found[-1])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(found[-1].name.rpartition("-")[2]), average


def _names(optimizer: torch.optim.Optimizer) -> dict[str, str] | None:
    """A checkpoint's metadata: the parameters' names in the order of the optimizer's indices, where it knows them."""
    groups = optimizer.state_dict()["param_groups"]
    if not all("param_names" in group for group in groups):
        return None
    return {"names": json.dumps([name for group in groups for name in group["param_names"]])}


def _optimizer_state(checkpoint: Path) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return state


def take_over(run: Path, kind: str, optimizer: torch.optim.Optimizer, growth_map: Sequence[int | None]) -> None:
    """Gives the optimizer of a new run the states of another run's newest checkpoint, block by block after growth.

    Args:
        run: folder of the run whose export `start` is, or was grown from.
        kind: the new run's `optimizer`; the other run must have had the same.
        growth_map: of the grown model; empty: the blocks are the same.

    Raises:
        ValueError: no such run, another optimizer, or states that do not belong to this model's parameters.
    """
    found = sorted(run.glob("checkpoint-*"))
    if not found or not (run / "config.yaml").exists():
        raise ValueError(f"transformer.start_run: {run} holds no checkpoint of a run of sana15 train")
    before = load_config(run / "config.yaml", []).optimizer
    if before != kind:
        raise ValueError(f"transformer.start_run: {run} was trained with {before}, this run with {kind}")
    with open_tensors(found[-1] / "optimizer.safetensors") as stored:
        names = json.loads((stored.metadata() or {}).get("names", "[]"))
    if not growth_map:
        growth_map = range(1 + max((int(m["index"]) for n in names if (m := NAME.fullmatch(n))), default=0))
    source = {
        "state": _optimizer_state(found[-1]),
        "param_groups": [{"params": [*range(len(names))], "param_names": names}],
    }
    taken = grow_optimizer_state(source, growth_map, target=optimizer.state_dict())
    if not taken["state"]:
        raise ValueError(f"transformer.start_run: {run} holds no optimizer states of this model's parameters")
    _require_shapes(found[-1], optimizer, growth_map)
    optimizer.load_state_dict(taken)


def _require_shapes(checkpoint: Path, optimizer: torch.optim.Optimizer, growth_map: Sequence[int | None]) -> None:
    """ValueError where a parameter has another shape than the checkpoint's that its state comes from."""
    before = file_weights(checkpoint / "weights.safetensors")
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"]):
            source = source_name(name, growth_map)
            if source in before and before[source].shape != tuple(parameter.shape):
                raise ValueError(
                    f"transformer.start_run: {source} is {list(before[source].shape)} in {checkpoint}, "
                    f"{name} is {list(parameter.shape)}"
                )
