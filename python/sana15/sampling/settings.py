"""The seed and the settings that fix an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..storage.values import is_finite, is_interval


class Seed(NamedTuple):
    """All that an image's noise follows from: the run's seed, the prompt's index in it, the candidate."""

    run: int
    prompt: int
    candidate: int

    def number(self) -> int:
        """63 bits for a library's generator."""
        return int(np.random.SeedSequence(self).generate_state(1, np.uint64)[0] >> 1)


SAMPLERS = ("flow_dpm", "flow_euler")


def check_schedule(steps: int, sampler: str) -> None:
    """Raises ValueError for an unknown sampler or for steps that are none."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")


def check_training_seed(seed: int) -> None:
    """ValueError for a seed that a generator for each training step cannot be made from."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to {2**32 - 1}, got {seed}")


def noise(seed: int, prompt_index: int, candidate: int, shape: Sequence[int]) -> torch.Tensor:
    """Initial noise of one picture, fp32, made on the CPU: it depends on (seed, prompt index, candidate) and on nothing else."""
    generator = torch.Generator().manual_seed(Seed(seed, prompt_index, candidate).number())
    return torch.randn(*shape, generator=generator)


@dataclass(frozen=True)
class Item:
    """One picture to make: its prompt, the prompt's index in the run, and which candidate for that prompt it is."""

    prompt: str
    index: int
    candidate: int


@dataclass(frozen=True)
class Sampling:
    """The settings of sampling; see Pipeline.__call__ for the meanings."""

    seed: int = 0
    steps: int = 20
    guidance: float | None = None  # None, also for the interval: the model's own; see Pipeline.guidance_of
    guidance_interval: tuple[float, float] | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    sampler: str | None = None  # None: the model's own; see Pipeline.sampler_of

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer from 0 on, got {self.seed!r}")
        check_schedule(self.steps, SAMPLERS[0] if self.sampler is None else self.sampler)
        if self.guidance is not None and not is_finite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance!r}")
        if self.guidance_interval is not None and not is_interval(self.guidance_interval):
            raise ValueError(
                f"guidance_interval must be 0 <= low <= high <= 1, got {' '.join(map(str, self.guidance_interval))}"
            )
