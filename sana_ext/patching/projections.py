"""The projections of self-attention as one matrix product, on GPUs.

`pack` moves the weights of q, k and v next to each other in memory, where they stay the parameters they are; `packed`
sees three that lie so as one. A product with 2240 columns leaves the last wave of a large GPU half empty, one with 6720
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._plain import parameter

DEVICES = ("cuda",)


def pack(layers: Sequence[Any]) -> None:
    """Packs the weights, and the biases, of linear layers that own theirs; other layers stay as they are."""
    for name in ("weight", "bias"):
        tensors = [layer._parameters.get(name) for layer in layers]
        if _joined(tensors) is not None or not all(_movable(t) for t in tensors):
            continue
        if len({(t.shape, t.dtype, t.device) for t in tensors}) != 1:
            continue
        with torch.no_grad():
            together = torch.cat([t.data for t in tensors])
        for t, part in zip(tensors, together.chunk(len(tensors))):
            t.data = part


def packed(layers: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The layers as one: weight and bias, if they lie one after the other. For products without gradients."""
    weight = _joined([parameter(layer, "weight") for layer in layers])
    biases = [parameter(layer, "bias") for layer in layers]
    if weight is None or all(b is None for b in biases):
        return None if weight is None else (weight, None)
    bias = _joined(biases)
    return None if bias is None else (weight, bias)


def _movable(t: Any) -> bool:
    """A parameter with memory of its own: not a slice of a file or of a wrapper's flat buffer."""
    if type(t) is not nn.Parameter or t.device.type not in DEVICES or t.layout != torch.strided or t.is_inference():
        return False
    return t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes


def _joined(tensors: Sequence[Any]) -> torch.Tensor | None:
    first = tensors[0]
    if any(type(t) is not nn.Parameter for t in tensors) or first.device.type not in DEVICES:
        return None
    storage, at = first.untyped_storage().data_ptr(), first.storage_offset()
    for t in tensors:
        alike = t.shape == first.shape and t.dtype == first.dtype and t.is_contiguous()
        if not alike or t.untyped_storage().data_ptr() != storage or t.storage_offset() != at:
            return None
        at += t.numel()
    return first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride())
