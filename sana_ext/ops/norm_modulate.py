"""norm_modulate, gated_residual, residual_norm_modulate: the pointwise chain between the GEMMs of a SANA block."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from . import _checks as check
from ._library import accumulator_dtype, define, differentiable

STEM = "norm_modulate"
_op = torch.ops.sana_ext


# Schema and default kernels. Fixed outputs: what is absent is a tensor of no elements.


def _none(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0, dtype=accumulator_dtype(like.dtype))


def _norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> Any:
    n = reference.norm_modulate(x, shift, scale, eps=eps, out_dtype=out_dtype).contiguous()
    return n, *reference.row_statistics(x, eps)


def _norm_modulate_fake(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> Any:
    stats = x.new_empty(x.shape[:2], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _norm_modulate_backward(
    dn: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    shift_dtype: torch.dtype,
) -> Any:
    dx, dshift, dscale = reference.norm_modulate_backward(dn, x, scale, mean, rstd)
    return dx.to(x.dtype).contiguous(), dshift.to(shift_dtype), dscale.to(scale.dtype)


def _norm_modulate_backward_fake(
    dn: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    shift_dtype: torch.dtype,
) -> Any:
    return x.new_empty(x.shape), scale.new_empty(scale.shape, dtype=shift_dtype), scale.new_empty(scale.shape)


define(
    STEM,
    "norm_modulate_forward",
    "(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) -> (Tensor n, Tensor mean, Tensor rstd)",
    _norm_modulate,
    _norm_modulate_fake,
)
define(
    STEM,
    "norm_modulate_backward",
    "(Tensor dn, Tensor x, Tensor scale, Tensor mean, Tensor rstd, ScalarType shift_dtype)"
    " -> (Tensor dx, Tensor dshift, Tensor dscale)",
    _norm_modulate_backward,
    _norm_modulate_backward_fake,
)


def _gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return reference.gated_residual(x, y, gate).contiguous()


def _gated_residual_fake(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gated_residual_backward(dout: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> Any:
    dy, dgate = reference.gated_residual_backward(dout, y, gate)
    return dy.to(y.dtype).contiguous(), dgate.to(gate.dtype)


def _gated_residual_backward_fake(dout: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> Any:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


define(
    STEM, "gated_residual_forward", "(Tensor x, Tensor y, Tensor gate) -> Tensor", _gated_residual, _gated_residual_fake
)
define(
    STEM,
    "gated_residual_backward",
    "(Tensor dout, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)",
    _gated_residual_backward,
    _gated_residual_backward_fake,
)


def _residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Any:
    z, n = reference.residual_norm_modulate(x, y, shift, scale, gate=gate, eps=eps, out_dtype=out_dtype)
    return z.contiguous(), n.contiguous(), *reference.row_statistics(z, eps)


def _residual_norm_modulate_fake(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> Any:
    stats = x.new_empty(x.shape[:2], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _residual_norm_modulate_backward(
    dz: torch.Tensor,
    dn: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    shift_dtype: torch.dtype,
) -> Any:
    dx, dshift, dscale = reference.norm_modulate_backward(dn, z, scale, mean, rstd)
    dx = dx + dz
    if gate is None:
        dy, dgate = dx, _none(z)
    else:
        dy, dgate = reference.gated_residual_backward(dx, y, gate)
        dgate = dgate.to(gate.dtype)
    dx_out = dx.to(z.dtype).contiguous()
    dy_out = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(dy)  # never an alias of dx
    return dx_out, dy_out, dgate, dshift.to(shift_dtype), dscale.to(scale.dtype)


def _residual_norm_modulate_backward_fake(
    dz: torch.Tensor,
    dn: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    shift_dtype: torch.dtype,
) -> Any:
    dgate = _none(z) if gate is None else gate.new_empty(gate.shape)
    dscale = scale.new_empty(scale.shape)
    return z.new_empty(z.shape), y.new_empty(y.shape), dgate, torch.empty_like(dscale, dtype=shift_dtype), dscale


define(
    STEM,
    "residual_norm_modulate_forward",
    "(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps, ScalarType out_dtype)"
    " -> (Tensor z, Tensor n, Tensor mean, Tensor rstd)",
    _residual_norm_modulate,
    _residual_norm_modulate_fake,
)
define(
    STEM,
    "residual_norm_modulate_backward",
    "(Tensor dz, Tensor dn, Tensor z, Tensor y, Tensor? gate, Tensor scale, Tensor mean, Tensor rstd,"
    " ScalarType shift_dtype)"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dshift, Tensor dscale)",
    _residual_norm_modulate_backward,
    _residual_norm_modulate_backward_fake,
)


# Autograd


def _norm_modulate_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, shift, scale, _, _ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, output[1], output[2])


def _norm_modulate_autograd(ctx: Any, dn: torch.Tensor, _mean: Any, _rstd: Any) -> Any:
    dx, dshift, dscale = _op.norm_modulate_backward(dn, *ctx.saved_tensors, ctx.shift_dtype)
    return dx, dshift, dscale, None, None


def _gated_residual_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _gated_residual_autograd(ctx: Any, dout: torch.Tensor) -> Any:
    return dout, *_op.gated_residual_backward(dout, *ctx.saved_tensors)


def _residual_norm_modulate_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, gate, shift, scale, _, _ = inputs
    ctx.shift_dtype = shift.dtype
    z, _, mean, rstd = output
    ctx.save_for_backward(z, y, gate, scale, mean, rstd)


def _residual_norm_modulate_autograd(ctx: Any, dz: torch.Tensor, dn: torch.Tensor, _mean: Any, _rstd: Any) -> Any:
    z, y, gate, scale, mean, rstd = ctx.saved_tensors  # once: checkpointing recomputes them at the first access
    dx, dy, dgate, dshift, dscale = _op.residual_norm_modulate_backward(
        dz, dn, z, y, gate, scale, mean, rstd, ctx.shift_dtype
    )
    return dx, dy, None if gate is None else dgate, dshift, dscale, None, None


differentiable("norm_modulate_forward", _norm_modulate_autograd, _norm_modulate_context, "norm_modulate_backward")
differentiable("gated_residual_forward", _gated_residual_autograd, _gated_residual_context, "gated_residual_backward")
differentiable(
    "residual_norm_modulate_forward",
    _residual_norm_modulate_autograd,
    _residual_norm_modulate_context,
    "residual_norm_modulate_backward",
)


# Public functions


def _coefficient(op: str, name: str, value: torch.Tensor, batch: int, channels: int) -> torch.Tensor:
    """[B, C] or [B, 1, C] -> [B, C]."""
    check.tensor(op, name, value, (2, 3), "[B, C] or [B, 1, C]")
    check.shape(op, name, value, (batch, channels) if value.dim() == 2 else (batch, 1, channels), "[B, (1,) C]")
    return value.reshape(batch, channels)


def _rows(op: str, x: torch.Tensor) -> None:
    check.tensor(op, "x", x, 3, "[B, N, C]")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"sana_ext.{op}: x must have at least one token and one channel, got {list(x.shape)}")


def _out_dtype(op: str, wanted: torch.dtype | None, default: torch.dtype, device: torch.device) -> torch.dtype:
    dtype = default if wanted is None else wanted
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"sana_ext.{op}: out_dtype must be a torch.dtype or None, got {dtype!r}")
    supported = check.SUPPORTED.get(device.type, (dtype,))
    fitting = [d for d in supported if (d == torch.float64) == (default == torch.float64)]
    if dtype not in fitting:
        raise TypeError(
            f"sana_ext.{op}: out_dtype {check.short(dtype)} is not supported for {check.short(default)} input on "
            f"{device.type}; it must be {' or '.join(map(check.short, fitting))}"
        )
    return dtype


def norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """LayerNorm without affine parameters, then adaptive modulation: ``LN(x) * (1 + scale) + shift``.

    Args:
        x: [B, N, C], float; any strides (rows that are not dense are copied).
        shift, scale: [B, C] or [B, 1, C], float; one row per image.
        eps: added to the variance (SANA: 1e-6).
        out_dtype: dtype of the result; default x.dtype.

    Returns:
        [B, N, C], contiguous. Statistics and arithmetic are fp32 (fp64 for fp64 input) whatever the dtypes.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.

    Source: adaLN-single of PixArt as used in SANA, arXiv:2410.10629; diffusers ``SanaTransformerBlock``.
    """
    _rows("norm_modulate", x)
    shift = _coefficient("norm_modulate", "shift", shift, x.shape[0], x.shape[2])
    scale = _coefficient("norm_modulate", "scale", scale, x.shape[0], x.shape[2])
    check.together("norm_modulate", x=x, shift=shift, scale=scale)
    check.plain_autograd("norm_modulate", x=x, shift=shift, scale=scale)
    check.positive("norm_modulate", "eps", eps)
    return _op.norm_modulate_forward(x, shift, scale, eps, _out_dtype("norm_modulate", out_dtype, x.dtype, x.device))[0]


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x + gate * y`` in one pass.

    Args:
        x: [B, N, C], float, the residual stream; the result has its dtype.
        y: [B, N, C], float, the branch.
        gate: [B, C] or [B, 1, C], float.

    Returns:
        [B, N, C], contiguous, dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    _rows("gated_residual", x)
    check.tensor("gated_residual", "y", y, 3, "[B, N, C]")
    check.shape("gated_residual", "y", y, tuple(x.shape), "[B, N, C] of x")
    gate = _coefficient("gated_residual", "gate", gate, x.shape[0], x.shape[2])
    check.together("gated_residual", x=x, y=y, gate=gate)
    check.plain_autograd("gated_residual", x=x, y=y, gate=gate)
    return _op.gated_residual_forward(x, y, gate)


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
    """``z = x + gate * y`` and ``n = LN(z) * (1 + scale) + shift`` in one pass over the rows.

    Args:
        x: [B, N, C], float, the residual stream.
        y: [B, N, C], float, the branch that is added.
        shift, scale: [B, C] or [B, 1, C], float.
        gate: [B, C] or [B, 1, C], float; None means 1 (after cross-attention).
        eps: added to the variance.
        out_dtype: dtype of n; default y.dtype.

    Returns:
        (z, n): [B, N, C] each, contiguous; z has x's dtype. n is computed from z as stored.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    op = "residual_norm_modulate"
    _rows(op, x)
    check.tensor(op, "y", y, 3, "[B, N, C]")
    check.shape(op, "y", y, tuple(x.shape), "[B, N, C] of x")
    shift = _coefficient(op, "shift", shift, x.shape[0], x.shape[2])
    scale = _coefficient(op, "scale", scale, x.shape[0], x.shape[2])
    if gate is not None:
        gate = _coefficient(op, "gate", gate, x.shape[0], x.shape[2])
    check.together(op, x=x, y=y, gate=gate, shift=shift, scale=scale)
    check.plain_autograd(op, x=x, y=y, gate=gate, shift=shift, scale=scale)
    check.positive(op, "eps", eps)
    z, n, _, _ = _op.residual_norm_modulate_forward(
        x, y, gate, shift, scale, eps, _out_dtype(op, out_dtype, y.dtype, x.device)
    )
    return z, n
