"""Reference of the norm_modulate family: LayerNorm with adaptive modulation, gated residuals, and both in one.

SANA's block (arXiv:2410.10629, section 2.2; diffusers ``SanaTransformerBlock.forward``), with (shift, scale, gate) from adaLN-single:

    z = x + gate * y                              gated_residual (gate = 1 after cross-attention)
    n = LN(z) * (1 + scale) + shift               norm_modulate;  LN(z) = (z - mean) / sqrt(var + eps), no affine part

Backward, with xhat = LN(z), r = 1 / sqrt(var + eps) and g = dn * (1 + scale), means over C, sums over N:

    dz += r * (g - mean(g) - xhat * mean(g * xhat))
    dshift = sum dn;  dscale = sum dn * xhat;  dx = dz;  dy = gate * dz;  dgate = sum dz * y
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm_modulate(
    x: torch.Tensor,  # [B, N, C]
    shift: torch.Tensor,  # [B, C] or [B, 1, C]
    scale: torch.Tensor,  # [B, C] or [B, 1, C]
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:  # [B, N, C]
    n = F.layer_norm(x, x.shape[-1:], eps=eps)
    n = n * (1 + _row(scale)) + _row(shift)
    return n.to(out_dtype or x.dtype)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x + _row(gate) * y).to(x.dtype)


def residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    z = (x + y).to(x.dtype) if gate is None else gated_residual(x, y, gate)
    return z, norm_modulate(z, shift, scale, eps=eps, out_dtype=out_dtype or y.dtype)


def row_statistics(z: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal standard deviation of each row, in the accumulator type: [B, N] each."""
    acc = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    var, mean = torch.var_mean(acc, dim=-1, correction=0)
    return mean, torch.rsqrt(var + eps)


def norm_modulate_backward(
    dn: torch.Tensor,  # [B, N, C]
    z: torch.Tensor,  # [B, N, C]
    scale: torch.Tensor,  # [B, C]
    mean: torch.Tensor,  # [B, N]
    rstd: torch.Tensor,  # [B, N]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dz, dshift, dscale) in the accumulator type."""
    acc = mean.dtype
    r = rstd[..., None]
    xhat = (z.to(acc) - mean[..., None]) * r
    d = dn.to(acc)
    g = d * (1 + scale.to(acc)[:, None])
    dz = r * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dz, d.sum(1), (d * xhat).sum(1)


def gated_residual_backward(
    dz: torch.Tensor,  # [B, N, C]
    y: torch.Tensor,  # [B, N, C]
    gate: torch.Tensor,  # [B, C]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy, dgate) in the accumulator type; dx is dz itself."""
    acc = torch.float64 if dz.dtype == torch.float64 else torch.float32
    return dz.to(acc) * gate.to(acc)[:, None], (dz.to(acc) * y.to(acc)).sum(1)


def _row(coefficient: torch.Tensor) -> torch.Tensor:
    return coefficient[:, None] if coefficient.dim() == 2 else coefficient
