"""Reference of AdamW with 8-bit states: one parameter's step in plain PyTorch.

With g the gradient times `factor`, at step t (from 1), decoupled weight decay (arXiv:1711.05101), states as in arXiv:2110.02861:

    m <- beta1 m + (1 - beta1) g                      v <- beta2 v + (1 - beta2) g^2
    p <- p (1 - lr weight_decay)
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

m and v are decoded from bytes before and encoded after; the parameter moves by the fresh values. A positive v never becomes 0 (see
`code8`), and a v of 0 beside an m that is not, as bitsandbytes stores it, counts as the smallest value of its block. A bf16
parameter is rounded once, after both lines. ``bitsandbytes_cuda`` is the order of bitsandbytes' CUDA kernel (its CPU code has the
order above):

    p <- round(p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + sqrt(1 - beta2^t) eps));  p <- round(p (1 - lr weight_decay))

and a negative m never becomes the byte of 0, but that of the smallest negative value.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from . import code8
from .rounding import round_by_chance

BLOCK = 256


@dataclass(frozen=True)
class Hyper:
    """One parameter's numbers of one step; the order is that of the columns of the op's tensor `hyper`."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float  # 1 - beta2
    size: float  # of the step: p -= size * m / (sqrt(v) * root + eps)
    root: float
    eps: float
    keep: float  # p *= keep
    factor: float  # of the gradient

    @staticmethod
    def of(
        step: float,  # from 1
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        factor: float = 1.0,
        bitsandbytes_cuda: bool = False,
    ) -> Hyper:
        beta1, beta2 = betas
        correct1, correct2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        keep = 1 - lr * weight_decay
        if not bitsandbytes_cuda:
            return Hyper(beta1, 1 - beta1, beta2, 1 - beta2, lr / correct1, 1 / correct2, eps, keep, factor)
        size, eps = lr * correct2 / correct1, eps * correct2
        return Hyper(beta1, rest32(beta1), beta2, rest32(beta2), size, 1.0, eps, keep, factor)

    def row(self) -> list[float]:
        return list(astuple(self))


def adamw8bit(
    p: Tensor,
    grad: Tensor,
    state1: Tensor,  # of p's shape: uint8 (signed dynamic code) or floating point
    state2: Tensor,  # of p's shape: uint8 (unsigned dynamic code) or floating point
    absmax1: Tensor,  # [ceil(numel / 256)] fp32; of no elements where the states are not uint8
    absmax2: Tensor,
    h: Hyper,
    seed: int = -1,
    bitsandbytes_cuda: bool = False,
) -> None:
    """One step in place. seed: rounds a bf16 parameter by chance (`rounding.round_by_chance`); -1: to the nearest."""
    quantised = state1.dtype == torch.uint8
    acc = torch.float32 if quantised else state1.dtype
    m = code8.dequantize(state1, absmax1, BLOCK, "dynamic") if quantised else state1
    v = code8.dequantize(state2, absmax2, BLOCK, "dynamic-unsigned") if quantised else state2
    if quantised:
        least = code8.dequantize(torch.ones_like(state2), absmax2, BLOCK, "dynamic-unsigned")
        v = torch.where(m != 0, torch.maximum(v, least), v)
    value, m, v = adamw(p.to(acc), grad.to(acc), m, v, h, bitsandbytes_cuda, p.dtype)
    p.copy_(round_by_chance(value, seed) if seed >= 0 and p.dtype == torch.bfloat16 else value)
    if not quantised:
        state1.copy_(m)
        state2.copy_(v)
        return
    codes, scales = code8.quantize(m, BLOCK, "dynamic")
    if bitsandbytes_cuda:
        codes = torch.where((m < 0) & (codes == 127), 126, codes)
    state1.copy_(codes)
    absmax1.copy_(scales)
    codes, scales = code8.quantize(v, BLOCK, "dynamic-unsigned")
    state2.copy_(codes)
    absmax2.copy_(scales)


def adamw(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    h: Hyper,
    bitsandbytes_cuda: bool = False,
    rounding: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, v) after the step, in their own dtype; rounding: p's stored dtype, for the rounding between the two lines."""
    g = grad * h.factor
    m = m * h.beta1 + g * h.rest1
    v = v * h.beta2 + g * g * h.rest2
    update = m / (v.sqrt() * h.root + h.eps) * h.size
    if bitsandbytes_cuda:
        return (p - update).to(rounding or p.dtype).to(p.dtype) * h.keep, m, v
    return p * h.keep - update, m, v


def rest32(beta: float) -> float:
    """1 - beta as fp32 arithmetic has it."""
    one = torch.ones((), dtype=torch.float32)
    return (one - torch.tensor(beta, dtype=torch.float32)).item()
