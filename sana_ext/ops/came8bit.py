"""came8bit_step: one CAME update of a list of parameters, in place. The public face is sana_ext.optim.CAME8bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.came8bit import Geometry, Hyper, State, came8bit_phase
from ._library import define

STEM = "came8bit"
#: Numbers per parameter in `geometry`: matrices, rows, cols, factored, block, linear.
GEOMETRY = 6


def _came8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    scales: Sequence[Tensor],
    second: Sequence[Tensor],
    col: Sequence[Tensor],
    res_row: Sequence[Tensor],
    res_col: Sequence[Tensor],
    work: Sequence[Tensor],
    hyper: Tensor,
    seeds: Tensor | None,
    found_inf: Tensor,
    geometry: Sequence[int],
    first: int,
    last: int,
) -> None:
    rows = [Hyper(*row) for row in hyper.tolist()]
    starts = seeds.tolist() if seeds is not None else [None] * len(rows)
    states = [State(*s) for s in zip(exp_avg, scales, second, col, res_row, res_col, work)]
    for phase in range(first, last + 1):
        if phase > 0 and found_inf.item() != 0:
            return
        for i, (p, g, state, h, seed) in enumerate(zip(params, grads, states, rows, starts)):
            b, r, c, factored, block, linear = geometry[GEOMETRY * i : GEOMETRY * (i + 1)]
            shape = Geometry(b, r, c, bool(factored), block)
            chance = seed if p.dtype == torch.bfloat16 and seed != -1 else None
            finite = came8bit_phase(phase, p, g, state, h, shape, "linear" if linear else "dynamic", chance)
            if finite is not None:
                found_inf += (~finite).to(found_inf)


def _came8bit_step_fake(*args: object) -> None:
    return None


define(
    STEM,
    "came8bit_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] scales, Tensor(d!)[] second,"
    " Tensor(e!)[] col, Tensor(f!)[] res_row, Tensor(g!)[] res_col, Tensor(h!)[] work, Tensor hyper, Tensor? seeds,"
    " Tensor(i!) found_inf, int[] geometry, int first, int last) -> ()",
    _came8bit_step,
    _came8bit_step_fake,
)
