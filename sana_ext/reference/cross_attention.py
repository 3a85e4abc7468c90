"""Reference of cross_attention, softmax attention to the text tokens, per head: P = softmax(q k^T / sqrt(D) + mask);  o = P v.

Backward, with D = the head dimension:

    dv = P^T do;  dP = do v^T;  dS = P * (dP - sum_T(P * dP));  dq = dS k / sqrt(D);  dk = dS^T q / sqrt(D)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T], [B, 1, T], [B, N, T] or four dimensions -> four dimensions that broadcast to [B, H, N, T]."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None, None] if mask.dim() == 2 else mask[:, None]


def cross_attention(
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,  # [B, T, H, D]
    v: torch.Tensor,  # [B, T, H, D]
    mask: torch.Tensor | None = None,  # see attention_mask; bool (True = keep) or float (added to the scores)
) -> torch.Tensor:  # [B, N, H, D]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = attention_mask(mask)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def cross_attention_backward(
    dout: torch.Tensor,  # [B, N, H, D]
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,  # [B, T, H, D]
    v: torch.Tensor,  # [B, T, H, D]
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the accumulator type. A row whose keys are all masked out has P = 0, as in torch's attention."""
    acc = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dout, q, k, v = (t.transpose(1, 2).to(acc) for t in (dout, q, k, v))
    scale = q.shape[-1] ** -0.5
    p = (q @ k.mT).mul_(scale)
    mask = attention_mask(mask)
    if mask is not None:
        # Where no key is left, softmax of any row does as long as nothing flows back through it.
        empty = ((~mask) if mask.dtype == torch.bool else mask == float("-inf")).all(-1, keepdim=True)
        dout = dout.masked_fill(empty, 0)
        if mask.dtype == torch.bool:  # added, as torch does: a masked NaN stays one
            mask = torch.zeros_like(mask, dtype=acc).masked_fill_(~mask, float("-inf"))
        p = p.add_(mask.masked_fill(empty, 0))
    p = torch.softmax(p, -1)
    ds = dout @ v.mT
    ds = ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
    dq, dk, dv = (ds @ k).mul_(scale), (ds.mT @ q).mul_(scale), p.mT @ dout
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
