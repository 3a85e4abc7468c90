"""A training run's checkpoints: out/checkpoint-00001000/{weights,average,optimizer}.safetensors, renamed into place when on the disk.

Only folders named checkpoint- and eight digits are the run's; whatever else a user puts beside them stays as it is. Every
file says of which step it is and has the SHA-256 of its tensors, so that a damaged one is found out and the checkpoint
before it is taken. What is not finite is neither saved nor taken up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..growth.optimizer import NAME, grow_optimizer_state, source_name
from ..storage.files import DataError, open_tensors, remove_left, replace_folder, require_finite, staging, write_tensors
from ..storage.weights import file_weights
from .config import load_config

_logger = logging.getLogger(__name__)

FOLDER = re.compile(r"checkpoint-([0-9]{8})")
FILES = ("weights", "average", "optimizer")
Tensors = dict[str, torch.Tensor]


def checkpoints(out: Path) -> dict[int, Path]:
    """The run's checkpoint folders by step, the newest last."""
    found = {int(m[1]): p for p in out.glob("checkpoint-*") if (m := FOLDER.fullmatch(p.name))}
    return {step: found[step] for step in sorted(found) if found[step].is_dir() and not found[step].is_symlink()}


def save(
    out: Path,
    step: int,
    module: nn.Module,
    average: Tensors,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Writes the checkpoint of a step; of those up to this one the newest `keep` whole ones stay.

    Raises:
        DataError: a value is not finite, or something that is no checkpoint has the name. All checkpoints stay as they are.
    """
    target = out / f"checkpoint-{step:08d}"
    _require_own(target)
    names = _names(optimizer)
    state = {"weights": module.state_dict(), "average": average, "optimizer": _flat(optimizer)}
    copies = {file: {k: v.detach().contiguous().cpu().clone() for k, v in t.items()} for file, t in state.items()}
    for file, tensors in copies.items():
        require_finite(tensors, f"step {step}, {file}", "no checkpoint is written over the good ones")
    with staging(target) as partial:
        partial.mkdir()
        for file, tensors in copies.items():
            about = {"step": str(step), "sha256": _digest(tensors)}
            if file == "optimizer" and names is not None:
                about["names"] = json.dumps(names)
            write_tensors(tensors, partial / f"{file}.safetensors", about)
        replace_folder(partial, target)
    remove_old(out, step, keep)


def require_free(out: Path, due: Callable[[int], bool]) -> None:
    """DataError where something that is no checkpoint, such as a link, has the name of one that is due: before the work."""
    for path in out.glob("checkpoint-*"):
        if (m := FOLDER.fullmatch(path.name)) and due(int(m[1])):
            _require_own(path)


def _require_own(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DataError(f"{target} is no folder of this run; move it away to go on")


def resume(out: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Tensors]:
    """Loads the newest whole checkpoint; returns the steps done (0 for a fresh run) and the averaged weights.

    Raises:
        DataError: there are checkpoints, but none is whole and of this model.
    """
    for left in out.glob(".checkpoint-*"):
        if m := re.fullmatch(rf"\.({FOLDER.pattern})\.(partial|old)-.*", left.name):
            remove_left(out / m[1])
    newest = _newest(out, module, sum(len(group["params"]) for group in optimizer.param_groups))
    if newest is None:
        return 0, {}
    step, _, stored = newest
    device = next(module.parameters()).device
    module.load_state_dict(stored["weights"])
    state = _optimizer_state(stored["optimizer"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step, {k: v.to(device) for k, v in stored["average"].items()}


def _newest(out: Path, module: nn.Module | None, parameters: int | None) -> tuple[int, Path, dict[str, Tensors]] | None:
    """Step, folder and files of the newest checkpoint that is whole; a line on stderr for each that is passed over.

    Args:
        module: that the weights must fit. parameters: of the optimizer.

    Raises:
        DataError: no checkpoint is whole.
    """
    trouble: list[tuple[Path, DataError]] = []
    for step, folder in reversed(checkpoints(out).items()):
        try:
            stored = {file: _read(folder / f"{file}.safetensors", step) for file in FILES}
            _require_fit(folder, stored, module, parameters)
        except DataError as error:
            trouble.append((folder, error))
            continue
        for passed, why in trouble:
            _logger.warning("warning: %s is passed over for %s: %s", passed, folder.name, _line(why))
        return step, folder, stored
    if trouble:
        raise DataError(f"{out} has no whole checkpoint ({len(trouble)} tried); the newest: {_line(trouble[0][1])}")
    return None


def _read(path: Path, step: int) -> Tensors:
    """The tensors of a file of that step; DataError where anything is wrong with it but the permission to read it."""
    try:
        with open_tensors(path) as stored:
            about = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, no mapping
    except PermissionError:
        raise
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from None
    if about.get("step", str(step)) != str(step):
        raise DataError(f"{path} is of step {about['step']}")
    if about.get("sha256", digest := _digest(tensors)) != digest:  # checkpoints of older versions have none
        raise DataError(f"{path} is damaged: its tensors are not those that were written")
    require_finite(tensors, str(path), "it cannot be trained on")
    return tensors


def _require_fit(folder: Path, stored: dict[str, Tensors], module: nn.Module | None, parameters: int | None) -> None:
    """DataError where the tensors are not those of the module, or states are of no parameter of the optimizer."""
    if module is not None:
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        for file in ("weights", "average"):
            found = {name: tensor.shape for name, tensor in stored[file].items()}
            if found != shapes:
                name = sorted(found.items() ^ shapes.items())[0][0]
                raise DataError(f"{folder / file}.safetensors does not fit the model, for example in {name}")
    for key in stored["optimizer"]:
        index, dot, name = key.partition(".")
        if not (index.isdecimal() and dot and name) or (parameters is not None and int(index) >= parameters):
            raise DataError(f"{folder / 'optimizer.safetensors'} has a state {key!r} of no parameter")


def remove_old(out: Path, step: int, keep: int) -> None:
    """Removes of the checkpoints up to a step what is older than the newest `keep` whole ones; nothing where there are fewer.

    Each loses its name first: a killed run leaves no half of one.
    """
    found = {s: folder for s, folder in checkpoints(out).items() if s <= step}
    whole = [at for at, folder in found.items() if _looks_whole(folder)]
    for at, folder in found.items():
        if len(whole) >= keep and at < whole[-keep]:
            with staging(folder) as away:
                folder.rename(away)


def _looks_whole(folder: Path) -> bool:
    """Tells whether every file is there, with as many bytes as its header says."""
    try:
        for file in FILES:
            with open_tensors(folder / f"{file}.safetensors"):
                pass
    except (OSError, DataError):
        return False
    return True


def _digest(tensors: Tensors) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _flat(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's states as one mapping: "3.exp_avg" is parameter 3's."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def _names(optimizer: torch.optim.Optimizer) -> list[str] | None:
    """The parameters' names in the order of the optimizer's indices, where it knows them."""
    groups = optimizer.state_dict()["param_groups"]
    if not all("param_names" in group for group in groups):
        return None
    return [name for group in groups for name in group["param_names"]]


def _optimizer_state(flat: Tensors) -> dict[int, Tensors]:
    state: dict[int, Tensors] = {}
    for key, value in flat.items():
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
    if not checkpoints(run) or not (run / "config.yaml").exists():
        raise ValueError(f"transformer.start_run: {run} holds no checkpoint of a run of sana15 train")
    before = load_config(run / "config.yaml", []).optimizer
    if before != kind:
        raise ValueError(f"transformer.start_run: {run} was trained with {before}, this run with {kind}")
    newest = _newest(run, None, None)
    assert newest is not None
    _, checkpoint, stored = newest
    names = _stored_names(checkpoint / "optimizer.safetensors")
    if not growth_map:
        growth_map = range(1 + max((int(m["index"]) for n in names if (m := NAME.fullmatch(n))), default=0))
    source = {
        "state": _optimizer_state(stored["optimizer"]),
        "param_groups": [{"params": [*range(len(names))], "param_names": names}],
    }
    taken = grow_optimizer_state(source, growth_map, target=optimizer.state_dict())
    if not taken["state"]:
        raise ValueError(f"transformer.start_run: {run} holds no optimizer states of this model's parameters")
    _require_shapes(checkpoint, optimizer, growth_map)
    optimizer.load_state_dict(taken)


def _stored_names(path: Path) -> list[str]:
    with open_tensors(path) as stored:
        try:
            names = json.loads((stored.metadata() or {}).get("names", "[]"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is damaged: names of parameters: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} is damaged: names of parameters")
    return names


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
