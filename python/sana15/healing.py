"""Healing after pruning: a few steps of training. In memory on calibration batches, or of a folder by sana15 train's loop."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import flow
from .checkpoint import folder_weights
from .files import DTYPES, DataError
from .model import SanaTransformer
from .model_folders import SETTINGS, ModelFolder
from .sampling import check_training_seed
from .trajectory import CalibrationBatch

STEPS = 100  # the paper's
BATCH = 64
NOISES = 4
DISTILL = 10.0
LR, LR_LIMIT, PLAIN_LR = 1.6e-3, 2e-2, 5e-3  # with distillation (see Healing.for_kept), and without: docs/pruning.md
DECAY_PART = 0.3  # of the steps, in which the learning rate falls to zero
CAPTION_DROP = 0.25  # guidance subtracts the unconditional branch, so its errors count nearly as much as the other's
VELOCITY = 0.1  # weight of the velocity's distance beside the features'
MASKED = 3.0  # activations beyond so many standard deviations are left out of the distillation


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
        ValueError: the loss is not finite.
    """
    check_training_seed(seed)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    trained = [p for group in parameters for p in group["params"]]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        if before is not None:
            before(step, generator)
        batch = batches[order[step % len(order)]]
        device, dtype = batch.x0.device, trained[0].dtype
        noise = torch.randn(batch.x0.shape, generator=generator).to(device)
        sigma = flow.sample_sigmas(len(batch), generator, flow_shift=flow_shift).to(device)

        def velocity(x: torch.Tensor, t: torch.Tensor, batch: CalibrationBatch = batch) -> torch.Tensor:
            return model(x.to(dtype), batch.text.to(dtype), t * timestep_scale, batch.mask)  # noqa: B023, used before the next step

        loss = flow.loss(velocity, batch.x0, noise, sigma).mean()
        if not loss.isfinite():
            raise ValueError(f"the loss of healing is {loss.item()} at step {step + 1}")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


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
        student: the pruned model; it is given hooks. teacher: its source. kept: the teacher's blocks in the student.
    """

    def __init__(self, student: SanaTransformer, teacher: SanaTransformer, kept: Sequence[int]) -> None:
        possible = all(a < b for a, b in zip([-1, *kept], [*kept, teacher.config.num_layers]))
        if len(kept) != student.config.num_layers or not possible:
            raise ValueError("the kept blocks are not those of a model pruned from this teacher")
        if student.config.width != teacher.config.width:
            raise ValueError(f"the teacher's width is {teacher.config.width}, the model's {student.config.width}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.velocity = torch.empty(0)
        self.student_features: list[torch.Tensor] = []
        self.teacher_features: list[torch.Tensor] = []
        student.register_forward_pre_hook(self._begin, with_kwargs=True)
        student.register_forward_hook(lambda _, inputs, output: setattr(self, "velocity", output))
        for block in student.transformer_blocks:
            block.register_forward_hook(lambda _, inputs, outputs: self.student_features.append(outputs[0]))
        for i in counterparts(kept, teacher.config.num_layers):
            teacher.transformer_blocks[i].register_forward_hook(
                lambda _, inputs, outputs: self.teacher_features.append(outputs[0])
            )

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


@dataclass(frozen=True)
class Healing:
    """Training after pruning.

    Args:
        steps: of training, of batch_size rendered scenes each, each scene at `noises` noise levels.
        lr: SOAP's; it falls to zero over the last DECAY_PART of the steps. None: see `for_kept`.
        distill: weight of the distillation of the source's features and velocity, in the place of the flow loss; 0: the flow
            loss. Known features are a far less noisy target than random noise, which is what counts in 100 steps.
    """

    steps: int = STEPS
    lr: float | None = None
    batch_size: int = BATCH
    seed: int = 0
    distill: float = DISTILL
    noises: int = NOISES

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.noises < 1:
            raise ValueError(f"healing takes at least one step of one picture, got {self.steps} of {self.batch_size}")
        check_training_seed(self.seed)
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"healing's lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.distill < math.inf:
            raise ValueError(f"healing's distill must be at least 0 and finite, got {self.distill}")

    def for_kept(self, kept: Sequence[int], layers: int) -> Healing:
        """With an `lr`: where there is none, PLAIN_LR without distillation, and with it LR times a distance, to LR_LIMIT.

        The distance is the mean over kept blocks of a^2 + b^2: a source blocks whose work it learns to do, from an input b
        blocks away from the one it was trained on. The larger it is, the farther the weights have to go in the same steps.
        """
        if self.lr is not None:
            return self
        if not self.distill:
            return replace(self, lr=PLAIN_LR)
        ends = [i + 1 for i in counterparts(kept, layers)]
        starts = [0, *ends[:-1]]
        squares = [(end - start) ** 2 + (start - i) ** 2 for start, end, i in zip(starts, ends, kept)]
        return replace(self, lr=min(LR_LIMIT, LR * sum(squares) / len(kept)))


def require_healable(text: Any) -> None:
    """ValueError for a text encoder that rendered scenes cannot train a model for."""
    from .text import MiniTextEncoder

    if not isinstance(text, MiniTextEncoder):
        raise ValueError("healing trains on rendered scenes: only models with the mini text encoder can be healed here")


def heal_folder(folder: Path, teacher: Path, healing: Healing, device: str = "auto") -> None:
    """Trains the transformer of a pruned pipeline folder on rendered scenes, in place, by the loop of sana15 train.

    The text encoder stays as it is. The run is written into a folder beside, which is removed.

    Args:
        folder: with the mini model's text encoder, its sana15.json says which blocks were kept.
        teacher: the pipeline folder that it was pruned from.
        device: auto, cpu or cuda.
    """
    from .pipeline import Pipeline
    from .train import train
    from .train_config import TrainConfig, TransformerConfig

    pipe = Pipeline.from_pretrained(folder)
    require_healable(pipe.text)
    rate = healing.for_kept(kept_of(folder), ModelFolder(teacher).config.num_layers).lr
    assert rate is not None
    transformer = TransformerConfig(
        autoencoder=str(folder / "vae"), text_encoder=str(folder / "text_encoder"), start=str(folder),
        flow_shift=pipe.flow_shift, teacher=str(teacher) if healing.distill else "", distill=healing.distill,
        flow_weight=0.0 if healing.distill else 1.0, noises=healing.noises, stratified=True, caption_drop=CAPTION_DROP,
        export=_dtype_name(folder / "transformer"),
    )  # fmt: skip
    steps = healing.steps
    with tempfile.TemporaryDirectory(dir=folder, prefix="healing-") as run:
        config = TrainConfig(
            out=run, seed=healing.seed, steps=steps, batch_size=healing.batch_size, lr=rate,
            optimizer="soap", warmup=max(1, steps // 10), schedule="decay", decay_part=DECAY_PART, ema=0.9,
            precision="bf16", device=device, save_every=steps, keep=1,
            sample_every=steps + 1, sample_steps=1, transformer=transformer,
        )  # fmt: skip
        made = train(config)
        shutil.rmtree(folder / "transformer")
        shutil.move(made / "transformer", folder / "transformer")


def _dtype_name(folder: Path) -> str:
    """Of the folder's widest weights, in which the healed ones are written; fp32 for fp64."""
    widest = max((w.dtype for w in folder_weights(folder).values()), key=lambda dtype: dtype.itemsize)
    return {v: k for k, v in DTYPES.items()}.get(widest, "fp32")


def kept_of(folder: Path) -> list[int]:
    """The kept blocks in a pruned folder's sana15.json; DataError where there are none."""
    pruning = ModelFolder(folder).settings().get("pruning")
    kept = pruning.get("kept") if isinstance(pruning, dict) else None
    if not isinstance(kept, list) or not all(type(i) is int for i in kept):
        raise DataError(f"{folder / SETTINGS} does not say which blocks were kept")
    return kept
