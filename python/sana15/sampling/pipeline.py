"""Prompts to pictures: text encoder, transformer under guidance, sampler, autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sana_ext

from ..model.autoencoder import Autoencoder, factor_of
from ..model.checkpoint import load_transformer
from ..model.config import SanaConfig
from ..model.folder import GUIDANCE, pipeline_root, recorded_guidance
from ..model.measuring import evaluating
from ..model.text import GemmaTextEncoder, MiniTextEncoder, TextEncoder
from ..model.transformer import SanaTransformer
from ..storage.files import DataError, read_json
from ..storage.weights import weights_sha256
from . import flow
from .guidance import GuidedVelocity, stack
from .schedulers import SAMPLER, folder_sampler
from .settings import Item, Sampling, Seed
from .settings import noise as noise  # of the public names here

LARGEST = 4  # times the side that a model was made for


class Pipeline:
    """Text encoder + transformer + autoencoder, the flow shift they were trained with, the guidance and sampler that suit them.

    Build one with `Pipeline.from_pretrained("mini")` or from a folder in diffusers' layout.
    """

    def __init__(
        self,
        text: TextEncoder,
        transformer: SanaTransformer,
        autoencoder: Autoencoder,
        flow_shift: float = 3.0,
        guidance: float = GUIDANCE,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str = SAMPLER,
    ) -> None:
        self.text, self.transformer, self.autoencoder = text, transformer, autoencoder
        self.sampler = sampler
        self.flow_shift, self.guidance, self.guidance_interval = flow_shift, guidance, guidance_interval
        self.source: Path | None = None  # the folder it was loaded from

    @staticmethod
    def from_pretrained(source: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Pipeline:
        """`source` is "mini" or a pipeline folder (transformer/, vae/, text_encoder/, and tokenizer/ for Gemma).

        dtype: of the transformer; default float32 for the mini model, bfloat16 for the published ones. The autoencoder
        stays float32 and Gemma bfloat16, as SANA requires.

        Raises:
            FileNotFoundError: a part is missing; ValueError: a file is damaged or does not fit the config.
        """
        root = pipeline_root(source)
        for part in ("transformer", "vae", "text_encoder"):
            if not (root / part).is_dir():
                raise FileNotFoundError(f"{root / part} is missing: {source} is not a pipeline folder")
        mini = "vocabulary" in read_json(root / "text_encoder" / "config.json")
        dtype = dtype or (torch.float32 if mini else torch.bfloat16)
        text: TextEncoder
        text = MiniTextEncoder.load(root / "text_encoder") if mini else GemmaTextEncoder.load(root)
        transformer = load_transformer(root / "transformer", dtype=dtype)
        own = folder_sampler(root)
        pipe = Pipeline(
            text,
            transformer,
            Autoencoder.load(root / "vae"),
            own.flow_shift,
            *recorded_guidance(root),
            sampler=own.sampler,
        )
        config = transformer.config
        for what, given, needed in (
            ("text encoder gives features", text.width, config.caption_channels),
            ("autoencoder has channels", pipe.autoencoder.channels, config.in_channels),
        ):
            if given != needed:
                raise DataError(f"{root}: the {what} [{given}], the transformer takes [{needed}]")
        pipe.source = root
        return pipe.to(device)

    def to(self, device: str | torch.device) -> Pipeline:
        for part in self.parts:
            part.to(device)
        return self

    @property
    def parts(self) -> tuple[Any, ...]:
        """The modules: transformer, autoencoder, and the text encoder's."""
        return self.transformer, self.autoencoder, getattr(self.text, "model", self.text)

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    @property
    def config(self) -> SanaConfig:
        return self.transformer.config

    def identity(self) -> dict[str, str]:
        """Name of the model and SHA-256 of its transformer's weight files; "unsaved" for a pipeline that has no folder."""
        if self.source is None:
            return {"name": "unsaved", "sha256": ""}
        return {"name": self.source.resolve().name, "sha256": weights_sha256(self.source / "transformer")}

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, the native size for None; ValueError for a size that the model cannot make."""
        return _size(self.config, self.autoencoder.factor, height, width)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, h, w) of a picture's latents."""
        height, width = self.picture_size(height, width)
        return self.config.in_channels, height // self.autoencoder.factor, width // self.autoencoder.factor

    def guidance_of(self, settings: Sampling) -> tuple[float, tuple[float, float]]:
        """Scale and interval of guidance: the settings', or else the model's own."""
        scale, interval = settings.guidance, settings.guidance_interval
        return self.guidance if scale is None else scale, self.guidance_interval if interval is None else interval

    def sampler_of(self, settings: Sampling) -> str:
        """The settings' sampler, or else the model's own."""
        return self.sampler if settings.sampler is None else settings.sampler

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        steps: int = 20,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str = "",
        sampler: str | None = None,
        batch_size: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[list[Image.Image]]:
        """Pictures for each prompt. Modules in training mode are asked in eval mode, and have their modes back afterwards.

        Args:
            prompts: one prompt or several; the empty prompt is allowed and means "anything".
            n: pictures per prompt; the candidates 0..n-1, whose noise depends on (seed, prompt index, candidate) only.
            steps: of the sampler; SANA's defaults are 20 for "flow_dpm" and 28 for "flow_euler".
            sampler: "flow_dpm" (Flow-DPM-Solver++) or "flow_euler". Default: the one that the folder's scheduler is,
                "flow_dpm" where it has none. Either takes the folder's shift.
            guidance: classifier-free guidance scale; 1 switches the unconditional branch off. Default: the model's own
                (`guidance` in its sana15.json), 4.5 for the published sizes.
            guidance_interval: (low, high); guidance only at noise levels sigma with low <= sigma <= high. Outside, the
                model is asked once per step instead of twice. Default: the model's own, (0, 1) for the published sizes.
            height, width: pixels; default the size the model was made for, at most 4 times that.
            negative_prompt: takes the place of the empty prompt in guidance.
            batch_size: pictures computed at once; default all. It changes pictures by rounding only.
            callback: called as callback(done, total) after every denoising step.

        Returns:
            For each prompt a list of n PIL images.

        Raises:
            ValueError: a prompt, size, count or sampler that the model cannot serve.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a positive integer, got {n!r}")
        settings = Sampling(seed, steps, guidance, guidance_interval, height, width, negative_prompt, sampler)
        items = [Item(prompt, p, c) for p, prompt in enumerate(prompts) for c in range(n)]
        pictures = [picture for _, picture in self.sample(items, settings, batch_size=batch_size, callback=callback)]
        return [pictures[i * n : (i + 1) * n] for i in range(len(prompts))]

    def sample(
        self,
        items: Sequence[Item],
        settings: Sampling,
        *,
        batch_size: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[Item, Image.Image]]:
        """Any set of pictures of a run, one after the other as the batches are done.

        An item's picture does not depend on which others are asked for. Bad arguments raise here, before the first batch.
        """
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        generator = PipelineGenerator(self, settings)
        generator.check([item.prompt for item in items])
        size = batch_size or max(len(items), 1)
        return self._batches([items[i : i + size] for i in range(0, len(items), size)], generator, callback)

    def _batches(
        self,
        chunks: list[Sequence[Item]],
        generator: PipelineGenerator,
        callback: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[Item, Image.Image]]:
        for number, chunk in enumerate(chunks):
            seeds = [Seed(generator.settings.seed, item.index, item.candidate) for item in chunk]
            state = generator.start([item.prompt for item in chunk], seeds)
            for step in range(1, generator.steps + 1):
                state = generator.advance(state, step)
                if callback is not None:
                    callback(number * generator.steps + step, len(chunks) * generator.steps)
            yield from zip(chunk, generator.finish(state))

    def guided_velocity(self, prompts: list[str], negative_prompt: str, guidance: float) -> GuidedVelocity:
        """The velocity of a batch as a function of (latents, timestep, guide=True); the text is encoded here, once."""
        dtype, device = self.transformer.proj_out.weight.dtype, self.device
        text, mask = (t.to(device) for t in self.text.encode(prompts))
        text = text.to(dtype)
        if guidance != 1.0:
            B = len(prompts)
            null, null_mask = (t.to(device) for t in self.text.encode([negative_prompt], negative=True))
            text = stack(null.to(dtype).expand(B, -1, -1), text)  # [2B, T, width]
            mask = stack(null_mask.expand(B, -1), mask)
        return GuidedVelocity(self.transformer, text, mask, guidance)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        if not len(latents):
            return []
        with evaluating(self.autoencoder):
            pictures = self.autoencoder.decode(latents.float())
        values = (pictures.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(v) for v in values]


@dataclass(frozen=True)
class FlowState:
    """A batch of our pipeline between two steps."""

    sampler: flow.SamplerState
    velocity: GuidedVelocity


class PipelineGenerator:
    """sana15.Pipeline as a Generator. Pictures of another batch, also of what select leaves of one, differ by rounding only.

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

    def select(self, state: FlowState, indices: Sequence[int]) -> FlowState:
        B = len(state.sampler.latents)
        if not all(0 <= i < B for i in indices):
            raise ValueError(f"indices must be from 0 to {B - 1}, got {list(indices)}")
        rows = torch.tensor(indices, dtype=torch.long, device=self.pipe.device)
        return FlowState(state.sampler.select(rows), state.velocity.select(rows))

    def finish(self, state: FlowState) -> list[Image.Image]:
        return self.pipe.decode(self.advance(state, self.steps).sampler.latents)


def describe(pipe: Pipeline, settings: Sampling, item: Item, model: dict[str, str]) -> dict[str, Any]:
    """Everything that the picture of `item` follows from; `model` is pipe.identity()."""
    height, width = pipe.picture_size(settings.height, settings.width)
    guidance, interval = pipe.guidance_of(settings)
    return {
        "prompt": item.prompt,
        "negative_prompt": settings.negative_prompt,
        "seed": settings.seed,
        "prompt_index": item.index,
        "candidate": item.candidate,
        "steps": settings.steps,
        "sampler": pipe.sampler_of(settings),
        "guidance": guidance,
        "guidance_interval": list(interval),
        "flow_shift": pipe.flow_shift,
        "width": width,
        "height": height,
        "model": model["name"],
        "model_sha256": model["sha256"],
        "version": sana_ext.__version__,
    }


def check_folder_size(source: str | Path, height: int | None, width: int | None) -> None:
    """ValueError for a size that the model of a pipeline folder (or "mini") cannot make; weights are not read.

    A folder without readable configurations passes: loading it says what is wrong.
    """
    if height is None and width is None:
        return
    try:
        root = pipeline_root(source)
        config = SanaConfig.load(root / "transformer")
        stages = read_json(root / "vae" / "config.json")["encoder_block_out_channels"]
        factor = factor_of(stages)
    except (OSError, DataError, KeyError, TypeError):
        return
    _size(config, factor, height, width)


def _size(config: SanaConfig, latent: int, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels, `latent` of them along a latent's side; the native size for None."""
    factor, native = latent * config.patch_size, latent * config.sample_size
    for name, side in (("height", height), ("width", width)):
        if side is not None and not (
            isinstance(side, int) and factor <= side <= LARGEST * native and side % factor == 0
        ):
            raise ValueError(
                f"{name} must be a multiple of {factor} from {factor} to {LARGEST * native} pixels, got {side}"
            )
    return height or native, width or native
