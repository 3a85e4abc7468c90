"""When the weights of a module may be read in place of calling it: the one predicate of this package.

A module is plain if it is exactly the stock layer, of the stock geometry, if nothing intercepts its call (hooks, a
replaced forward) and if its weights are its own dense tensors (no parametrisation, no quantised or sharded weight). All
others are called as the modules they are. Every function answers None (plain) or the reason in words, from attributes
alone: torch.compile traces through them and guards on what they read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as _global

from .ops._arithmetic import autocast_dtype
from .ops._checks import short

LOW_PRECISION = (torch.bfloat16, torch.float16)
DENSE = (nn.Parameter, torch.Tensor, FakeTensor)
#: torch's own forwards, which some programs replace for all layers of a class at once.
_FORWARDS = {cls: cls.forward for cls in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.SiLU)}
_conv_forward = nn.Conv2d._conv_forward


class Operand(NamedTuple):
    """Describes what a layer receives: device and dtype of its input, and autocast's dtype or None."""

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None


def operand_of(x: torch.Tensor) -> Operand:
    return Operand(x.device, x.dtype, autocast_dtype(x.device))


def child(module: Any, name: str) -> Any:
    """module.name for a submodule or None; torch's own lookup costs more than all checks of a layer together."""
    found = module._modules.get(name)
    return module.__dict__.get(name) if found is None else found


def parameter(module: Any, name: str) -> Any:
    """module.name for a weight or None: a parameter, the plain tensor that a wrapper (DataParallel, FSDP) left, a buffer."""
    found = module._parameters.get(name)
    if found is None:
        found = module.__dict__.get(name)
    return module._buffers.get(name) if found is None else found


def hooked_everywhere() -> bool:
    """Hooks on all modules of the process."""
    return bool(
        _global._global_forward_hooks
        or _global._global_forward_pre_hooks
        or _global._global_backward_hooks
        or _global._global_backward_pre_hooks
    )


def module_reason(module: Any, expected: type) -> str | None:
    """`module` is exactly of the expected class, and nothing intercepts its call."""
    cls: Any = type(module)
    if cls is not expected:
        return f"is a {cls.__module__}.{cls.__name__}, not {expected.__name__}"
    state = module.__dict__
    if "forward" in state or "_conv_forward" in state or "_call_impl" in state:
        return "has its forward replaced on the instance (offloading, casting or caching hooks)"
    if "_compiled_call_impl" in state:
        return "is compiled by itself"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has hooks"
    if hooked_everywhere():
        return "sees global module hooks"
    if cls in _FORWARDS and cls.forward is not _FORWARDS[cls]:
        return f"has the forward of {cls.__name__} replaced"
    if cls is nn.Conv2d and nn.Conv2d._conv_forward is not _conv_forward:
        return "has the forward of Conv2d replaced"
    return None


def tensor_reason(name: str, tensor: Any, operand: Operand) -> str | None:
    """A dense tensor on the operand's device whose dtype goes together with the operand's."""
    cls = type(tensor)
    if cls not in DENSE:
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


def owner_reason(module: Any, expected: type, *names: str) -> str | None:
    """A plain module whose own weights of these names are dense tensors, whatever their dtype and device."""
    reason = module_reason(module, expected)
    for name in names if reason is None else ():
        cls = type(parameter(module, name))
        if cls not in DENSE:
            return f"has a {name} of type {cls.__name__}"
    return reason


def leaf_reason(leaf: Any, expected: type, operand: Operand) -> str | None:
    """A stock layer whose weight and bias may be read directly."""
    reason = module_reason(leaf, expected) or tensor_reason("weight", parameter(leaf, "weight"), operand)
    if reason is None:
        bias = parameter(leaf, "bias")
        return None if bias is None else tensor_reason("bias", bias, operand)
    return reason


def convolution_reason(conv: Any, kernel: int, operand: Operand, *, depthwise: bool = False) -> str | None:
    """A stock convolution of that kernel that keeps the grid; the weight tells its size, as it does in torch's forward."""
    reason = leaf_reason(conv, nn.Conv2d, operand)
    if reason:
        return reason
    weight = parameter(conv, "weight")
    groups = weight.shape[0] if depthwise else 1
    pad = kernel // 2
    geometry = (tuple(weight.shape[2:]), conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if geometry != ((kernel, kernel), (1, 1), (pad, pad), (1, 1), groups, "zeros"):
        return f"is not a plain {kernel}x{kernel} convolution with {groups} groups"
    return "is not depthwise" if depthwise and weight.shape[1] != 1 else None


def layer_norm_reason(norm: Any, channels: int) -> str | None:
    """LayerNorm over the channels, without affine parameters."""
    reason = module_reason(norm, nn.LayerNorm)
    if reason:
        return reason
    if parameter(norm, "weight") is not None or parameter(norm, "bias") is not None:
        return "has affine parameters"
    if norm.normalized_shape != (channels,):
        return f"is over {list(norm.normalized_shape)}, not over the {channels} channels"
    return _eps_reason(norm)


def rms_norm_reason(norm: Any, expected: type, channels: int, operand: Operand) -> str | None:
    """An RMSNorm over all channels with a weight and no bias, or None (no norm)."""
    if norm is None:
        return None
    reason = module_reason(norm, expected)
    if reason:
        return reason
    weight = parameter(norm, "weight")
    over = norm.__dict__.get("normalized_shape")  # of torch's; the others normalise over the last dimension
    if (
        weight is None
        or tuple(weight.shape) != (channels,)
        or parameter(norm, "bias") is not None
        or (over is not None and over != (channels,))
    ):
        return "is not an RMSNorm over all channels with a weight and no bias"
    return tensor_reason("weight", weight, operand) or _eps_reason(norm)


def _eps_reason(norm: Any) -> str | None:
    """The kernels take an eps of at least 0; torch's RMSNorm also knows None, the dtype's own."""
    return None if norm.eps is not None and norm.eps >= 0 else f"has the eps {norm.eps}"


def untouched(module: Any, packages: tuple[str, ...] = ("torch.nn.modules", "diffusers")) -> bool:
    """A module of these packages that nothing intercepts, and whose weights are its parameters.

    A wrapper (FSDP, DataParallel) puts tensors of its own in their place.
    """
    cls, state = type(module), module.__dict__
    own = cls.__module__.startswith(packages) and module_reason(module, cls) is None
    return own and state.get("weight") is None and state.get("bias") is None
