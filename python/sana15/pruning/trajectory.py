"""Calibration: what a model sees when it samples, for measuring its blocks (arXiv:2501.18427, section 2.3)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.measuring import evaluating
from ..model.text import is_mini
from ..sampling import flow
from ..sampling.pipeline import Pipeline, Sampling, noise

#: Candidate numbers of the fresh noise for the loss: no picture that anyone samples has them.
FRESH = 1_000_003


@dataclass(frozen=True)
class CalibrationBatch:
    """One step of the sampled trajectories of some prompts, as the conditional branch sees it."""

    latents: torch.Tensor  # [B, C, h, w] fp32, the trajectory at this noise level: the model's input
    velocity: torch.Tensor  # [B, C, h, w] fp32, the conditional branch's output
    timestep: torch.Tensor  # [B], what the model is told
    text: torch.Tensor  # [B, T, width], the text encoder's features
    mask: torch.Tensor  # [B, T]
    x0: torch.Tensor  # [B, C, h, w] fp32, the trajectory's end
    noise: torch.Tensor  # [B, C, h, w] fp32, fresh; the same at every step of a chunk
    sigma: float
    step: int
    chunk: int  # number of the group of prompts that are sampled together

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def sigmas(self) -> torch.Tensor:
        """[B], for flow.loss."""
        return torch.full((len(self),), self.sigma, device=self.x0.device)


@torch.no_grad()
def calibration(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    at: Sequence[int] | None = None,
    seed: int = 0,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    height: int | None = None,
    width: int | None = None,
    sampler: str | None = None,
    batch_size: int = 16,
) -> Iterator[CalibrationBatch]:
    """The prompts' sampled trajectories, batch by batch: memory does not grow with the number of prompts.

    Trajectories are those of pipe(prompts, seed=seed, ...), under guidance; recorded is the conditional branch.

    Args:
        pipe: the model and its parts.
        prompts: one trajectory each.
        steps, seed, guidance, guidance_interval, height, width, sampler: as in Pipeline.__call__.
        at: numbers of the sampling steps (0 is pure noise) that are given out; default all.
        batch_size: prompts that are sampled together, a chunk.

    Returns:
        An iterator: for every chunk one batch per step of `at`, in their order.

    Raises:
        ValueError: no prompts, a prompt that the text encoder does not take, or numbers that cannot be; at once, not at
        the first batch.
    """
    settings = Sampling(seed, steps, guidance, guidance_interval, height, width, "", sampler)
    plan = flow.schedule(steps, sampler=pipe.sampler_of(settings), flow_shift=pipe.flow_shift)
    at = range(steps) if at is None else list(at)
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size}")
    if not at or any(not 0 <= i < steps for i in at):
        raise ValueError(f"at must name steps from 0 to {steps - 1}, got {list(at)}")
    if pipe.config.guidance_embeds:
        raise ValueError("this is a Sprint model; its few-step sampler is not part of sana15")
    pipe.text.check(list(prompts))
    return _chunks(pipe, list(prompts), settings, plan, at, pipe.latent_shape(height, width), batch_size)


@torch.no_grad()
def _chunks(
    pipe: Pipeline,
    prompts: list[str],
    settings: Sampling,
    plan: flow.Schedule,
    at: Sequence[int],
    shape: tuple[int, int, int],
    size: int,
) -> Iterator[CalibrationBatch]:
    for chunk, first in enumerate(range(0, len(prompts), size)):
        numbers = range(first, min(first + size, len(prompts)))
        with evaluating(*pipe.parts):  # not while the caller has a batch
            state, path, fresh, text, mask = _sampled(pipe, prompts, numbers, settings, plan, at, shape)
        for i, sigma, latents, given, t in path:
            yield CalibrationBatch(latents, given, t, text, mask, state.latents, fresh, sigma, i, chunk)


def _sampled(
    pipe: Pipeline,
    prompts: list[str],
    numbers: range,
    settings: Sampling,
    plan: flow.Schedule,
    at: Sequence[int],
    shape: tuple[int, int, int],
) -> tuple[flow.SamplerState, list[tuple[Any, ...]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Yields of one chunk: the end, (step, sigma, latents, velocity, timestep) on the way, fresh noise, text features and mask."""
    model, device = pipe.transformer, pipe.device
    dtype = model.proj_out.weight.dtype
    guidance, interval = pipe.guidance_of(settings)
    text, mask = _encoded(pipe, [prompts[i] for i in numbers], dtype)
    null, null_mask = _encoded(pipe, [""], dtype, negative=True)

    def velocity(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        B = len(x)
        return model(x.to(dtype), text.expand(B, -1, -1), t, mask.expand(B, -1)).float()

    state = flow.SamplerState(torch.stack([noise(settings.seed, i, 0, shape) for i in numbers]).to(device))
    fresh = torch.stack([noise(settings.seed, i, FRESH, shape) for i in numbers]).to(device)
    path = []
    for i, sigma in enumerate(plan.sigmas[:-1]):
        t = torch.full((len(numbers),), plan.timesteps[i] * pipe.config.timestep_scale, device=device)
        given = velocity(state.latents, t, text, mask)
        if i in at:
            path.append((i, sigma, state.latents, given, t))
        if flow.guidance_is_on(sigma, guidance, interval):
            steered = flow.guided(given, velocity(state.latents, t, null, null_mask), guidance)
        else:
            steered = given
        state = flow.advance(state, steered, plan)
    return state, path, fresh, text, mask


def _encoded(
    pipe: Pipeline, prompts: list[str], dtype: torch.dtype, *, negative: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    text, mask = pipe.text.encode(prompts, negative=negative)
    return text.to(pipe.device, dtype), mask.to(pipe.device)


def calibration_prompts(pipe: Pipeline, source: str | None, count: int, seed: int = 0) -> list[str]:
    """The first `count` prompts of a file (see sana15 sample --prompts); without one, of the mini model's training stream.

    Raises:
        ValueError: a count below 1, or no file for a model that was not trained on scenes. FileNotFoundError, DataError.
    """
    from ..evaluation import layout
    from ..scenes.training import sample_training

    if count < 1:
        raise ValueError(f"the number of calibration prompts must be at least 1, got {count}")
    if source is not None:
        return [line["prompt"] for line in layout.read_prompts(source)][:count]
    if not is_mini(pipe.text):
        raise ValueError(
            "name a file of calibration prompts with --prompts: only the mini model has prompts of its own"
        )
    rng = random.Random(f"calibration/{seed}")
    return [sample_training(rng)[0] for _ in range(count)]
