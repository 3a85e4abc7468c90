"""Measures how much each block of a model does: the paper's block importance, and what the loss gains when the block is skipped.

Source: arXiv:2501.18427, section 2.3. The paper does not say over what the cosine runs; here it is each token's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..model.block import Block
from ..model.depth import Watched, with_blocks
from ..model.measuring import evaluating
from ..model.transformer import SanaTransformer
from ..sampling import flow
from ..storage.files import DataError, read_json, replacing
from .trajectory import CalibrationBatch

BINS = 10  # of equal width, over timesteps 0 to 1000


@dataclass(frozen=True)
class Importance:
    """The measurements of block_importance on a model of L blocks; NaN where a bin has no samples."""

    cosine: list[float]  # [L], 1 - cosine(input, output), mean over tokens, pictures and steps
    cosine_by_bin: list[list[float]]  # [L][bins]
    samples: list[int]  # [bins], pictures times steps
    loss: float | None = None  # flow loss of the whole model; None where it was not measured
    loss_by_bin: list[float] = field(default_factory=list)  # [bins]
    loss_change: list[float] = field(default_factory=list)  # [L], loss without the block, minus loss
    loss_change_by_bin: list[list[float]] = field(default_factory=list)  # [L][bins]
    settings: dict[str, Any] = field(default_factory=dict)  # how it was measured

    @property
    def layers(self) -> int:
        return len(self.cosine)

    def save(self, path: str | Path) -> None:
        """As JSON; null for NaN."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(_swapped(dataclasses.asdict(self), _is_nan, None), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Importance:
        """FileNotFoundError; DataError for anything that `save` does not write."""
        values = read_json(path)
        whole = values.get("loss")
        try:
            found = Importance(**_swapped(values, lambda v: v is None, math.nan) | {"loss": whole})
            rows = [found.cosine_by_bin, *([found.loss_change_by_bin] if whole is not None else [])]
            numbers = [*found.cosine, *found.samples, *found.loss_change]
            valid = all(isinstance(v, int | float) for v in numbers) and found.layers > 0
            valid &= all(len(row) == found.layers for row in rows)
            valid &= all(math.isfinite(v) for v in numbers)
            if whole is not None:
                valid &= math.isfinite(whole) and len(found.loss_change) == found.layers
                valid &= len(found.loss_by_bin) == len(found.samples)
            valid &= isinstance(found.settings, dict)
        except (TypeError, AttributeError, OverflowError):
            valid = False
        if not valid:
            raise DataError(f"{path} is no result of sana15 importance")
        return found


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _swapped(value: Any, test: Any, by: Any) -> Any:
    """The value with `by` for everything in it that passes the test."""
    if isinstance(value, dict):
        return {k: _swapped(v, test, by) for k, v in value.items()}
    if isinstance(value, list):
        return [_swapped(v, test, by) for v in value]
    return by if test(value) else value


class _Prefix(nn.Module):
    """Stands for the first blocks of a model whose output on this batch is known."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, *_: Any) -> torch.Tensor:
        return self.x


@torch.no_grad()
def batch_loss(model: SanaTransformer, batch: CalibrationBatch) -> torch.Tensor:
    """[B] flow loss of the batch's pictures at its noise level, the model in eval mode."""
    dtype = model.proj_out.weight.dtype

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x.to(dtype), batch.text.to(dtype), t * model.config.timestep_scale, batch.mask)

    with evaluating(model):
        return flow.loss(velocity, batch.x0, batch.noise, batch.sigmas)


@torch.no_grad()
def block_importance(
    model: SanaTransformer, batches: Iterable[CalibrationBatch], *, bins: int = BINS, loss: bool = True
) -> Importance:
    """Each block's 1 - cosine(input, output) per token, and the change of the flow loss when the block is skipped.

    BI_i = 1 - E[x_i . x_(i+1) / (|x_i| |x_(i+1)|)], x_i and x_(i+1) the input and output of block i at one token; the
    mean is over tokens, then over pictures and steps, also by timestep. The loss is that of training, on the
    trajectories' ends with fresh noise at the same noise levels. Batches are used one after the other and not kept.

    Args:
        model: L blocks. batches: sana15.calibration of it.
        bins: of equal width over timesteps 0 to 1000.
        loss: measure the loss too; it costs L / 2 + 1 more passes.

    Raises:
        ValueError: no batches, bins that are not 1 to 1000, or a model whose activations are not finite.
    """
    if not 1 <= bins <= flow.TRAIN_STEPS:
        raise ValueError(f"bins must be 1 to {flow.TRAIN_STEPS}, got {bins}")
    L = model.config.num_layers
    cosine, change = torch.zeros(2, L, bins, dtype=torch.float64)
    whole, count = torch.zeros(2, bins, dtype=torch.float64)
    for batch in batches:
        where = min(int(batch.sigma * bins), bins - 1)
        count[where] += len(batch)
        with evaluating(model):
            cosine[:, where] += _cosines(model, batch)
            if loss:
                base, without = _losses(model, batch)
                whole[where] += base
                change[:, where] += without - base
    if not count.any():
        raise ValueError("block importance needs at least one calibration batch")
    if not (cosine.isfinite().all() and change.isfinite().all()):
        raise ValueError("the model's activations are not finite on the calibration batches")
    found = Importance(
        (cosine.sum(1) / count.sum()).tolist(), (cosine / count).tolist(), [int(c) for c in count.tolist()]
    )
    if not loss:
        return found
    return dataclasses.replace(
        found, loss=(whole.sum() / count.sum()).item(), loss_by_bin=(whole / count).tolist(),
        loss_change=(change.sum(1) / count.sum()).tolist(), loss_change_by_bin=(change / count).tolist(),
    )  # fmt: skip


def _cosines(model: SanaTransformer, batch: CalibrationBatch) -> torch.Tensor:
    """[L] sums over the batch of the tokens' mean of 1 - cosine, fp64."""
    sums: list[torch.Tensor] = []

    def measure(before: torch.Tensor, after: torch.Tensor) -> None:  # [B, N, C]
        sums.append((1 - F.cosine_similarity(before.double(), after.double(), dim=-1)).mean(1).sum().cpu())

    watched = with_blocks(model, [Watched(block, measure) for block in model.transformer_blocks])
    watched(batch.latents.to(model.proj_out.weight.dtype), batch.text, batch.timestep, batch.mask)
    return torch.stack(sums)


def _losses(model: SanaTransformer, batch: CalibrationBatch) -> tuple[float, torch.Tensor]:
    """Sums over the batch: the model's loss, and [L] without each block. The blocks before it are not run again."""
    blocks: list[Block] = list(model.transformer_blocks)  # type: ignore[arg-type]
    inputs: list[torch.Tensor] = []
    watched = with_blocks(model, [Watched(block, lambda before, after: inputs.append(before)) for block in blocks])
    base = batch_loss(watched, batch).sum().item()
    without = []
    for i, x in enumerate(inputs):
        rest = with_blocks(model, [_Prefix(x), *blocks[i + 1 :]])
        without.append(batch_loss(rest, batch).double().sum().cpu())
    return base, torch.stack(without)
