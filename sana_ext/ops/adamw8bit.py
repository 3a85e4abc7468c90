"""adamw8bit_check, adamw8bit_step: one AdamW step of a list of parameters, in place. See sana_ext.optim.AdamW8bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.adamw8bit import Hyper, adamw8bit
from ._library import define

STEM = "adamw8bit"
#: Columns of `hyper`, those of reference.adamw8bit.Hyper.
COLUMNS = 9


def _check(grads: Sequence[Tensor], factor: Tensor, found_inf: Tensor) -> None:
    for g in grads:
        found_inf.masked_fill_(~torch.isfinite(g.to(torch.float32) * factor).all(), 1.0)


def _step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    hyper: Tensor,
    seeds: Tensor | None,
    found_inf: Tensor,
    bitsandbytes_cuda: bool,
) -> None:
    if found_inf.item() != 0:
        return
    numbers = seeds.tolist() if seeds is not None else [-1] * len(params)
    rows = [Hyper(*row) for row in hyper.tolist()]
    for p, g, s1, s2, a1, a2, h, seed in zip(params, grads, state1, state2, absmax1, absmax2, rows, numbers):
        adamw8bit(p, g, s1, s2, a1, a2, h, seed, bitsandbytes_cuda)


def _nothing(*args: object) -> None:
    return None


define(
    STEM,
    "adamw8bit_check",
    # found_inf, [1] fp32, becomes 1 if a gradient times factor (fp32, no dimensions) is not finite.
    "(Tensor[] grads, Tensor factor, Tensor(a!) found_inf) -> ()",
    _check,
    _nothing,
)
define(
    STEM,
    "adamw8bit_step",
    # hyper is [parameters, 9] fp64; seeds [parameters] int64, -1: round to nearest; with found_inf != 0 nothing is touched.
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state1, Tensor(c!)[] state2, Tensor(d!)[] absmax1,"
    " Tensor(e!)[] absmax2, Tensor hyper, Tensor? seeds, Tensor found_inf, bool bitsandbytes_cuda) -> ()",
    _step,
    _nothing,
)
