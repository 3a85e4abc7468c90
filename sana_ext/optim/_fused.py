"""Steps of the 8-bit optimizers inside the backward pass: each parameter as soon as its gradient is complete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._base import Optimizer8bit


class FusedBackward:
    """The hooks that one call of `fuse_backward` has set; `remove()` takes them away."""

    def __init__(self, optimizer: Optimizer8bit, handles: dict[int, Any]) -> None:
        self._optimizer, self._handles = optimizer, handles

    def remove(self) -> None:
        for key, handle in self._handles.items():
            handle.remove()
            self._optimizer._fused.discard(key)
        self._handles.clear()


def fuse_backward(optimizer: Optimizer8bit) -> FusedBackward:
    """Steps each parameter as soon as its gradient is complete, inside ``loss.backward()``, and frees the gradient.

    So never more than a few gradients exist at a time. ``optimizer.step()`` then finds no gradient and does nothing; call
    it all the same where a learning-rate scheduler wants to see it.

    What cannot be had together with it: gradient accumulation over several backward passes, clipping by the global
    norm, GradScaler (no gradient may be used before all are known), and skipping a step as a whole: a NaN or Inf skips
    the parameters that it reaches, each counted by itself. Learning rates are those at the time of the backward pass.
    Parameters added later need another call, which leaves those alone that have their hook.

    Args:
        optimizer: a CAME8bit or AdamW8bit.

    Returns:
        An object whose ``remove()`` ends it.

    Raises:
        TypeError: another kind of optimizer.
    """
    if not isinstance(optimizer, Optimizer8bit):
        raise TypeError(f"sana_ext.optim.fuse_backward: expected CAME8bit or AdamW8bit, got {type(optimizer).__name__}")

    def hook_of(g: int, i: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(p: Tensor) -> None:
            optimizer._step_on([(g, i)])
            p.grad = None

        return hook

    handles = {
        id(p): p.register_post_accumulate_grad_hook(hook_of(g, i))
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p.requires_grad and id(p) not in optimizer._fused
    }
    optimizer._fused |= handles.keys()
    return FusedBackward(optimizer, handles)
