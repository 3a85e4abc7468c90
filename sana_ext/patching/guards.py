"""When the fused path may stand in for diffusers' own code. Every check answers None (it may) or the reason in words.

The checks run on every call of a block: LoRA layers, hooks, offloading, quantisation and processors come and go after
`patch`. They read attributes only, so torch.compile traces through them and guards on what they read. What a plain layer
is stands in `_plain`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from .._extension import has_kernel
from .._plain import (
    Operand,
    child,
    convolution_reason,
    hooked_everywhere,
    layer_norm_reason,
    module_reason,
    parameter,
    rms_norm_reason,
    tensor_reason,
)
from ..ops._checks import SUPPORTED, short, transforming

#: The kernels that each part of a block needs: (forward, backward).
KERNELS = {
    "norms": (
        ("norm_modulate_forward", "gated_residual_forward", "residual_norm_modulate_forward"),
        ("norm_modulate_backward", "gated_residual_backward", "residual_norm_modulate_backward"),
    ),
    "attn1": (("linear_attention_forward",), ("linear_attention_backward",)),
    "ff": (("dwconv_glu_forward",), ("dwconv_glu_backward",)),
}
#: (device type, gradients wanted) -> parts that compiled kernels serve; filled by `find_kernels`.
compiled_parts: dict[tuple[str, bool], tuple[str, ...]] = {}


class Plan(NamedTuple):
    """Per part of a block: None where the fused code runs, otherwise why diffusers' own code does."""

    norm1: str | None
    attn1: str | None
    attn2: str | None
    norm2: str | None
    ff: str | None


def find_kernels() -> None:
    """Asks the dispatcher which parts have compiled kernels, per device type."""
    for device in ("cpu", "cuda"):
        for gradients in (False, True):
            compiled_parts[device, gradients] = tuple(
                part
                for part, (forward, backward) in KERNELS.items()
                if all(has_kernel(op, device) for op in (*forward, *(backward if gradients else ())))
            )


def linear_attention_reason(attn: Any, stock: Any, operand: Operand) -> str | None:
    reason = module_reason(attn, stock.Attention) or _processor_reason(attn, stock.SanaLinearAttnProcessor2_0)
    if reason:
        return reason
    norm_q, norm_k = child(attn, "norm_q"), child(attn, "norm_k")
    for name, norm in (("norm_q", norm_q), ("norm_k", norm_k)):
        if reason := rms_norm_reason(norm, stock.RMSNorm, attn.inner_dim, operand):
            return f"{name} {reason}"
    if norm_q is not None and norm_k is not None and norm_q.eps != norm_k.eps:
        return "norm_q and norm_k differ in eps"
    return None


def cross_attention_reason(attn: Any, stock: Any) -> str | None:
    return module_reason(attn, stock.Attention) or _processor_reason(attn, stock.SanaAttnProcessor2_0)


def _processor_reason(attn: Any, expected: type) -> str | None:
    cls = type(attn.processor)
    return None if cls is expected else f"has the processor {cls.__name__}"


def glumbconv_reason(ff: Any, stock: Any, operand: Operand) -> str | None:
    """diffusers' GLUMBConv as SANA's blocks use it: no norm, no residual of its own, no bias at the end."""
    reason = module_reason(ff, stock.GLUMBConv)
    if reason:
        return reason
    if ff.norm_type is not None or ff.residual_connection:
        return "has a norm or a residual of its own"
    if reason := module_reason(child(ff, "nonlinearity"), nn.SiLU):
        return f"nonlinearity {reason}"
    for name, kernel in (("conv_inverted", 1), ("conv_depth", 3), ("conv_point", 1)):
        if reason := convolution_reason(child(ff, name), kernel, operand, depthwise=kernel == 3):
            return f"{name} {reason}"
    return "conv_point has a bias" if parameter(child(ff, "conv_point"), "bias") is not None else None


def plan(block: Any, stock: Any, operand: Operand, parts: tuple[str, ...], channels: int) -> Plan:
    """Chooses the parts of the block that run fused, on `channels` channels; `parts` are those that have compiled kernels."""
    none = f"no compiled kernel answers on {operand.device.type}"
    return Plan(
        norm1=layer_norm_reason(child(block, "norm1"), channels),
        attn1=linear_attention_reason(child(block, "attn1"), stock, operand) if "attn1" in parts else none,
        attn2=cross_attention_reason(child(block, "attn2"), stock),
        norm2=layer_norm_reason(child(block, "norm2"), channels),
        ff=glumbconv_reason(child(block, "ff"), stock, operand) if "ff" in parts else none,
    )


def block_reason(block: Any, x: torch.Tensor, operand: Operand, parts: tuple[str, ...]) -> str | None:
    """Says what keeps the whole block on diffusers' code, for the residual stream x."""
    if transforming():
        return "torch.func transforms and forward-mode AD run on diffusers' code"
    if torch.jit.is_tracing():
        return "torch.jit.trace records diffusers' code"
    if "norms" not in parts:
        return f"no compiled kernel answers on {operand.device.type}"
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__}"
    if x.dim() != 3 or x.numel() == 0:
        return "the input has no tokens"
    if operand.dtype not in SUPPORTED[operand.device.type]:
        return f"{operand.device.type} kernels do not take {short(operand.dtype)}"
    if operand.autocast is not None and operand.dtype == torch.float64:
        return "float64 under autocast"
    if hooked_everywhere():
        return "global module hooks are registered"
    if child(block, "attn2") is None:
        return "the block has no cross-attention"
    table = parameter(block, "scale_shift_table")
    if table is None:  # parametrised, perhaps: its value is asked for once, by the block's forward
        return None if hasattr(type(block), "scale_shift_table") else "it has no scale_shift_table"
    return tensor_reason("scale_shift_table", table, operand._replace(dtype=table.dtype))
