"""Stochastic rounding of fp32 to bf16, by counters: element i of a tensor draws hash(i, seed), on every machine the same."""

from __future__ import annotations

import torch
from torch import Tensor


def round_by_chance(value: Tensor, seed: int) -> Tensor:
    """fp32 values -> fp32 values that bf16 has: away from zero with the probability of the fraction that is cut off.

    Infinity stays, NaN stays NaN; a value within the last bf16 step below infinity may become infinity.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    index = torch.arange(value.numel(), device=value.device).view(value.shape)
    rounded = (bits + (random_bits(index, seed) >> 16)) & 0xFFFF0000
    rounded = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value)


def random_bits(index: Tensor, seed: int) -> Tensor:
    """32 bits of each int64 index: the finalizer of MurmurHash3 on index * 2654435769 + seed."""
    h = (index * 2654435769 + seed) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
