"""Learns which blocks stay: N of M in each group of neighbours, drawn from learned odds while low-rank changes of the
weights make up for what is missing. After TinyFusion (arXiv:2412.01199).

Each group has a categorical distribution over its ways of keeping N of M blocks. At every step one way per group is drawn
(Gumbel-softmax, hard, with the soft gradient), the others' blocks pass their input on, and both the odds and the low-rank
changes learn from the flow loss: so the odds rise of what is good after healing, not of what is good as it stands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..model.depth import with_blocks
from ..model.transformer import SanaTransformer
from .choice import Choice, split
from .healing import flow_steps, trainable_copy
from .trajectory import CalibrationBatch

GROUP = 4  # blocks; TinyFusion found groups of 2 and 4 best and 14 bad
MOST_WAYS = 10_000  # of one group: each has its own odds, learned in some hundred steps
TAU = (4.0, 0.3)  # temperature of the draws, first and last


def groups_of(layers: int, keep: int, size: int = GROUP) -> list[tuple[int, int, int]]:
    """(first, end, blocks that stay) of each group of neighbours.

    All groups are alike (N of M) where depth and keep have a common divisor that makes groups of at most 1.5 `size` blocks, as near
    to `size` as can be. Else there are ceil(layers / size) groups, their sizes and shares as even as they can be.
    """
    if size < 1:
        raise ValueError(f"group must be at least 1, got {size}")
    alike = [g for g in range(1, layers + 1) if layers % g == 0 and keep % g == 0 and layers / g <= 1.5 * size]
    count = min(alike, key=lambda g: (abs(layers / g - size), g)) if alike else math.ceil(layers / size)
    borders = [i * layers // count for i in range(count + 1)]
    return [(a, b, b * keep // layers - a * keep // layers) for a, b in itertools.pairwise(borders)]


class _LowRank(nn.Module):
    """weight + (up @ down): a change of low rank that starts at zero."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down = nn.Parameter(down.to(weight.device, weight.dtype))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class _Gated(nn.Module):
    """x + gate * (block(x) - x); the gate is a number that the draw of each step sets."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.gate = torch.ones(())

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return x + self.gate.to(x) * (self.block(x, *others) - x)


def learned(
    model: SanaTransformer,
    batches: Sequence[CalibrationBatch],
    keep: int,
    *,
    seed: int = 0,
    learning_steps: int = 200,
    group: int = GROUP,
    rank: int = 8,
    lr: float = 1e-3,
    odds_lr: float = 0.1,
    flow_shift: float = 3.0,
) -> Choice:
    """N of M blocks in each group, the most likely way after learning.

    Args:
        learning_steps: each on one chunk of the batches' pictures.
        group: M, about; see groups_of. rank: of the low-rank changes in the blocks' matrices.
        lr, odds_lr: learning rates of the low-rank changes and of the odds (logits). flow_shift: as in the pipeline.
    """
    if learning_steps < 1 or rank < 1:
        raise ValueError(f"learning_steps and rank must be at least 1, got {learning_steps} and {rank}")
    layers = model.config.num_layers
    groups = groups_of(layers, keep, group)
    most = max(math.comb(b - a, n) for a, b, n in groups)
    if most > MOST_WAYS:
        raise ValueError(f"groups of {group} blocks have {most} ways to keep {keep} of {layers}; take a smaller group")
    generator = torch.Generator().manual_seed(seed)
    copied = trainable_copy(model).requires_grad_(False)
    changes = []
    for block in copied.transformer_blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                change = _LowRank(module.weight, rank, generator)
                parametrize.register_parametrization(module, "weight", change)
                changes += [change.down, change.up]
    device = model.proj_out.weight.device
    ways = [_ways(b - a, n).to(device) for a, b, n in groups]  # [ways, M] of 0 and 1
    logits = [nn.Parameter(torch.zeros(len(w), device=device)) for w in ways]
    gated = [_Gated(block) for block in copied.transformer_blocks]
    supernet = with_blocks(copied, gated)

    def draw(step: int, generator: torch.Generator) -> None:
        tau = TAU[0] * (TAU[1] / TAU[0]) ** (step / max(1, learning_steps - 1))
        for (first, _, _), way, odds in zip(groups, ways, logits):
            uniform = torch.rand(len(way), generator=generator).clamp_(1e-9, 1 - 1e-7).to(device)
            soft = ((odds - (-uniform.log()).log()) / tau).softmax(0)
            hard = nn.functional.one_hot(soft.argmax(), len(way)).to(soft)
            gates = (hard + soft - soft.detach()) @ way
            for i, gate in enumerate(gates):
                gated[first + i].gate = gate

    _, healing = split(batches)
    parameters = [{"params": changes, "lr": lr}, {"params": logits, "lr": odds_lr}]
    scale = model.config.timestep_scale
    flow_steps(
        supernet,
        parameters,
        healing,
        learning_steps,
        seed=seed,
        flow_shift=flow_shift,
        timestep_scale=scale,
        before=draw,
    )
    kept = [
        first + i
        for (first, _, _), way, odds in zip(groups, ways, logits)
        for i in way[int(odds.argmax())].nonzero().flatten().tolist()
    ]
    return Choice(kept, "learned", {"learning steps": learning_steps})


def _ways(size: int, keep: int) -> torch.Tensor:
    """[ways, size]: every way to keep `keep` of `size`, the first blocks' first."""
    rows = [[float(i in chosen) for i in range(size)] for chosen in itertools.combinations(range(size), keep)]
    return torch.tensor(rows)
