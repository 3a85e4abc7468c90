"""Generators that can pause: a batch of pictures is advanced step by step, looked at, thinned out, and finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image

from . import flow
from .guidance import GuidedVelocity
from .measuring import evaluating
from .sampling import Item, Sampling, Seed, noise

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Generator(Protocol):
    """The protocol that search asks of whoever makes the images.

    A state holds everything that a picture follows from, the sampler's history included: pausing changes nothing. advance and
    keep may use up the state that they are given; go on with the one that they return. A step is a denoising step.

    Attributes:
        steps: of a finished picture.
        can_pause: whether advance, preview and keep work; else only start and finish do.
    """

    steps: int

    @property
    def can_pause(self) -> bool: ...

    def check(self, prompts: Sequence[str]) -> None:
        """ValueError for a prompt that the model cannot read."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what the images follow from beside prompt and seed; a resumed run must have the same. JSON."""
        ...

    def describe(self, item: Item) -> dict[str, Any]:
        """Returns what the PNG file of an image says: the keys of pictures.describe; seed and size may be left out."""
        ...

    def evaluations(self, first: int, last: int) -> int:
        """Transformer evaluations of one picture from step `first` to step `last`; guidance makes two of one step."""
        ...

    def start(self, prompts: Sequence[str], seeds: Sequence[Seed]) -> Any:
        """A state before the first step; one seed for each prompt."""
        ...

    def advance(self, state: Any, to_step: int) -> Any:
        """The state when `to_step` steps are done; a state that is there already is returned as it is."""
        ...

    def preview(self, state: Any) -> list[Image.Image]:
        """Decodes what the model expects the finished images to be: its last data prediction. Costs no evaluation."""
        ...

    def keep(self, state: Any, indices: Sequence[int]) -> Any:
        """The chosen pictures only, in that order; the others are given up."""
        ...

    def finish(self, state: Any) -> list[Image.Image]:
        """The pictures, after the steps that are still to do."""
        ...


@dataclass(frozen=True)
class FlowState:
    """A batch of our pipeline between two steps."""

    sampler: flow.SamplerState
    velocity: GuidedVelocity


class PipelineGenerator:
    """sana15.Pipeline as a Generator. Pictures of another batch, also of what keep leaves of one, differ by rounding only.

    The same calls give the same bits; Pipeline.__call__ is start and finish.

    Raises:
        ValueError: settings that the model cannot serve.
    """

    can_pause = True

    def __init__(self, pipe: Pipeline, settings: Sampling) -> None:
        if pipe.config.guidance_embeds:
            raise ValueError("this is a Sprint model; its few-step sampler is not part of sana15")
        self.pipe, self.settings = pipe, settings
        self.shape = pipe.latent_shape(settings.height, settings.width)
        self.plan = flow.schedule(settings.steps, sampler=pipe.sampler_of(settings), flow_shift=pipe.flow_shift)
        self.steps = self.plan.steps
        guidance, interval = pipe.guidance_of(settings)
        self.guides = [flow.guidance_is_on(s, guidance, interval) for s in self.plan.sigmas[:-1]]
        self.guidance = guidance if any(self.guides) else 1.0
        self.check([])

    def check(self, prompts: Sequence[str]) -> None:
        self.pipe.text.check([*dict.fromkeys(prompts), self.settings.negative_prompt])

    @cached_property
    def _model(self) -> dict[str, str]:
        return self.pipe.identity()

    def identity(self) -> dict[str, Any]:
        guidance, interval = self.pipe.guidance_of(self.settings)
        settings = vars(self.settings) | {
            "guidance": guidance, "guidance_interval": list(interval), "sampler": self.plan.sampler,
        }  # fmt: skip
        return {"model": self._model, "flow_shift": self.pipe.flow_shift} | settings

    def describe(self, item: Item) -> dict[str, Any]:
        from .pictures import describe

        return describe(self.pipe, self.settings, item, self._model)

    def evaluations(self, first: int, last: int) -> int:
        return sum(1 + guide for guide in self.guides[first:last])

    @torch.no_grad()
    def start(self, prompts: Sequence[str], seeds: Sequence[Seed]) -> FlowState:
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"{len(prompts)} prompts need as many seeds, at least one; got {len(seeds)}")
        with evaluating(*self.pipe.parts):
            velocity = self.pipe.guided_velocity(list(prompts), self.settings.negative_prompt, self.guidance)
        noises = torch.stack([noise(*seed, self.shape) for seed in seeds])
        return FlowState(flow.SamplerState(noises.to(self.pipe.device)), velocity)

    @torch.no_grad()
    def advance(self, state: FlowState, to_step: int) -> FlowState:
        sampler, velocity = state.sampler, state.velocity
        if not sampler.step <= to_step <= self.steps:
            raise ValueError(f"to_step must be from {sampler.step} to {self.steps}, got {to_step}")
        with evaluating(self.pipe.transformer):
            while sampler.step < to_step and len(sampler.latents):
                i = sampler.step
                v = velocity(sampler.latents, self.plan.timesteps[i], self.guides[i])
                sampler = flow.advance(sampler, v, self.plan)
        return FlowState(sampler, velocity)

    def preview(self, state: FlowState) -> list[Image.Image]:
        if state.sampler.previous_x0 is None:
            raise ValueError("there is no preview before the first step")
        return self.pipe.decode(state.sampler.previous_x0)

    def keep(self, state: FlowState, indices: Sequence[int]) -> FlowState:
        B = len(state.sampler.latents)
        if not all(0 <= i < B for i in indices):
            raise ValueError(f"indices must be from 0 to {B - 1}, got {list(indices)}")
        rows = torch.tensor(indices, dtype=torch.long, device=self.pipe.device)
        return FlowState(state.sampler.keep(rows), state.velocity.keep(rows))

    def finish(self, state: FlowState) -> list[Image.Image]:
        return self.pipe.decode(self.advance(state, self.steps).sampler.latents)
