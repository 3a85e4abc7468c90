"""Healing without pictures: a pruned model is trained on what its source makes of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..model.measuring import evaluating
from ..model.text import is_mini
from ..sampling.pipeline import Pipeline
from ..storage.concurrency import require_one_process
from ..training.distillation import training_loss
from .healing import CAPTION_DROP, LARGE_OPTIMIZER, Healing, heal, learner, training_of
from .trajectory import CalibrationBatch


@dataclass
class Samples:
    """Ends of sampled trajectories, on the CPU: latents [C, h, w] fp32, text [T, width] and mask [T], one of each per prompt."""

    latents: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    mask: list[torch.Tensor] = field(default_factory=list)

    def remember(self, batches: Iterable[CalibrationBatch]) -> Iterator[CalibrationBatch]:
        """The batches, unchanged; of the first batch of every chunk the pictures stay here."""
        chunk = -1
        for batch in batches:
            if batch.chunk != chunk:
                chunk = batch.chunk
                for kept, values in ((self.latents, batch.x0), (self.text, batch.text), (self.mask, batch.mask)):
                    kept.extend(values.cpu())
            yield batch

    def __len__(self) -> int:
        return len(self.latents)


def heal_on_samples(folder: Path, pipe: Pipeline, samples: Samples, healing: Healing) -> None:
    """Trains the transformer of a pruned pipeline folder on its source's samples, in place and on the source's device.

    A step's pictures are drawn without repetition as long as there are enough. The text encoder is not needed: features
    are those of the samples, of the empty prompt for CAPTION_DROP of them. Models other than the mini one are trained
    with gradient checkpointing and AdamW8bit; weights, gradients and their average are fp32: about 14 bytes per parameter.

    Args:
        folder: its sana15.json says which blocks were kept.
        pipe: the source; its transformer is the teacher. samples: of it.
        healing: see Healing.of_model and for_kept, which have been asked.

    Raises:
        ValueError: the loss is not finite, or a healed weight is not (DataError); the folder stays as it was. Or a launcher
            started several processes.
    """
    require_one_process("healing")
    mini = is_mini(pipe.text)
    config = training_of(healing, "soap" if mini else LARGE_OPTIMIZER)
    with learner(folder, pipe, healing) as (student, distillation):
        student.gradient_checkpointing = not mini
        batches = _Batches(pipe, samples, config.batch_size, healing.noises)

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            x0, text, mask = batches.draw(generator)

            def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return student(x, text, t * pipe.config.timestep_scale, mask)

            return training_loss(
                denoise, x0, generator, flow_shift=pipe.flow_shift, stratified=True,
                flow_weight=0.0 if healing.distill else 1.0, distillation=distillation, distill=healing.distill,
            )  # fmt: skip

        heal(folder, student, config, loss, ValueError)


class _Batches:
    """Training batches of samples: latents, text and mask [count * noises, ...] on the pipeline's device."""

    def __init__(self, pipe: Pipeline, samples: Samples, count: int, noises: int) -> None:
        self.samples, self.count, self.noises, self.device = samples, count, noises, pipe.device
        with torch.no_grad(), evaluating(*pipe.parts):
            null, mask = pipe.text.encode([""], negative=True)
        self.null = (null[0].to("cpu", samples.text[0].dtype), mask[0].cpu())

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        P = len(self.samples)
        rounds = [torch.randperm(P, generator=generator) for _ in range(-(-self.count // P))]
        chosen = torch.cat(rounds)[: self.count].tolist() * self.noises
        dropped = (torch.rand(len(chosen), generator=generator) < CAPTION_DROP).tolist()
        rows = [self.null if drop else (self.samples.text[i], self.samples.mask[i]) for i, drop in zip(chosen, dropped)]
        text = nn.utils.rnn.pad_sequence([t for t, _ in rows], batch_first=True)  # padding is masked
        mask = nn.utils.rnn.pad_sequence([m for _, m in rows], batch_first=True)
        x0 = torch.stack([self.samples.latents[i] for i in chosen])
        return x0.to(self.device), text.to(self.device, torch.float32), mask.to(self.device)
