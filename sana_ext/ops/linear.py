"""linear: torch's own, except for 16-bit tensors on CPUs without 16-bit arithmetic, where the arithmetic is fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import reference
from . import _checks as check
from ._arithmetic import autocast_dtype, operand_dtype, upcast
from ._library import accumulator_dtype, define, differentiable

STEM = "linear"
_op = torch.ops.sana_ext


# Schema and default kernels, on [M, K] rows. All tensors share one dtype. What is absent is a tensor of no elements.


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    acc = accumulator_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = reference.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return y.to(x.dtype).contiguous()


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear_backward(dy: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None, bias: bool) -> Any:
    with torch.autocast(dy.device.type, enabled=False):
        dx, dweight, dbias = reference.linear_backward(dy, x, weight)
    return tuple(dy.new_empty(0) if d is None else d.to(dy.dtype) for d in (dx, dweight, dbias if bias else None))


def _linear_backward_fake(dy: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None, bias: bool) -> Any:
    dx = dy.new_empty(0) if weight is None else dy.new_empty(dy.shape[0], weight.shape[1])
    dweight = dy.new_empty(0) if x is None else dy.new_empty(dy.shape[1], x.shape[1])
    return dx, dweight, dy.new_empty(dy.shape[1] if bias else 0)


define(STEM, "linear_forward", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _linear_fake)
define(
    STEM,
    "linear_backward",
    "(Tensor dy, Tensor? x, Tensor? weight, bool bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _linear_backward,
    _linear_backward_fake,
)


# Autograd: keep x only for dweight, the weight only for dx.


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _autograd(ctx: Any, dy: torch.Tensor) -> Any:
    needed = ctx.needs_input_grad[:3]
    grads = _op.linear_backward(dy, *ctx.saved_tensors, needed[2])
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needed))


differentiable("linear_forward", _autograd, _context, "linear_backward")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x weight^T + bias``: torch's own, except on CPUs without arithmetic for the operands' 16-bit dtype.

    There the products run in fp32 and the result, bias included, is rounded once. The weight is converted panel by
    panel into a scratch, never as a whole. In fp32 on CPUs the bias of a large result is added after the product.
    Autocast casts the operands as it does for ``torch.nn.functional.linear``.

    Args:
        x: [..., K], float; any strides.
        weight: [F, K], or [F, K, 1, 1] (a 1x1 convolution); dtype of x, except under autocast.
        bias: [F] or None; dtype of x, except under autocast.

    Returns:
        [..., F], dtype of x (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.

    Source: ``torch.nn.functional.linear``.
    """
    _check(x, weight, bias)
    weight = weight.flatten(1)
    if not upcast(x):
        return F.linear(x, weight, bias)
    check.plain_autograd("linear", x=x, weight=weight, bias=bias)
    dtype = operand_dtype(x)
    rows = (x if x.dim() > 1 else x[None]).flatten(0, -2)
    y = _op.linear_forward(rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check.tensor("linear", "weight", weight, (2, 4), "[F, K] or [F, K, 1, 1]")
    check.tensor("linear", "x", x, tuple(range(1, 65)), "[..., K]")
    given = {"x": x, "weight": weight}
    check.shape("linear", "x", x, (*x.shape[:-1], weight.shape[1]), "[..., K]")
    if weight.dim() == 4:
        check.shape("linear", "weight", weight, (*weight.shape[:2], 1, 1), "[F, K, 1, 1]")
    if bias is not None:
        check.tensor("linear", "bias", bias, 1, "[F]")
        check.shape("linear", "bias", bias, (weight.shape[0],), "[F]")
        given["bias"] = bias
    check.together("linear", **given)
    if autocast_dtype(x.device) is None:
        check.same_dtype("linear", **given)
