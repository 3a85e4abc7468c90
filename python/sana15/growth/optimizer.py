"""Training on after growth: optimizer states of the copied blocks, learning rates by block, old blocks frozen at first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .growing import BLOCKS, GrowthMap

#: A parameter of a block, wherever the transformer stands in the module that is trained.
NAME = re.compile(rf"(?P<before>(?:.*\.)?{re.escape(BLOCKS)})(?P<index>\d+)\.(?P<inner>.+)")


def grow_optimizer_state(
    state: dict[str, Any],
    growth_map: Sequence[int | None],
    *,
    names: Sequence[str] | None = None,
    target: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The state dict for the grown model's optimizer: every copy of a block gets its source's state, new blocks get none.

    For torch's AdamW, AdamW8bit, CAME8bit, and any optimizer whose state dict is torch's: tensors are copied as they are.
    An optimizer that was made from named_parameters() has the names in its state dict.

    Args:
        state: what state_dict() of the source's optimizer returned.
        growth_map: `growth_map` of the grown model.
        names: the source's parameter names in the optimizer's order, where the state dict has none.
        target: state_dict() of the grown model's optimizer, made from named_parameters(). Its groups and settings are
            kept, so they may be others than the source's. Needed where the groups differ, and where norms were added.

    Returns:
        A new state dict for load_state_dict of the grown model's optimizer; without `target` it has the source's groups.

    Raises:
        ValueError: names are missing, or do not fit the growth map.
    """
    groups = _named(state["param_groups"], names, "the state dict")
    sources = {name: key for group in groups for name, key in group.items()}
    if target is None:
        new_groups, first = [], 0
        for saved, grown in zip(state["param_groups"], _grown_groups(groups, growth_map)):
            numbers = [*range(first, first + len(grown))]
            first += len(grown)
            by_name = any(isinstance(key, str) for key in saved["params"])
            new_groups.append({**saved, "params": grown if by_name else numbers, "param_names": grown})
    else:
        new_groups = [dict(group) for group in target["param_groups"]]
    result: dict[Any, Any] = {}
    for group in _named(new_groups, None, "the target"):
        for name, key in group.items():
            source = source_name(name, growth_map)
            if source in sources and sources[source] in state["state"]:
                entry = state["state"][sources[source]]
                result[key] = {  # cloned: copies of one block must not share their state
                    k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in entry.items()
                }
    if target is None:  # what the source's groups did not have, the grown one's need not
        for saved, group in zip(state["param_groups"], new_groups):
            if "param_names" not in saved:
                del group["param_names"]
    return {**state, "state": result, "param_groups": new_groups}


def _named(groups: Sequence[dict[str, Any]], names: Sequence[str] | None, what: str) -> list[dict[str, Any]]:
    """Each group as parameter name -> key of its state."""
    if names is not None:
        count = sum(len(group["params"]) for group in groups)
        if len(names) != count:
            raise ValueError(f"{what} has {count} parameters, but {len(names)} names were given")
    named, first = [], 0
    for group in groups:
        keys = group["params"]
        if names is not None:
            own = names[first : first + len(keys)]
        elif all(isinstance(key, str) for key in keys):  # keyed by name, as torch.distributed.checkpoint does
            own = keys
        elif "param_names" in group:
            own = group["param_names"]
        else:
            raise ValueError(
                f"{what} has no parameter names: make the optimizer from named_parameters(), or pass names"
            )
        first += len(keys)
        named.append(dict(zip(own, keys)))
    return named


def source_name(name: str, growth_map: Sequence[int | None]) -> str | None:
    """The source's name of a grown model's parameter; None in a new block."""
    match = NAME.fullmatch(name)
    if match is None:
        return name
    index = int(match["index"])
    if index >= len(growth_map):
        raise ValueError(f"{name} lies outside the {len(growth_map)} blocks of the growth map")
    source = growth_map[index]
    return None if source is None else f"{match['before']}{source}.{match['inner']}"


def _grown_groups(groups: Sequence[dict[str, Any]], growth_map: Sequence[int | None]) -> list[list[str]]:
    """The grown model's names by group, in its order: each block's where the source's blocks stand."""
    homes: dict[str, int] = {}
    depth = 0
    for number, group in enumerate(groups):
        for name in group:
            if match := NAME.fullmatch(name):
                depth = max(depth, int(match["index"]) + 1)
                if homes.setdefault(match["inner"], number) != number:
                    raise ValueError(f"{match['inner']} of the blocks is in several groups: pass target")
    if any(source is not None and source >= depth for source in growth_map):
        raise ValueError(f"the growth map names block {max(s for s in growth_map if s is not None)} of {depth}")
    grown = []
    for group in groups:
        matches = [NAME.fullmatch(name) for name in group]
        inner = list(dict.fromkeys(m["inner"] for m in matches if m))
        result: list[str] = []
        done = False
        for name, match in zip(group, matches):
            if match is None:
                result.append(name)
            elif not done:
                done = True
                result += [f"{match['before']}{i}.{n}" for i in range(len(growth_map)) for n in inner]
        grown.append(result)
    return grown


def block_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    multipliers: Sequence[float] = (),
    growth_map: Sequence[int | None] = (),
    freeze_steps: int = 0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, with `lr_multiplier` and `freeze_steps`; set_learning_rates makes them act.

    Args:
        named_parameters: of the module that is trained.
        multipliers: of the learning rate, one per block; parameters outside the blocks have 1. Empty: 1 throughout.
        growth_map: of the model.
        freeze_steps: copied blocks are not trained for this many steps.

    Raises:
        ValueError: a block that has no multiplier, or that the growth map lacks.
    """
    if any(not m >= 0 for m in multipliers) or freeze_steps < 0:
        raise ValueError("learning-rate multipliers and the number of frozen steps must be at least 0")
    if freeze_steps and not growth_map:
        raise ValueError("freezing the old blocks needs a growth map, which says which they are")
    groups: dict[tuple[float, int], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        key = (1.0, 0)
        if match := NAME.fullmatch(name):
            index = int(match["index"])
            for what, values in (("multipliers", multipliers), ("growth map", growth_map)):
                if values and index >= len(values):
                    raise ValueError(f"block {index} lies outside the {len(values)} blocks of the {what}")
            old = bool(growth_map) and growth_map[index] is not None
            key = (float(multipliers[index]) if multipliers else 1.0, freeze_steps if old else 0)
        groups.setdefault(key, []).append((name, parameter))
    return [{"params": named, "lr_multiplier": m, "freeze_steps": k} for (m, k), named in groups.items()]


def block_multipliers(growth_map: GrowthMap, old: float, new: float) -> list[float]:
    """One multiplier for the copied blocks and one for the new ones."""
    return [new if source is None else old for source in growth_map]


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, step: int) -> None:
    """Before step number `step` (from 0): every group's learning rate, and whether its parameters get gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)
        if freeze_steps := group.get("freeze_steps", 0):
            for parameter in group["params"]:
                parameter.requires_grad_(step >= freeze_steps)
