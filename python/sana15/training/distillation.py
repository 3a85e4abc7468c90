"""Feature distillation: a pruned model learns what its source's blocks put out; and the loss of a training step with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..model.depth import Watched, with_blocks
from ..model.measuring import evaluating
from ..model.transformer import SanaTransformer
from ..sampling import flow

VELOCITY = 0.1  # weight of the velocity's distance beside the features'
MASKED = 3.0  # activations beyond so many standard deviations are left out of the distillation


def counterparts(kept: Sequence[int], layers: int) -> list[int]:
    """For each kept block the source's block whose output its own is to become; the last has the source's last.

    The missing blocks' work is spread evenly: the sum of squared numbers of source blocks per kept block is as small as it
    can be. Of the ways to do that, each block gets input as near as possible (squared distance in blocks) to what it was
    trained on. Kept blocks 0 1 2 3 of 12 become 2 5 8 11, and 0 2 3 5 of 6 stay before the next ones: 1 2 4 5.
    """
    n = len(kept)
    share, extra = divmod(layers, n)  # `extra` blocks do the work of share + 1, the others of share
    # By the number of extra ones so far: the squared distances' sum, and the source's depth after each block.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for j in range(n):
        reached: dict[int, tuple[int, list[int]]] = {}
        for count, (cost, depths) in best.items():
            depth = depths[-1] if depths else 0
            for more in (0, 1):
                if count + more <= extra and extra - count - more <= n - 1 - j:
                    found = (cost + (depth - kept[j]) ** 2, [*depths, depth + share + more])
                    if count + more not in reached or found < reached[count + more]:
                        reached[count + more] = found
        best = reached
    return [depth - 1 for depth in best[extra][1]]


class Distillation:
    """The distance of a pruned model's activations from its source's, on the input that the pruned model has just had.

    VELOCITY times the mean squared difference of the velocities, plus the mean over blocks of this: a kept block's output against its
    counterpart's, mean squared difference over the source's variance, activations beyond MASKED standard deviations left
    out on both sides. A few activations of diffusion transformers are hundreds of times larger than the others, and plain
    distillation fits those.

    Args:
        student: the pruned model. teacher: its source. Both are given hooks, and the teacher is in eval mode and learns
            nothing, until close. kept: the teacher's blocks in the student.
    """

    def __init__(self, student: SanaTransformer, teacher: SanaTransformer, kept: Sequence[int]) -> None:
        possible = all(a < b for a, b in zip([-1, *kept], [*kept, teacher.config.num_layers]))
        if len(kept) != student.config.num_layers or not possible:
            raise ValueError("the kept blocks are not those of a model pruned from this teacher")
        if student.config.width != teacher.config.width:
            raise ValueError(f"the teacher's width is {teacher.config.width}, the model's {student.config.width}")
        self._undo = ExitStack()
        self._undo.enter_context(evaluating(teacher))
        for parameter in teacher.parameters():
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        told = {*counterparts(kept, teacher.config.num_layers)}
        self.teacher = with_blocks(teacher, [
            Watched(block, lambda before, after: self.teacher_features.append(after)) if i in told else block
            for i, block in enumerate(teacher.transformer_blocks)
        ])  # fmt: skip
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.velocity = torch.empty(0)
        self.student_features: list[torch.Tensor] = []
        self.teacher_features: list[torch.Tensor] = []
        hooks = [
            student.register_forward_pre_hook(self._begin, with_kwargs=True),
            student.register_forward_hook(lambda _, inputs, output: setattr(self, "velocity", output)),
        ]
        for block in student.transformer_blocks:
            hooks.append(block.register_forward_hook(lambda _, inputs, output: self.student_features.append(output)))
        for hook in hooks:
            self._undo.callback(hook.remove)

    def close(self) -> None:
        """Both models are as they were before, without hooks; the teacher's modes and requires_grad are its own again."""
        self._undo.close()

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs = (inputs, named)
        self.student_features.clear()

    def loss(self) -> torch.Tensor:
        self.teacher_features.clear()
        with torch.no_grad():
            velocity = self.teacher(*self.inputs[0], **self.inputs[1])
        terms = []
        for ours, theirs in zip(self.student_features, self.teacher_features):
            theirs = theirs.float()
            deviation = theirs.std()
            keep = (theirs - theirs.mean()).abs() <= MASKED * deviation
            error = (ours.float() - theirs).square()[keep].mean()
            terms.append(error / theirs[keep].var().clamp_min(1e-12))
        distance = (self.velocity.float() - velocity.float()).square().mean()
        return torch.stack(terms).mean() + VELOCITY * distance


def training_loss(
    denoise: flow.Velocity,
    x0: torch.Tensor,
    generator: torch.Generator,
    *,
    flow_shift: float,
    stratified: bool,
    flow_weight: float,
    distillation: Distillation | None,
    distill: float,
) -> torch.Tensor:
    """flow_weight times the mean flow loss of clean latents at drawn noise levels, plus distill times the distillation of that pass.

    Args:
        denoise: (noisy latents, timestep) -> velocity. x0: [B, C, h, w]. generator: on the CPU; draws noise, then levels.
        stratified: see flow.sample_sigmas.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    sigma = flow.sample_sigmas(len(x0), generator, flow_shift=flow_shift, stratified=stratified)
    loss = flow_weight * flow.loss(denoise, x0, noise, sigma.to(x0.device)).mean()
    return loss if distillation is None else loss + distill * distillation.loss()
