"""Registers the ops of this package: schema, default kernel, fake kernel, autograd.

The default kernel is the reference in plain PyTorch and answers wherever no compiled kernel is registered, so every op
exists on every machine. Compiled kernels (csrc/cpu, csrc/cuda) register themselves for their device when their library
is loaded; the dispatcher then prefers them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Every registered op of the namespace ``sana_ext``: name -> stem of its family.
OPS: dict[str, str] = {}
#: Device -> ops without a compiled kernel for it, on purpose: no device to dispatch on, or torch's own answers there.
NOT_COMPILED: dict[str, frozenset[str]] = {
    "cpu": frozenset({"cross_attention_forward", "cross_attention_backward", "native_arithmetic"}),
}
NOT_COMPILED["cuda"] = NOT_COMPILED["cpu"] | {"linear_forward", "linear_backward"}
#: Device -> what the first op says that would have used the library for it. Filled where a library is missing.
MISSING: dict[str, str] = {}
_saying = threading.Lock()


def define(stem: str, name: str, schema: str, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``sana_ext::name`` with its schema, its PyTorch kernel and its shape function."""
    qualified = f"sana_ext::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", _reporting(name, default))
    torch.library.register_fake(qualified, fake)
    OPS[name] = stem


def _reporting(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
    """The default kernel, which says once per process and device that the library it stands in for is missing."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if MISSING and (device := _device(args)) in MISSING and name not in NOT_COMPILED[device]:
            with _saying:
                message = MISSING.pop(device, None)
            if message is not None:
                warnings.warn(message, RuntimeWarning, stacklevel=2)
        return default(*args, **kwargs)

    return run


def _device(args: Iterable[Any]) -> str:
    """The type of the first tensor's device, among arguments and lists of them; empty where there is none."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and (found := _device(arg)):
            return found
    return ""


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any], backward_op: str | None = None
) -> None:
    """Gives ``sana_ext::name`` a gradient; ``backward_op``, the op that computes it, then refuses to be differentiated."""
    torch.library.register_autograd(f"sana_ext::{name}", backward, setup_context=setup_context)
    if backward_op is None:
        return

    def refuse(ctx: Any, *grads: Any) -> None:
        public = name.removesuffix("_forward")
        raise NotImplementedError(
            f"sana_ext.{public}: second derivatives are not supported; use sana_ext.reference.{public} where you need them"
        )

    torch.library.register_autograd(f"sana_ext::{backward_op}", refuse)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A default kernel decides its own dtypes, as the compiled ones do."""

    def run(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if not torch.amp.is_autocast_available(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
