"""Healing after pruning: a few steps of training. In memory on calibration batches, or of a folder on scenes or samples."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..model.checkpoint import load_transformer, save_transformer
from ..model.folder import recorded_kept
from ..model.text import is_mini
from ..model.transformer import SanaTransformer
from ..sampling import flow
from ..sampling.pipeline import Pipeline
from ..sampling.settings import check_training_seed
from ..storage.concurrency import require_one_process
from ..storage.files import DTYPES, DataError, require_finite
from ..storage.weights import folder_weights
from ..training.config import TrainConfig
from ..training.distillation import Distillation, counterparts
from ..training.loop import Average, Loss, fit
from .trajectory import CalibrationBatch

STEPS = 100  # the paper's
BATCH = 64  # of the mini model; of others LARGE_BATCH
NOISES = 4
DISTILL = 10.0
LR, LR_LIMIT, PLAIN_PART = 1.6e-3, 2e-2, 0.5  # see Healing.for_kept, and docs/pruning.md for the trials
# Of models other than the mini one, not measured: a batch for one GPU, the paper's rate of training, AdamW's 8-bit state.
LARGE_BATCH, LARGE_LR, LARGE_OPTIMIZER = 4, 1e-4, "adamw8bit"
DATA = ("scenes", "samples")
DECAY_PART = 0.3  # of the steps, in which the learning rate falls to zero
CAPTION_DROP = 0.25  # guidance subtracts the unconditional branch, so its errors count nearly as much as the other's


def trainable_copy(model: SanaTransformer) -> SanaTransformer:
    """A copy that learns, in training mode: of 16-bit weights in fp32, since a step changes less than their last digit."""
    copied = copy.deepcopy(model).requires_grad_(True).train()
    return copied.float() if copied.proj_out.weight.dtype.itemsize == 2 else copied


@torch.enable_grad()
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
        ValueError: the loss is not finite, or a launcher started several processes.
    """
    check_training_seed(seed)
    require_one_process("healing")
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    trained = [p for group in parameters for p in group["params"]]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        if before is not None:
            before(step, generator)
        batch = batches[order[step % len(order)]]
        device, dtype = batch.x0.device, trained[0].dtype
        noise = torch.randn(batch.x0.shape, generator=generator).to(device)
        sigma = flow.sample_sigmas(len(batch), generator, flow_shift=flow_shift).to(device)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model(x.to(dtype), batch.text.to(dtype), t * timestep_scale, batch.mask)

        return flow.loss(velocity, batch.x0, noise, sigma).mean()

    fit(loss, trained, optimizer, range(steps), seed=seed)


@dataclass(frozen=True)
class Healing:
    """Training after pruning.

    Args:
        steps: of training, of batch_size pictures each, each picture at `noises` noise levels. batch_size None: BATCH for the
            mini model, LARGE_BATCH for others.
        data: "scenes", rendered ones, for models with the mini text encoder; or "samples", what the source makes of prompts,
            for any. None: scenes where they are possible.
        lr: SOAP's (of other models than the mini one AdamW8bit's); it falls to zero over the last DECAY_PART of the steps.
            None: see `for_kept`.
        distill: weight of the distillation of the source's features and velocity, in the place of the flow loss; 0: the flow
            loss. Known features are a far less noisy target than random noise, which is what counts in 100 steps.
    """

    steps: int = STEPS
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0
    distill: float = DISTILL
    noises: int = NOISES
    data: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.noises < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"healing takes at least one step of one picture, got {self.steps} of {self.batch_size}")
        check_training_seed(self.seed)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"healing's lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.distill < math.inf:
            raise ValueError(f"healing's distill must be at least 0 and finite, got {self.distill}")
        if self.data not in (None, *DATA):
            raise ValueError(f"healing's data must be one of {', '.join(DATA)}, got {self.data!r}")

    def of_model(self, text: Any) -> Healing:
        """With `data` and `batch_size` for a pipeline with this text encoder; ValueError for scenes that its words do not tell of."""
        mini = is_mini(text)
        if self.data == "scenes" and not mini:
            raise ValueError(
                "only a model with the mini text encoder can be healed on rendered scenes; others on samples"
            )
        return replace(
            self, data=self.data or ("scenes" if mini else "samples"),
            batch_size=self.batch_size or (BATCH if mini else LARGE_BATCH),
            lr=self.lr if mini or self.lr else LARGE_LR,
        )  # fmt: skip

    def for_kept(self, kept: Sequence[int], layers: int) -> Healing:
        """With an `lr`: where there is none, LR times a distance, to LR_LIMIT; PLAIN_PART of that without distillation.

        The distance is the mean over kept blocks of a^2 + b^2: a source blocks whose work it learns to do, from an input b
        blocks away from the one it was trained on. The larger it is, the farther the weights have to go in the same steps.
        Both are SOAP's rates for the mini model; `of_model` gives others LARGE_LR.
        """
        if self.lr is not None:
            return self
        ends = [i + 1 for i in counterparts(kept, layers)]
        starts = [0, *ends[:-1]]
        squares = [(end - start) ** 2 + (start - i) ** 2 for start, end, i in zip(starts, ends, kept)]
        rate = min(LR_LIMIT, LR * sum(squares) / len(kept))
        return replace(self, lr=rate if self.distill else PLAIN_PART * rate)


def heal_on_scenes(folder: Path, pipe: Pipeline, healing: Healing) -> None:
    """Trains the transformer of a pruned pipeline folder on rendered scenes, in place and on the source's device.

    Args:
        folder: its sana15.json says which blocks were kept.
        pipe: the source, with the mini text encoder, which stays as it is; its transformer is the teacher.
        healing: see Healing.of_model and for_kept, which have been asked.

    Raises:
        DataError: the loss or a healed weight is not finite; the folder stays as it was. ValueError: a launcher started
            several processes.
    """
    from ..training.config import TransformerConfig
    from ..training.data import scene_batches
    from ..training.tasks import TransformerTask

    require_one_process("healing")
    config = training_of(healing, "soap", transformer=TransformerConfig(
        flow_shift=pipe.flow_shift, noises=healing.noises, stratified=True, caption_drop=CAPTION_DROP,
        distill=healing.distill, flow_weight=0.0 if healing.distill else 1.0,
    ))  # fmt: skip
    batches = scene_batches(config.seed, config.batch_size, 0, config.steps, config.workers)
    text = copy.deepcopy(pipe.text).requires_grad_(False)  # type: ignore[attr-defined]
    with learner(folder, pipe, healing) as (student, distillation):
        device = pipe.device.type
        task = TransformerTask(config, device, text, student, pipe.autoencoder, distillation=distillation)
        heal(folder, student, config, lambda step, generator: task.loss(next(batches), generator), DataError)


@contextmanager
def learner(folder: Path, pipe: Pipeline, healing: Healing) -> Iterator[tuple[SanaTransformer, Distillation | None]]:
    """A pruned folder's transformer in training mode, on the device of its source, and its distillation where it has one."""
    student = load_transformer(folder / "transformer").to(pipe.device).train()
    if not healing.distill:
        yield student, None
        return
    distillation = Distillation(student, pipe.transformer, recorded_kept(folder))
    try:
        yield student, distillation
    finally:
        distillation.close()  # the source is the caller's


def heal(folder: Path, student: SanaTransformer, config: TrainConfig, loss: Loss, not_finite: type[ValueError]) -> None:
    """Trains a pruned folder's transformer and puts the average of its weights, in their dtype, in the folder's place for it.

    Args:
        loss: under bf16 autocast. not_finite: what is raised where it is not finite.
    """
    from ..training.run import learning_rate, make_optimizer

    device = student.proj_out.weight.device.type
    parameters = list(student.parameters())
    optimizer, average = make_optimizer(config, [{"params": parameters}]), Average(student, config.ema)

    def in_bf16(step: int, generator: torch.Generator) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss(step, generator)

    fit(
        in_bf16, parameters, optimizer, tqdm(range(config.steps), desc="healing", unit="step", disable=None),
        seed=config.seed, rate=lambda step: learning_rate(config, step), clip=config.grad_clip, average=average,
        not_finite=not_finite,
    )  # fmt: skip
    average.swap()
    require_finite(student.state_dict(), f"after {config.steps} steps of healing", "the healed model is not written")
    save_transformer(student, folder / "transformer", dtype=DTYPES[dtype_name(folder / "transformer")])


def training_of(healing: Healing, optimizer: str, **others: Any) -> TrainConfig:
    """The configuration of a healing's training; `healing` has its rate and batch size."""
    assert healing.lr is not None
    assert healing.batch_size is not None
    return TrainConfig(
        seed=healing.seed, steps=healing.steps, batch_size=healing.batch_size, lr=healing.lr, optimizer=optimizer,
        warmup=max(1, healing.steps // 10), schedule="decay", decay_part=DECAY_PART, ema=0.9, precision="bf16", **others,
    )  # fmt: skip


def dtype_name(folder: Path) -> str:
    """That holds all the folder's weights, in which the healed ones are written; fp32 for fp64."""
    widest = functools.reduce(torch.promote_types, (w.dtype for w in folder_weights(folder).values()))
    return {v: k for k, v in DTYPES.items()}.get(widest, "fp32")
