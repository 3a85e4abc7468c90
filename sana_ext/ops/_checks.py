"""Argument errors of the public functions: each names the argument, what came, and what is supported."""

from __future__ import annotations

import math

import torch
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

SUPPORTED = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


#: More cannot be addressed, and their byte counts would overflow 64-bit integers.
MAX_ELEMENTS = 2**45


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(op: str, name: str, value: object, ndim: int | tuple[int, ...], layout: str) -> None:
    """`value` is a dense floating-point tensor of the given rank and a supported dtype for its device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"sana_ext.{op}: {name} must be a torch.Tensor {layout}, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        layout_name = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"sana_ext.{op}: {name} must be a dense tensor, got {layout_name}")
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if value.dim() not in ranks:
        raise ValueError(f"sana_ext.{op}: {name} must have shape {layout}, got {list(value.shape)}")
    if all(type(size) is int for size in value.shape) and math.prod(value.shape) > MAX_ELEMENTS:
        raise ValueError(f"sana_ext.{op}: {name} must have at most 2^45 elements, got {list(value.shape)}")
    supported = SUPPORTED.get(value.device.type)
    if supported is not None and value.dtype not in supported:
        names = ", ".join(map(short, supported))
        raise TypeError(f"sana_ext.{op}: {name} has dtype {short(value.dtype)}; {value.device.type} supports {names}")


def shape(op: str, name: str, value: torch.Tensor, expected: tuple[int, ...], layout: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"sana_ext.{op}: {name} must have shape {layout} = {list(expected)}, got {list(value.shape)}")


def together(op: str, **tensors: torch.Tensor | None) -> None:
    """All given tensors are on one device, and all or none of them are float64."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first_name, first), *rest = given.items()
    for name, t in rest:
        if t.device != first.device:
            raise ValueError(
                f"sana_ext.{op}: {name} is on {t.device}, {first_name} on {first.device}; all tensors must share one device"
            )
        if (t.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"sana_ext.{op}: {name} is {short(t.dtype)} and {first_name} is {short(first.dtype)}; "
                "float64 mixes with no other dtype"
            )


def same_dtype(op: str, **tensors: torch.Tensor) -> None:
    (first_name, first), *rest = tensors.items()
    for name, t in rest:
        if t.dtype != first.dtype:
            raise TypeError(
                f"sana_ext.{op}: {name} is {short(t.dtype)} and {first_name} is {short(first.dtype)}; "
                "outside autocast all tensors must share one dtype"
            )


def without_overlap(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it where two of its elements may share memory (expanded, unfolded): not every kernel reads such strides."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1):
        if stride <= reach:
            return t.contiguous()
        reach += stride * (size - 1)
    return t


def positive(op: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"sana_ext.{op}: {name} must be a number >= 0, got {type(value).__name__}")
    if not value >= 0:  # also refuses NaN
        raise ValueError(f"sana_ext.{op}: {name} must be a number >= 0, got {value}")


def transforming() -> bool:
    """Inside torch.func (grad, jvp, vmap) or forward-mode AD."""
    return functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result does, without importing the compiler: dynamo, which guards on the stack of
# transforms by itself, calls the function while it traces.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plain_autograd(op: str, **tensors: torch.Tensor | None) -> None:
    """No tensor carries a derivative of torch.func or of forward-mode AD, which the ops would drop without a word."""
    if not transforming():
        return
    for name, t in tensors.items():
        if t is not None and _carries_derivative(t):
            raise NotImplementedError(
                f"sana_ext.{op}: {name} is differentiated by torch.func or by forward-mode AD, which is not supported "
                f"(torch.autograd is); use sana_ext.reference.{op} there"
            )


def _carries_derivative(t: torch.Tensor) -> bool:
    while True:
        batched = functorch.is_batchedtensor(t)
        if not batched and forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            return True
        if not functorch.is_functorch_wrapped_tensor(t):
            return False
        if functorch.is_gradtrackingtensor(t) and t.requires_grad:
            return True
        t = functorch.get_unwrapped(t)
