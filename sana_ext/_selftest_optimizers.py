"""The optimizers' part of the self-test: one step of a few parameters from the same bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .ops import adamw8bit as adam_op
from .ops import came8bit as came_op
from .reference import code8
from .reference.came8bit import Geometry

Named = dict[str, Tensor]
#: A matrix of several blocks, one of odd sizes, rows that share a block, a convolution's taps.
SHAPES = ((40, 520), (13, 301), (70, 5), (20, 1, 3, 3))


def results(op: str, device: str, dtype: torch.dtype) -> tuple[Named, Named, Named]:
    """Returns what the op, the reference in fp32, and the reference in fp64 make of the same parameters and states."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    params, grads = ([rand(*shape).to(dtype) for shape in SHAPES] for _ in range(2))
    moments = [rand(*shape) for shape in SHAPES]
    run = _came if op == "came8bit_step" else _adamw
    return run(params, grads, moments, device)


def _named(**lists: Iterable[Tensor]) -> Named:
    return {
        f"{name} {i}": t.cpu().double() for name, tensors in lists.items() for i, t in enumerate(tensors) if t.numel()
    }


def _came(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], device: str) -> tuple[Named, Named, Named]:
    geometries = [Geometry.of(tuple(p.shape)) for p in params]
    numbers = [
        [1e-2, 0.1, 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0, 1.0, 1.0, 1.0, 1.0, float(g.rows), float(p.numel())]
        for g, p in zip(geometries, params)
    ]

    def run(step: Callable[..., None], device: str, exact: bool) -> Named:
        wide = torch.float64 if exact else torch.float32
        p = [t.to(device, wide if exact else t.dtype, copy=True) for t in params]
        quantised = [g.quantize(m, "linear") for g, m in zip(geometries, moments)]
        codes, scales = ([q[i].to(device) for q in quantised] for i in range(2))
        sizes = [(g.matrices * g.rows, g.matrices * g.cols) if g.factored else (g.rows * g.cols, 0) for g in geometries]
        second, col, res_row, res_col = (
            [torch.ones(size[i], dtype=wide, device=device) for size in sizes] for i in (0, 1, 0, 1)
        )
        work = [torch.zeros(sum(g.work), dtype=wide, device=device) for g in geometries]
        hyper = torch.tensor(numbers, dtype=torch.float64, device=device)
        geometry = [n for g in geometries for n in (g.matrices, g.rows, g.cols, int(g.factored), g.block, 1)]
        found = torch.zeros(1, device=device)
        states: list[Any] = [codes, scales, second, col, res_row, res_col, work]
        step(p, [g.to(device) for g in grads], *states, hyper, None, found, geometry, 0, 3)
        m = [g.dequantize(c.cpu(), s.cpu(), "linear") for g, c, s in zip(geometries, codes, scales)]
        return _named(parameter=p, moment=m, second=second, col=col, res_col=res_col)

    ours = run(torch.ops.sana_ext.came8bit_step, device, False)
    return ours, run(came_op._came8bit_step, "cpu", False), run(came_op._came8bit_step, "cpu", True)


def _adamw(params: list[Tensor], grads: list[Tensor], moments: list[Tensor], device: str) -> tuple[Named, Named, Named]:
    adamw = importlib.import_module("sana_ext.reference.adamw8bit")  # reference.adamw8bit is the function
    h = adamw.Hyper.of(3, 1e-2, (0.9, 0.99), 1e-8, 0.1)
    scaled = [code8.quantize(m, adamw.BLOCK, "dynamic") for m in moments]
    squares = [code8.quantize(m.square(), adamw.BLOCK, "dynamic-unsigned") for m in moments]

    def decoded(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (codes1, absmax1), (codes2, absmax2) = first, second
        return (
            code8.dequantize(codes1.cpu(), absmax1.cpu(), adamw.BLOCK, "dynamic"),
            code8.dequantize(codes2.cpu(), absmax2.cpu(), adamw.BLOCK, "dynamic-unsigned"),
        )

    def run(step: Callable[..., None], device: str) -> Named:
        p = [t.to(device, copy=True) for t in params]
        states = [[pair[i].to(device, copy=True) for pair in pairs] for i in (0, 1) for pairs in (scaled, squares)]
        hyper = torch.tensor([h.row()] * len(p), dtype=torch.float64, device=device)
        step(p, [g.to(device) for g in grads], *states, hyper, None, torch.zeros(1, device=device), False)
        m, v = zip(*(decoded((c1, a1), (c2, a2)) for c1, c2, a1, a2 in zip(*states)))
        return _named(parameter=p, moment=m, square=v)

    pairs = [decoded(*pair) for pair in zip(scaled, squares)]
    exact = [
        adamw.adamw(p.double(), g.double(), m.double(), v.double(), h, False)
        for p, g, (m, v) in zip(params, grads, pairs)
    ]
    truth = _named(**dict(zip(("parameter", "moment", "square"), zip(*exact))))
    return run(torch.ops.sana_ext.adamw8bit_step, device), run(adam_op._step, "cpu"), truth
