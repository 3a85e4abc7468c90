"""Healing after pruning, in memory: a few steps of training on calibration batches, and the distillation of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import flow
from .model import SanaTransformer
from .trajectory import CalibrationBatch

LR = 5e-4
MASKED = 3.0  # activations beyond so many standard deviations are left out of the distillation


def flow_steps(
    model: nn.Module,
    parameters: Sequence[dict[str, Any]],
    batches: Sequence[CalibrationBatch],
    steps: int,
    *,
    seed: int = 0,
    flow_shift: float = 3.0,
    timestep_scale: float = 1.0,
    before: Any = None,
) -> None:
    """AdamW on the flow loss of the batches' x0, with fresh noise and training's noise levels; gradients clipped at norm 1.

    Args:
        model: called as model(latents, text, timestep, mask). parameters: AdamW's groups, with `lr`.
        before: called with the step's number and its generator before each step.

    Raises:
        ValueError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    trained = [p for group in parameters for p in group["params"]]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        if before is not None:
            before(step, generator)
        batch = batches[order[step % len(order)]]
        device, dtype = batch.x0.device, batch.text.dtype
        noise = torch.randn(batch.x0.shape, generator=generator).to(device)
        sigma = flow.sample_sigmas(len(batch), generator, flow_shift=flow_shift).to(device)

        def velocity(x: torch.Tensor, t: torch.Tensor, batch: CalibrationBatch = batch) -> torch.Tensor:
            return model(x.to(dtype), batch.text, t * timestep_scale, batch.mask)  # noqa: B023, used before the next step

        loss = flow.loss(velocity, batch.x0, noise, sigma).mean()
        if not loss.isfinite():
            raise ValueError(f"the loss of healing is {loss.item()} at step {step + 1}")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Distillation:
    """The distance of a pruned model's activations from its source's, on the input that the pruned model has just had.

    What a kept block hands to the next kept one is compared with what the source's blocks hand to that one: mean squared
    difference over the source's variance, activations beyond MASKED standard deviations left out on both sides. A few
    activations of diffusion transformers are hundreds of times larger than the others, and plain distillation fits those.

    Args:
        student: the pruned model; it is given hooks. teacher: its source. kept: the teacher's blocks in the student.
    """

    def __init__(self, student: SanaTransformer, teacher: SanaTransformer, kept: Sequence[int]) -> None:
        if len(kept) != student.config.num_layers or not all(0 <= i < teacher.config.num_layers for i in kept):
            raise ValueError("the kept blocks are not those of a model pruned from this teacher")
        if student.config.width != teacher.config.width:
            raise ValueError(f"the teacher's width is {teacher.config.width}, the model's {student.config.width}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.student_features: list[torch.Tensor] = []
        self.teacher_features: list[torch.Tensor] = []
        student.register_forward_pre_hook(self._begin)
        for block in student.transformer_blocks:
            block.register_forward_hook(lambda _, inputs, outputs: self.student_features.append(outputs[0]))
        last = [i - 1 for i in kept[1:]] + [teacher.config.num_layers - 1]  # what stands before the next kept block
        for i in last:
            teacher.transformer_blocks[i].register_forward_hook(
                lambda _, inputs, outputs: self.teacher_features.append(outputs[0])
            )

    def _begin(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs = inputs
        self.student_features.clear()

    def loss(self) -> torch.Tensor:
        self.teacher_features.clear()
        with torch.no_grad():
            self.teacher(*self.inputs)
        terms = []
        for ours, theirs in zip(self.student_features, self.teacher_features):
            theirs = theirs.float()
            deviation = theirs.std()
            keep = (theirs - theirs.mean()).abs() <= MASKED * deviation
            error = (ours.float() - theirs).square()[keep].mean()
            terms.append(error / theirs[keep].var().clamp_min(1e-12))
        return torch.stack(terms).mean()
