"""cross_attention: torch's own, except where fp32 arithmetic is the faster one for 16-bit tensors on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from . import _checks as check
from ._arithmetic import autocast_dtype, operand_dtype, upcast
from ._library import accumulator_dtype, define, differentiable

STEM = "cross_attention"
_op = torch.ops.sana_ext

#: Elements of one block's [images, heads, N, T] probabilities in the backward: 4 MB of fp32, what a cache holds.
BLOCK_ELEMENTS = 1 << 20

#: N T D of one head below which torch's 16-bit backward on CPUs takes longer than the fp32 one, even with 16-bit
#: arithmetic: it spends 0.1 ms on every head of every image (64 x 4 heads of 64 x 17 x 32: benchmarks/bench_linear.py).
SMALL_HEAD = 1 << 20


# Schema and default kernels. No compiled kernel: torch's fp32 attention and fp32 matrix products are what is wanted.


def _cross_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    acc = accumulator_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        return reference.cross_attention(q.to(acc), k.to(acc), v.to(acc), mask).to(q.dtype).contiguous()


def _cross_attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return q.new_empty(q.shape)


def _cross_attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> Any:
    """The probabilities are computed again, a block of images or heads at a time: q, k and v are all that is kept."""
    B, N, H, _ = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    per_head = max(1, N * k.shape[1])
    heads = max(1, min(H, BLOCK_ELEMENTS // per_head))
    images = max(1, BLOCK_ELEMENTS // (per_head * heads))
    mask = reference.attention_mask(mask)
    with torch.autocast(q.device.type, enabled=False):
        for b in range(0, B, images):
            for h in range(0, H, heads):
                at = slice(b, b + images), slice(None), slice(h, h + heads)
                part = mask
                if mask is not None:
                    part = mask[
                        at[0] if mask.shape[0] > 1 else slice(None), at[2] if mask.shape[1] > 1 else slice(None)
                    ]
                grads = reference.cross_attention_backward(dout[at], q[at], k[at], v[at], part)
                for total, grad in zip((dq, dk, dv), grads):
                    total[at] = grad
    return dq, dk, dv


def _cross_attention_backward_fake(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


define(
    STEM,
    "cross_attention_forward",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
    _cross_attention,
    _cross_attention_fake,
)
define(
    STEM,
    "cross_attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor dq, Tensor dk, Tensor dv)",
    _cross_attention_backward,
    _cross_attention_backward_fake,
)


# Autograd


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dout: torch.Tensor) -> Any:
    return *_op.cross_attention_backward(dout, *ctx.saved_tensors), None


differentiable("cross_attention_forward", _autograd, _context, "cross_attention_backward")


def cross_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D) + mask) v`` per head: torch's own, except for some bf16 and fp16 on CPUs.

    On CPUs without 16-bit arithmetic, and for small heads that need gradients (`SMALL_HEAD`), the arithmetic is fp32 and
    the result is rounded once.

    Args:
        q: [B, N, H, D], float; any strides (q, k or v whose elements share memory, expanded or unfolded, is copied).
        k, v: [B, T, H, D], dtype of q, except under autocast.
        mask: None; bool, True where a key takes part; or float, added to the scores (SANA: 0 and -10000). Shape [B, T],
            [B, 1, T], [B, N, T] or four dimensions that broadcast to [B, H, N, T]. It gets no gradient.

    Returns:
        [B, N, H, D], dtype of q (autocast's dtype under autocast). Where a bool mask leaves no key the result is 0.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.

    Source: ``torch.nn.functional.scaled_dot_product_attention``.
    """
    _check(q, k, v, mask)
    q, k, v = map(check.without_overlap, (q, k, v))
    if not upcast(q) and not _small_backward(q, k, v):
        return reference.cross_attention(q, k, v, mask)
    check.plain_autograd("cross_attention", q=q, k=k, v=v)
    dtype = operand_dtype(q)
    return _op.cross_attention_forward(q.to(dtype), k.to(dtype), v.to(dtype), mask)


def _small_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    if q.device.type != "cpu" or operand_dtype(q).itemsize != 2 or q.shape[1] * q.shape[3] * k.shape[1] >= SMALL_HEAD:
        return False
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
    op = "cross_attention"
    check.tensor(op, "q", q, 4, "[B, N, H, D]")
    B, N, H, D = q.shape
    if H == 0 or D == 0:
        raise ValueError(f"sana_ext.{op}: q must have at least one head and one channel per head, got {list(q.shape)}")
    check.tensor(op, "k", k, 4, "[B, T, H, D]")
    T = k.shape[1]
    if T == 0:
        raise ValueError(f"sana_ext.{op}: k must have at least one token, got {list(k.shape)}")
    check.shape(op, "k", k, (B, T, H, D), "[B, T, H, D]")
    check.tensor(op, "v", v, 4, "[B, T, H, D]")
    check.shape(op, "v", v, (B, T, H, D), "[B, T, H, D]")
    check.together(op, q=q, k=k, v=v)
    if autocast_dtype(q.device) is None:
        check.same_dtype(op, q=q, k=k, v=v)
    if mask is None:
        return
    layout = "[B, T], [B, 1, T], [B, N, T] or broadcastable to [B, H, N, T]"
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3, 4):
        got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"sana_ext.{op}: mask must be a torch.Tensor {layout}, got {got}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"sana_ext.{op}: mask has dtype {check.short(mask.dtype)}; it must be bool or floating point")
    if mask.device != q.device:
        raise ValueError(f"sana_ext.{op}: mask is on {mask.device}, q on {q.device}; all tensors must share one device")
    if mask.requires_grad:
        raise ValueError(f"sana_ext.{op}: mask requires grad, but gets no gradient; pass mask.detach()")
    full = {2: (B, T), 3: (B, N, T), 4: (B, H, N, T)}[mask.dim()]
    *outer, last = zip(mask.shape, full)
    if last[0] != last[1] or any(size not in (1, wanted) for size, wanted in outer):
        raise ValueError(
            f"sana_ext.{op}: mask must have shape {layout} with B={B}, H={H}, N={N}, T={T}, got {list(mask.shape)}"
        )
