"""Muon for matrices and 1x1 convolutions, its momentum in fp32 or in 8 bits; AdamW for all other parameters.

The momentum is made orthogonal by five Newton-Schulz iterations (Jordan et al. 2024) and scaled so that its rms is that of
AdamW's updates (arXiv:2502.16982), which lets both share one learning rate. An experiment's optimizer: torch's own Muon
takes matrices only. Eight bits are int8 with one fp32 scale for each 256 values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..model.transformer import SanaTransformer

BLOCK = 256  # values that share a scale
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration
RMS = 0.2  # of an update
ITERATIONS = 5


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with singular values near 1, fp32; [rows, columns]."""
    x = matrix / matrix.norm().clamp_min(1e-7)
    flat = x.shape[0] > x.shape[1]
    x = x.T if flat else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flat else x


def packed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [blocks, BLOCK], zero-padded, and each block's scale."""
    flat = nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True) / 127
    return (flat / scale.clamp_min(1e-30)).round().to(torch.int8), scale


def unpacked(codes: torch.Tensor, scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return (codes.float() * scale).flatten()[: shape.numel()].view(shape)


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Tells whether Muon takes a parameter: matrices and 1x1 convolutions of the blocks, whose tables are none."""
    inner = parameter.dim() == 2 or (parameter.dim() == 4 and parameter.shape[2:] == (1, 1))
    return inner and name.startswith("transformer_blocks.") and not name.endswith("scale_shift_table")


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one.

    Args:
        model: its parameters are trained. lr: of both. bits: 32 or 8, of Muon's momentum. momentum: Nesterov's.
        betas: of AdamW.
    """

    def __init__(
        self,
        model: SanaTransformer,
        lr: float,
        *,
        bits: int = 32,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        if bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {bits}")
        split: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            split[is_matrix(name, parameter)].append((name, parameter))
        groups = [{"params": named, "matrices": matrices} for matrices, named in split.items()]
        super().__init__(groups, {"lr": lr, "bits": bits, "momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._orthogonal_step if group["matrices"] else self._adam_step)(p, p.grad.float(), group)

    def _orthogonal_step(self, p: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            average = torch.zeros_like(grad)
        elif group["bits"] == 8:
            average = unpacked(state["codes"], state["scale"], p.shape)
        else:
            average = state["momentum"]
        average = average * group["momentum"] + grad
        if group["bits"] == 8:
            state["codes"], state["scale"] = packed(average)
        else:
            state["momentum"] = average
        update = orthogonal((grad + group["momentum"] * average).view(len(p), -1))
        p.sub_(update.view_as(p), alpha=group["lr"] * RMS * max(update.shape) ** 0.5)

    def _adam_step(self, p: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state |= {"step": torch.zeros(()), "m": torch.zeros_like(grad), "v": torch.zeros_like(grad)}
        state["step"] += 1
        t = state["step"].item()
        state["m"].lerp_(grad, 1 - b1)
        state["v"].lerp_(grad.square(), 1 - b2)
        p.sub_(state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + 1e-8), alpha=group["lr"])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of an optimizer's state."""
    tensors = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)
