"""dwconv_glu and glumbconv: SANA's Mix-FFN; the GEMMs are `linear`, everything between them is one kernel."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from . import _checks as check
from ._library import accumulator_dtype, define, differentiable, without_autocast
from .linear import linear

STEM = "glumbconv"
_op = torch.ops.sana_ext


# Schema and default kernels


@without_autocast
def _dwconv_glu(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, height: int, width: int
) -> torch.Tensor:
    return reference.dwconv_glu(u, weight, bias, height, width).contiguous()


def _dwconv_glu_fake(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, height: int, width: int
) -> torch.Tensor:
    return u.new_empty(u.shape[0], u.shape[1], u.shape[2] // 2)


def _none(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=accumulator_dtype(like.dtype))


@without_autocast
def _dwconv_glu_backward(
    dout: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    height: int,
    width: int,
    parameter_grads: bool,
) -> Any:
    du, dweight, dbias = reference.dwconv_glu_backward(dout, u, weight, bias, height, width)
    du = du.to(u.dtype).contiguous()
    if not parameter_grads:
        return du, _none(u), _none(u)
    return du, dweight.to(weight.dtype), _none(u) if bias is None else dbias.to(bias.dtype)


def _dwconv_glu_backward_fake(
    dout: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    height: int,
    width: int,
    parameter_grads: bool,
) -> Any:
    du = u.new_empty(u.shape)
    if not parameter_grads:
        return du, _none(u), _none(u)
    return du, weight.new_empty(weight.shape), _none(u) if bias is None else bias.new_empty(bias.shape)


define(
    STEM,
    "dwconv_glu_forward",
    "(Tensor u, Tensor weight, Tensor? bias, SymInt height, SymInt width) -> Tensor",
    _dwconv_glu,
    _dwconv_glu_fake,
)
define(
    STEM,
    "dwconv_glu_backward",
    "(Tensor dout, Tensor u, Tensor weight, Tensor? bias, SymInt height, SymInt width, bool parameter_grads)"
    " -> (Tensor du, Tensor dweight, Tensor dbias)",
    _dwconv_glu_backward,
    _dwconv_glu_backward_fake,
)


# Autograd


def _dwconv_glu_context(ctx: Any, inputs: Any, output: Any) -> None:
    u, weight, bias, ctx.height, ctx.width = inputs
    ctx.save_for_backward(u, weight, bias)


def _dwconv_glu_autograd(ctx: Any, dout: torch.Tensor) -> Any:
    u, weight, bias = ctx.saved_tensors
    # Frozen weights (LoRA training) save a third of the arithmetic.
    parameter_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    du, dweight, dbias = _op.dwconv_glu_backward(dout, u, weight, bias, ctx.height, ctx.width, parameter_grads)
    if not parameter_grads:
        return du, None, None, None, None
    return du, dweight, None if bias is None else dbias, None, None


differentiable("dwconv_glu_forward", _dwconv_glu_autograd, _dwconv_glu_context, "dwconv_glu_backward")


# Public functions


def _grid(op: str, height: object, width: object, name: str, tokens: int) -> None:
    """height and width are positive integers and height * width tokens were given."""
    for axis, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"sana_ext.{op}: {axis} must be an integer, got {type(value).__name__} {value!r}")
        if value < 1:
            raise ValueError(f"sana_ext.{op}: {axis} must be at least 1, got {value}")
    if height * width != tokens:  # type: ignore[operator]
        raise ValueError(f"sana_ext.{op}: {name} has {tokens} tokens, which is not height * width = {height} * {width}")


def _depthwise(op: str, names: tuple[str, str], weight: object, bias: object, channels: int) -> None:
    check.tensor(op, names[0], weight, 4, "[2F, 1, 3, 3]")
    check.shape(op, names[0], weight, (channels, 1, 3, 3), "[2F, 1, 3, 3]")  # type: ignore[arg-type]
    if bias is not None:
        check.tensor(op, names[1], bias, 1, "[2F]")
        check.shape(op, names[1], bias, (channels,), "[2F]")  # type: ignore[arg-type]


def dwconv_glu(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, height: int, width: int
) -> torch.Tensor:
    """The middle of SANA's Mix-FFN in one pass: ``[a | g] = DW3x3(silu(u)) + bias;  a * silu(g)``.

    Args:
        u: [B, N, 2F], float, before SiLU; N = height * width, row by row; any strides (channels that are not dense
            are copied).
        weight: [2F, 1, 3, 3], float, the depthwise taps (cross-correlation, zeros around the image).
        bias: [2F], float, or None.
        height, width: the token grid.

    Returns:
        [B, N, F], contiguous, dtype of u. Arithmetic is fp32 (fp64 for fp64 input) whatever the dtypes; weight and bias
        may be fp32 beside a 16-bit u. Only u, weight and bias are kept for the backward, which recomputes the rest.

    Raises:
        ValueError, TypeError: a shape, dtype, device or size that does not fit; the message names the argument.

    Source: arXiv:2410.10629, section 2.2; diffusers ``GLUMBConv``.
    """
    op = "dwconv_glu"
    check.tensor(op, "u", u, 3, "[B, N, 2F]")
    if u.shape[2] % 2 or u.shape[2] == 0:
        raise ValueError(f"sana_ext.{op}: u must have an even, positive number of channels 2F, got {list(u.shape)}")
    _grid(op, height, width, "u", u.shape[1])
    _depthwise(op, ("weight", "bias"), weight, bias, u.shape[2])
    check.together(op, u=u, weight=weight, bias=bias)
    check.plain_autograd(op, u=u, weight=weight, bias=bias)
    return _op.dwconv_glu_forward(u, weight, bias, height, width)


def _projection(op: str, name: str, weight: object, bias: object, layout: str) -> torch.Tensor:
    """[out, in] or [out, in, 1, 1] -> [out, in]."""
    check.tensor(op, name, weight, (2, 4), f"{layout} or {layout[:-1]}, 1, 1]")
    assert isinstance(weight, torch.Tensor)
    if weight.dim() == 4:
        check.shape(op, name, weight, (*weight.shape[:2], 1, 1), f"{layout[:-1]}, 1, 1]")
        weight = weight.flatten(1)
    if bias is not None:
        check.tensor(op, f"b{name[1:]}", bias, 1, "[2F]")
        check.shape(op, f"b{name[1:]}", bias, (weight.shape[0],), "[2F]")  # type: ignore[arg-type]
    return weight


def glumbconv(
    x: torch.Tensor,
    w_in: torch.Tensor,
    b_in: torch.Tensor | None,
    w_dw: torch.Tensor,
    b_dw: torch.Tensor | None,
    w_out: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """SANA's Mix-FFN: ``W_out dwconv_glu(W_in x + b_in)``.

    Args:
        x: [B, N, C], float; N = height * width, row by row.
        w_in: [2F, C] or [2F, C, 1, 1], float, the inverted 1x1 convolution.
        b_in: [2F], float, or None.
        w_dw: [2F, 1, 3, 3], float, the depthwise taps.
        b_dw: [2F], float, or None.
        w_out: [C, F] or [C, F, 1, 1], float, the pointwise 1x1 convolution, which has no bias.
        height, width: the token grid.

    Returns:
        [B, N, C], contiguous; dtype of `linear`'s result (that of x outside autocast). No residual, no norm: those of
        diffusers' module stay outside.

    Raises:
        ValueError, TypeError: a shape, dtype, device or size that does not fit; the message names the argument.

    Source: arXiv:2410.10629, section 2.2; diffusers ``GLUMBConv``.
    """
    op = "glumbconv"
    check.tensor(op, "x", x, 3, "[B, N, C]")
    if x.shape[2] == 0:
        raise ValueError(f"sana_ext.{op}: x must have at least one channel, got {list(x.shape)}")
    _grid(op, height, width, "x", x.shape[1])
    w_in = _projection(op, "w_in", w_in, b_in, "[2F, C]")
    if w_in.shape[0] % 2 or w_in.shape[0] == 0:
        raise ValueError(f"sana_ext.{op}: w_in must have an even, positive number of rows 2F, got {list(w_in.shape)}")
    channels = w_in.shape[0]
    check.shape(op, "w_in", w_in, (channels, x.shape[2]), "[2F, C]")
    _depthwise(op, ("w_dw", "b_dw"), w_dw, b_dw, channels)
    w_out = _projection(op, "w_out", w_out, None, "[C, F]")
    check.shape(op, "w_out", w_out, (w_out.shape[0], channels // 2), "[C, F]")
    check.together(op, x=x, w_in=w_in, b_in=b_in, w_dw=w_dw, b_dw=b_dw, w_out=w_out)
    check.plain_autograd(op, x=x, w_in=w_in, b_in=b_in, w_dw=w_dw, b_dw=b_dw, w_out=w_out)
    u = linear(x, w_in, b_in)
    return linear(_op.dwconv_glu_forward(u, w_dw, b_dw, height, width), w_out)
