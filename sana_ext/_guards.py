"""When the fused path may stand in for diffusers' own code. Every check answers None (it may) or the reason in words.

The checks run on every call of a block: LoRA layers, hooks, offloading, quantisation and processors come and go after
`patch`. They read attributes only, so torch.compile traces through them and guards on what they read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as _global

from ._extension import has_kernel
from .ops._checks import SUPPORTED, short, transforming

LOW_PRECISION = (torch.bfloat16, torch.float16)
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


class Operand(NamedTuple):
    """What a part receives: the device and dtype of the residual stream, and autocast's dtype or None."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None


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


def child(module: Any, name: str) -> Any:
    """module.name for a submodule or None; torch's own lookup costs more than all checks of a layer together."""
    found = module._modules.get(name)
    return module.__dict__.get(name) if found is None else found


def parameter(module: Any, name: str) -> Any:
    """module.name for a parameter or None, also where a wrapper (DataParallel, FSDP) left a plain tensor instead."""
    found = module._parameters.get(name)
    return module.__dict__.get(name) if found is None else found


def module_reason(module: Any, expected: type) -> str | None:
    """`module` is exactly of the expected class, and nothing intercepts its forward."""
    cls = type(module)
    if cls is not expected:
        return f"is a {cls.__module__}.{cls.__name__}, not {expected.__name__}"
    state = module.__dict__
    if "forward" in state:
        return "has its forward replaced on the instance (offloading, casting or caching hooks)"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has hooks"
    return None


def tensor_reason(name: str, tensor: Any, operand: Operand) -> str | None:
    """A dense parameter on the operand's device whose dtype goes together with the operand's."""
    cls = type(tensor)
    if cls is not nn.Parameter and cls is not torch.Tensor:
        return f"has a {name} of type {cls.__name__}"
    if tensor.device != operand.device:
        return f"has its {name} on {tensor.device}, the input is on {operand.device}"
    if tensor.dtype != operand.dtype:
        mixes = operand.autocast is not None and (tensor.dtype == torch.float32 or tensor.dtype in LOW_PRECISION)
        if not mixes:
            return f"has a {short(tensor.dtype)} {name}, the input is {short(operand.dtype)}"
    if tensor.layout != torch.strided:
        return f"has a {name} of layout {tensor.layout}"
    return None


def leaf_reason(leaf: Any, expected: type, operand: Operand) -> str | None:
    """A stock layer whose weight and bias may be read directly."""
    reason = module_reason(leaf, expected) or tensor_reason("weight", parameter(leaf, "weight"), operand)
    if reason is None:
        bias = parameter(leaf, "bias")
        if bias is not None and type(bias) is not nn.Parameter and type(bias) is not torch.Tensor:
            return f"has a bias of type {type(bias).__name__}"
    return reason


def rms_norm_reason(norm: Any, expected: type, channels: int, operand: Operand) -> str | None:
    """diffusers' RMSNorm over all channels with a weight and no bias, or None (no norm)."""
    if norm is None:
        return None
    reason = module_reason(norm, expected)
    if reason:
        return reason
    weight = parameter(norm, "weight")
    if weight is None or parameter(norm, "bias") is not None or weight.numel() != channels:
        return "is not an RMSNorm over all channels with a weight and no bias"
    return tensor_reason("weight", weight, operand)


def layer_norm_reason(norm: Any) -> str | None:
    reason = module_reason(norm, nn.LayerNorm)
    if reason is None and (parameter(norm, "weight") is not None or parameter(norm, "bias") is not None):
        return "has affine parameters"
    return reason


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


def _convolution_reason(conv: Any, kernel: int, groups: int, operand: Operand) -> str | None:
    reason = leaf_reason(conv, nn.Conv2d, operand)
    if reason:
        return reason
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if geometry != ((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), groups, "zeros"):
        return f"is not a plain {kernel}x{kernel} convolution with {groups} groups"
    return None


def glumbconv_reason(ff: Any, stock: Any, operand: Operand) -> str | None:
    """diffusers' GLUMBConv as SANA's blocks use it: no norm, no residual of its own, no bias at the end."""
    reason = module_reason(ff, stock.GLUMBConv)
    if reason:
        return reason
    if ff.norm_type is not None or ff.residual_connection:
        return "has a norm or a residual of its own"
    if reason := module_reason(child(ff, "nonlinearity"), nn.SiLU):
        return f"nonlinearity {reason}"
    depth, point = child(ff, "conv_depth"), child(ff, "conv_point")
    channels = depth.groups if type(depth) is nn.Conv2d else 1
    parts = (("conv_inverted", child(ff, "conv_inverted"), 1, 1), ("conv_depth", depth, 3, channels))
    for name, conv, kernel, groups in (*parts, ("conv_point", point, 1, 1)):
        if reason := _convolution_reason(conv, kernel, groups, operand):
            return f"{name} {reason}"
    if channels != depth.in_channels or channels != depth.out_channels:
        return "conv_depth is not depthwise"
    return "conv_point has a bias" if parameter(point, "bias") is not None else None


def plan(block: Any, stock: Any, operand: Operand, parts: tuple[str, ...]) -> Plan:
    """Which parts of the block run fused; `parts` are those that have compiled kernels."""
    none = f"no compiled kernel answers on {operand.device.type}"
    return Plan(
        norm1=layer_norm_reason(child(block, "norm1")),
        attn1=linear_attention_reason(child(block, "attn1"), stock, operand) if "attn1" in parts else none,
        attn2=cross_attention_reason(child(block, "attn2"), stock),
        norm2=layer_norm_reason(child(block, "norm2")),
        ff=glumbconv_reason(child(block, "ff"), stock, operand) if "ff" in parts else none,
    )


def block_reason(block: Any, x: torch.Tensor, operand: Operand, parts: tuple[str, ...]) -> str | None:
    """What keeps the whole block on diffusers' code, for the residual stream x."""
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
    if _global._global_forward_hooks or _global._global_forward_pre_hooks or _global._global_backward_hooks:
        return "global module hooks are registered"
    if child(block, "attn2") is None:
        return "the block has no cross-attention"
    table = parameter(block, "scale_shift_table")
    return tensor_reason("scale_shift_table", table, operand._replace(dtype=table.dtype))
