"""16-bit weights in training, emulated on fp32 parameters: what is lost where an update is less than their last digit.

The forward pass sees weights of 16 bits. What is kept between steps has `kept` bits: 16 (bf16 parameters, rounded to nearest or
by chance), 24 (8 correction bits beside each bf16 value) or 32 (an fp32 master copy).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .trajectory import After, Around, Run


def cut(values: torch.Tensor, bits: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """fp32 values rounded to their `bits` highest bits (16: bf16): to nearest, ties to even; by chance with a generator.

    Values must be finite, and stay so when they are rounded up.
    """
    low = 32 - bits
    if not low:
        return values.clone()
    raw = values.contiguous().view(torch.int32).long()
    if generator is None:
        raw += (1 << (low - 1)) - 1 + ((raw >> low) & 1)
    else:
        raw += torch.randint(1 << low, raw.shape, generator=generator)
    return ((raw >> low) << low).int().view(torch.float32)


class Weights16:
    """Keeps a model's parameters in `kept` bits and shows them in 16 while a loss and its gradient are computed.

    Args:
        by_chance: round what is kept up or down by chance. The draws depend on (seed, step) only.
    """

    def __init__(self, model: nn.Module, run: Run, kept: int, by_chance: bool = False) -> None:
        self.parameters, self.seed, self.kept, self.by_chance = list(model.parameters()), run.seed, kept, by_chance

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        if self.kept == 16:  # what is kept is what is shown; the first weights are fp32
            for p in self.parameters if step == 0 else ():
                p.data.copy_(cut(p.data, 16))
            yield
            return
        whole = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            p.data.copy_(cut(p.data, 16))
        yield
        for p, value in zip(self.parameters, whole):
            p.data.copy_(value)

    @torch.no_grad()
    def after(self, step: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step) if self.by_chance else None
        for p in self.parameters:
            p.copy_(cut(p.data, self.kept, generator))

    def hooks(self) -> tuple[Around, After]:
        return self.around, self.after
