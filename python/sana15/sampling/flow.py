"""Rectified flow as SANA trains and samples it: noise levels, loss, Flow-DPM-Solver++ and Flow-Euler as plain functions.

Convention: x_sigma = (1 - sigma) * x0 + sigma * eps, velocity v = eps - x0, timestep = 1000 * sigma (0 clean, 1000 noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from .settings import SAMPLERS as SAMPLERS
from .settings import check_schedule

TRAIN_STEPS = 1000
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents [B, ...], timestep [B]) -> velocity [B, ...]


def shift(sigma: float, factor: float) -> float:
    """F s / (1 + (F - 1) s): moves the schedule towards noise as pictures grow (SANA: 3.0; 4K: 6.0)."""
    return factor * sigma / (1 + (factor - 1) * sigma)


# Training


def sample_sigmas(
    count: int, generator: torch.Generator | None = None, *, flow_shift: float = 3.0, stratified: bool = False
) -> torch.Tensor:
    """[count] fp32 noise levels: logit-normal on SANA's table of 1000 levels, shifted afterwards.

    Args:
        stratified: one level from each of `count` equally likely parts of the distribution, in random order. Each level alone
            is distributed as without; their mean, and a loss's over them, varies less.

    Source: arXiv:2410.10629 section 3.1 and the released training configuration (mean 0, standard deviation 1).
    """
    if stratified:
        part = torch.randperm(count, generator=generator).double()
        quantile = (part + torch.rand(count, generator=generator, dtype=torch.float64)) / max(count, 1)
        u = torch.sigmoid(torch.special.ndtri(quantile))
    else:
        u = torch.sigmoid(torch.randn(count, generator=generator, dtype=torch.float64))
    index = (u * TRAIN_STEPS).floor().clamp_(max=TRAIN_STEPS - 1)
    level = index * ((1 - 1 / TRAIN_STEPS) / (TRAIN_STEPS - 1))  # the table runs from 0 to 0.999
    return (flow_shift * level / (1 + (flow_shift - 1) * level)).float()


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_sigma of a batch; sigma is [B]."""
    s = sigma.view(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
    return (1 - s) * x0 + s * noise


def loss(velocity: Velocity, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """[B] mean squared error per sample between the model's velocity and eps - x0.

    The model sees the timestep truncated to an integer, as the released models did in training.
    """
    predicted = velocity(add_noise(x0, noise, sigma), (sigma * TRAIN_STEPS).floor())
    return (predicted.float() - (noise - x0).float()).square().flatten(1).mean(1)


# Schedules: sigma falls from near 1 to 0 in `steps` steps; steps + 1 levels.


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a sampling run, the timestep the model is told at each, and the sampler that uses them."""

    sampler: str
    sigmas: tuple[float, ...]  # steps + 1, the last is 0
    timesteps: tuple[float, ...]  # steps

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def schedule(steps: int, *, sampler: str = "flow_dpm", flow_shift: float = 3.0) -> Schedule:
    """The levels of diffusers' DPMSolverMultistepScheduler (flow sigmas) or FlowMatchEulerDiscreteScheduler for SANA."""
    check_schedule(steps, sampler)
    if sampler == "flow_dpm":
        # diffusers' own operations: a level on the edge of a timestep would be truncated to another one.
        table = np.flip(1.0 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1))[:-1]
        shifted = flow_shift * table / (1 + (flow_shift - 1) * table)
        sigmas = shifted.tolist()
        timesteps = np.trunc(shifted * TRAIN_STEPS).tolist()
    else:
        # The smallest training level is shifted once for the range and once more with every level: SANA's Flow-Euler.
        low = shift(1 / TRAIN_STEPS, flow_shift)
        levels = [1.0] if steps == 1 else [1.0 + (low - 1.0) * i / (steps - 1) for i in range(steps)]
        sigmas = [shift(level, flow_shift) for level in levels]
        timesteps = [s * TRAIN_STEPS for s in sigmas]
    return Schedule(sampler, (*sigmas, 0.0), tuple(timesteps))


# Sampling


@dataclass(frozen=True)
class SamplerState:
    """The state of a sampling run: everything that a pause must keep."""

    latents: torch.Tensor  # [B, ...], fp32, at level sigmas[step]
    step: int = 0
    previous_x0: torch.Tensor | None = None  # the last data prediction, for the second-order step and for previews

    def select(self, indices: torch.Tensor) -> SamplerState:
        """The state of the chosen samples only."""
        previous = None if self.previous_x0 is None else self.previous_x0[indices]
        return replace(self, latents=self.latents[indices], previous_x0=previous)


def predict_x0(state: SamplerState, velocity: torch.Tensor, plan: Schedule) -> torch.Tensor:
    """x - sigma * v: the clean latents this velocity points at."""
    return state.latents - plan.sigmas[state.step] * velocity.float()


def advance(state: SamplerState, velocity: torch.Tensor, plan: Schedule) -> SamplerState:
    """One step of the plan's sampler with the model's velocity at the current level.

    Flow-DPM-Solver++ (arXiv:2211.01095 in data prediction, with alpha = 1 - sigma; SANA, arXiv:2410.10629 section 3.2):
    second order multistep (midpoint), first order at the first and the last step. Flow-Euler: x + (s_next - s) v.
    """
    i, x = state.step, state.latents
    now, then = plan.sigmas[i], plan.sigmas[i + 1]
    x0 = predict_x0(state, velocity, plan)
    if plan.sampler == "flow_euler":
        return SamplerState(x + (then - now) * velocity.float(), i + 1, x0)
    if then == 0.0:
        return SamplerState(x0, i + 1, x0)
    h = _log_snr(then) - _log_snr(now)
    gain = -(1 - then) * math.expm1(-h)
    out = (then / now) * x + gain * x0
    if state.previous_x0 is not None:
        ratio = (_log_snr(now) - _log_snr(plan.sigmas[i - 1])) / h
        out = out + (0.5 * gain / ratio) * (x0 - state.previous_x0)
    return SamplerState(out, i + 1, x0)


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance, u + w (c - u), in fp32. On velocities it equals guidance on noise or data predictions."""
    c, u = conditional.float(), unconditional.float()
    return u + guidance * (c - u)


def guidance_is_on(sigma: float, guidance: float, interval: tuple[float, float] = (0.0, 1.0)) -> bool:
    """Tells whether the unconditional branch is needed at noise level sigma: a scale other than 1, and a level inside the interval.

    Source: arXiv:2404.07724; the released SANA pipelines take the same interval.
    """
    return guidance != 1.0 and interval[0] <= sigma <= interval[1]


def _log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma) with alpha = 1 - sigma."""
    return math.log((1 - sigma) / sigma)
