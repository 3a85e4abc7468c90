"""Reference of linear: y = x W^T + b, also as a 1x1 convolution.

Backward: dx = dy W;  dW = dy^T x;  db = sum dy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor,  # [..., K]
    weight: torch.Tensor,  # [F, K] or [F, K, 1, 1]
    bias: torch.Tensor | None = None,  # [F]
) -> torch.Tensor:  # [..., F]
    return F.linear(x, weight.flatten(1), bias)


def linear_backward(
    dy: torch.Tensor,  # [M, F]
    x: torch.Tensor | None,  # [M, K]
    weight: torch.Tensor | None,  # [F, K]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(dx, dweight, dbias) in the accumulator type; dx needs the weight, dweight needs x."""
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dy = dy.to(acc)
    dx = None if weight is None else dy @ weight.to(acc)
    dweight = None if x is None else dy.t() @ x.to(acc)
    return dx, dweight, dy.sum(0)
