"""Reference of CAME with an 8-bit first moment: one parameter's update in four phases, plain PyTorch.

With g the gradient, R rows and C columns, beta = (b1, b2, b3), eps = (e1, e2), threshold d (arXiv:2307.02047):

    row <- b2 row + (1 - b2) mean over columns of (g^2 + e1)         col: the same, mean over rows
    u    = g / sqrt(row / mean(row)) / sqrt(col)                     u <- u / max(1, rms(u) / d)
    m   <- b1 m + (1 - b1) u
    res_row, res_col <- the same averages, with b3, of (u - m)^2 + e2
    p   <- p - lr * weight_decay * p - lr * m / sqrt(res_row / mean(res_row)) / sqrt(res_col)

A parameter without rows and columns: v <- b2 v + (1 - b2) (g^2 + e1), u = g / sqrt(v), and p's step is lr * m. Nothing corrects the
averages for their start at zero, so the first steps are large: about 11 lr rms, 7 at step 10, 2.5 at 100, below 1 after about 1,000;
CAME needs a warm-up. `correct` divides m, col (v) and res_col by 1 - beta^t at their use: the first step is then 1.1 lr rms.

The phases end where a number over the whole parameter is needed: 0 sums g^2, 1 sums u^2, 2 sums the residual, 3 updates. Between them
the processes that share a sharded parameter add up what `work` holds. Only phases 1 and 3 change any state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import code8
from .rounding import round_by_chance


@dataclass(frozen=True)
class Geometry:
    """A parameter as `matrices` matrices [rows, cols], and how its momentum is cut into 8-bit blocks.

    A row is cut into cols // block pieces, as equal as can be, so of `block` values or a few more; a row shorter than twice
    that is one block. Rows of fewer than 64 values go together: a unit is `unit_rows` of them, a power of two, and one
    block. So a block never crosses two shards that are cut between units.
    """

    matrices: int
    rows: int
    cols: int
    factored: bool
    block: int

    @staticmethod
    def of(shape: tuple[int, ...], block: int = 256) -> Geometry:
        """A matrix is factored, and so is a convolution of kernel size 1. Tensors of more dimensions are a batch of
        matrices (the last two) where that is less state than one number per value; else, as vectors are, unfactored."""
        shape = trimmed(shape)
        if len(shape) >= 2:
            *lead, rows, cols = shape
            if len(shape) == 2 or 2 * (rows + cols) < rows * cols:
                return Geometry(math.prod(lead), rows, cols, True, block)
        rows = shape[0] if shape else 1
        return Geometry(1, rows, math.prod(shape[1:]), False, block)

    @property
    def unit_rows(self) -> int:
        least = min(64, self.block)
        if self.cols >= least or not self.cols or not self.rows:
            return 1
        return min(1 << (-(-least // self.cols) - 1).bit_length(), self.rows)

    @property
    def units(self) -> int:
        """The number of units of one matrix."""
        return -(-self.rows // self.unit_rows)

    @property
    def length(self) -> int:
        """The length of a block that is not the last one of its row or matrix."""
        return self.unit_rows * self.cols if self.unit_rows > 1 else -(-self.cols // max(1, self.cols // self.block))

    @property
    def blocks(self) -> int:
        """The number of blocks of one unit."""
        return -(-self.cols // self.length) if self.unit_rows == 1 and self.cols else 1

    @property
    def work(self) -> list[int]:
        """Sizes of the parts of the work tensor: sum, col, square, res_sum, res_col, row, res_row."""
        if not self.factored:
            return [0, 0, 1, 0, 0, 0, 0]
        b, r, c = self.matrices, self.rows, self.cols
        return [b, b * c, 1, b, b * c, b * r, b * r]

    def quantize(self, m: Tensor, code: str) -> tuple[Tensor, Tensor]:
        """m of any shape -> (uint8 of its shape, fp32 scales [matrices * units, blocks], of linear code [..., 2])."""
        rows = self._segments(m)
        length, block = rows.shape[1], self.length
        short = -length % block
        padded = torch.cat([rows, rows[:, -1:].expand(-1, short)], 1) if short else rows  # moves neither min nor max
        codes, scales = code8.quantize(padded, block, code)
        return codes[:, :length].reshape(m.shape), scales.view(-1, self.blocks, *scales.shape[1:])

    def dequantize(self, codes: Tensor, scales: Tensor, code: str) -> Tensor:
        rows = self._segments(codes)
        length, block = rows.shape[1], self.length
        padded = torch.nn.functional.pad(rows, (0, -length % block))
        values = code8.dequantize(padded, scales.reshape(-1, *((2,) if code == "linear" else ())), block, code)
        return values[:, :length].reshape(codes.shape)

    def _segments(self, t: Tensor) -> Tensor:
        """[n, length]: what is cut into blocks without a rest carried over."""
        return t.reshape(-1, self.cols if self.unit_rows == 1 else self.rows * self.cols)


@dataclass(frozen=True)
class Hyper:
    """One parameter's numbers of one step; the order is that of the op's tensor `hyper`."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    beta3: float
    eps1: float
    eps2: float
    clip: float
    factor: float  # of the gradient
    correct1: float  # 1 / (1 - beta^t), or 1
    correct2: float
    correct3: float
    rows: float  # of the whole parameter, where it is sharded
    numel: float


@dataclass(frozen=True)
class State:
    """exp_avg: uint8 with scales, or floating point; second: row [B, R] or, not factored, v. Shapes as Geometry has them."""

    exp_avg: Tensor
    scales: Tensor
    second: Tensor
    col: Tensor
    res_row: Tensor
    res_col: Tensor
    work: Tensor


def came8bit_phase(
    phase: int,
    p: Tensor,
    g: Tensor,
    state: State,
    h: Hyper,
    geometry: Geometry,
    code: str,
    seed: int | None = None,
) -> Tensor | None:
    """Runs one phase in place; phase 0 returns whether g is finite (its squares, too).

    seed: rounds a bf16 parameter up or down by chance, in proportion; None: to the nearest.
    """
    shape = geometry.matrices, geometry.rows, geometry.cols
    acc = state.second.dtype
    b, r, c = shape
    total, col, square, res_total, res_col, row, res_row = state.work.split(geometry.work)
    g = (g.to(acc) * h.factor).view(shape)
    if phase == 0:
        squares = g * g
        if geometry.factored:
            means = squares.mean(2)
            row.copy_(means.flatten())
            col.copy_(squares.sum(1).flatten())
            total.copy_(_average(state.second.view(b, r), means + h.eps1, h.beta2).sum(1))
        return torch.isfinite(squares.sum())
    if phase == 1:
        if geometry.factored:
            mean = total.view(b, 1) / h.rows
            new = _average(state.second.view(b, r), row.view(b, r) + h.eps1, h.beta2)
            state.second.copy_(new.view(state.second.shape))
            state.col.copy_(_average(state.col, col.view_as(state.col) / h.rows + h.eps1, h.beta2))
            row.copy_((new / mean).rsqrt().flatten())
            col.copy_((state.col * h.correct2).rsqrt().flatten())
        else:
            state.second.copy_(_average(state.second, (g * g).view_as(state.second) + h.eps1, h.beta2))
        square.copy_(_unclipped(g, state, h, geometry).square().sum())
        return None
    if phase == 2 and not geometry.factored:
        return None
    u = _unclipped(g, state, h, geometry) / ((square / h.numel).sqrt() / h.clip).clamp(min=1.0)
    m = state.exp_avg
    if m.dtype == torch.uint8:
        m = geometry.dequantize(m, state.scales, code)
    m = _average(m.to(acc).view(shape), u, h.beta1)
    if phase == 2:
        residual = (u - m).square()
        means = residual.mean(2)
        res_row.copy_(means.flatten())
        res_col.copy_(residual.sum(1).flatten())
        res_total.copy_(_average(state.res_row.view(b, r), means + h.eps2, h.beta3).sum(1))
        return None
    update = m * h.correct1
    if geometry.factored:
        mean = res_total.view(b, 1) / h.rows
        new = _average(state.res_row.view(b, r), res_row.view(b, r) + h.eps2, h.beta3)
        state.res_row.copy_(new.view(state.res_row.shape))
        state.res_col.copy_(_average(state.res_col, res_col.view_as(state.res_col) / h.rows + h.eps2, h.beta3))
        update = update * (new / mean).rsqrt()[..., None] * (state.res_col.view(b, 1, c) * h.correct3).rsqrt()
    value = p.to(acc)
    value = value - value * (h.lr * h.weight_decay) - (h.lr * update).view(p.shape)
    p.copy_(value if seed is None else round_by_chance(value, seed))
    if state.exp_avg.dtype == torch.uint8:
        codes, scales = geometry.quantize(m, code)
        state.exp_avg.copy_(codes.view(state.exp_avg.shape))
        state.scales.copy_(scales.view(state.scales.shape))
    else:
        state.exp_avg.copy_(m.view(state.exp_avg.shape))
    return None


def trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axes of length 1 behind the second."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _unclipped(g: Tensor, state: State, h: Hyper, geometry: Geometry) -> Tensor:
    if not geometry.factored:
        return g * (state.second.view(g.shape) * h.correct2).rsqrt()
    b, r, c = g.shape
    _, col, _, _, _, row, _ = state.work.split(geometry.work)
    return g * row.view(b, r, 1) * col.view(b, 1, c)


def _average(old: Tensor, new: Tensor, beta: float) -> Tensor:
    return old * beta + new * (1 - beta)
