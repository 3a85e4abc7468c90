"""The one training loop: loss, gradient, clip, update, average. It knows no file, no configuration and no task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..growth.optimizer import set_learning_rates

Loss = Callable[[int, torch.Generator], torch.Tensor]


def step_seed(seed: int, step: int) -> int:
    """The seed of all draws of a step: a resumed run draws what an uninterrupted one does."""
    return seed * 1_000_003 + step


class Average:
    """Exponential moving average of a module's weights; the decay ramps up so that the first steps are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        state = self.module.state_dict()
        torch._foreach_lerp_(list(self.values.values()), [state[k] for k in self.values], 1 - decay)

    def swap(self) -> dict[str, torch.Tensor]:
        """Puts the averaged weights into the module; returns the ones that were there."""
        before = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        self.module.load_state_dict(self.values)
        return before

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights are in the module; afterwards its own are."""
        before = self.swap()
        try:
            yield
        finally:
            self.module.load_state_dict(before)


def fit(
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    seed: int = 0,
    rate: Callable[[int], float] | None = None,
    clip: float | None = 1.0,
    average: Average | None = None,
    around: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),
    not_finite: type[ValueError] | None = ValueError,
    done: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> None:
    """Trains `parameters` with an optimizer that has them.

    Args:
        loss: (step, generator) -> scalar; the generator is on the CPU, and its draws depend on (seed, step) only.
        steps: numbers of the steps, from 0; a resumed run begins later.
        rate: step -> learning rate, see growth.optimizer.set_learning_rates. None: the optimizer's own.
        clip: the largest norm of the gradient; None or 0: no limit.
        around: step -> a context for the loss and its gradient.
        not_finite: raised, with the step, where the loss is not finite; None: the caller looks.
        done: called as done(step, loss, norm of the gradient before the clip) after each update.
    """
    for step in steps:
        if rate is not None:
            set_learning_rates(optimizer, rate(step), step)
        with around(step):
            value = loss(step, torch.Generator().manual_seed(step_seed(seed, step)))
            if not_finite is not None and not value.isfinite():
                raise not_finite(f"the loss is {value.item()} at step {step + 1}")
            value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(step)
        if done is not None:
            done(step, value.detach(), norm)
