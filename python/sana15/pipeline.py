"""Prompts to pictures: text encoder, transformer under guidance, sampler, autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import flow
from .autoencoder import Autoencoder
from .config import SanaConfig
from .files import DataError, read_json
from .model import SanaTransformer, Text
from .text import GemmaTextEncoder, MiniTextEncoder, TextEncoder

MINI = Path(__file__).parent / "assets" / "mini"
LARGEST = 4  # times the side that a model was made for
KEPT_TEXT = (
    2 << 30
)  # bytes of the text's keys and values that are kept between steps; larger ones are made at every step


def noise(seed: int, prompt_index: int, candidate: int, shape: Sequence[int]) -> torch.Tensor:
    """Initial noise of one picture, fp32, made on the CPU: it depends on (seed, prompt index, candidate) and on nothing else."""
    sequence = np.random.SeedSequence([seed, prompt_index, candidate])
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    return torch.randn(*shape, generator=generator)


@dataclass(frozen=True)
class Item:
    """One picture to make: its prompt, the prompt's index in the run, and which candidate for that prompt it is."""

    prompt: str
    index: int
    candidate: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; see Pipeline.__call__ for the meanings."""

    seed: int = 0
    steps: int = 20
    guidance: float | None = None  # None, also for the interval: the model's own; see Pipeline.guidance_of
    guidance_interval: tuple[float, float] | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str = ""
    sampler: str = "flow_dpm"

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer from 0 on, got {self.seed!r}")
        if self.guidance is not None and not _is_finite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance!r}")
        if self.guidance_interval is not None and not _is_interval(self.guidance_interval):
            raise ValueError(
                f"guidance_interval must be 0 <= low <= high <= 1, got {' '.join(map(str, self.guidance_interval))}"
            )


GUIDANCE = 4.5  # of the published sizes


class Pipeline:
    """Text encoder + transformer + autoencoder, the flow shift they were trained with and the guidance that suits them.

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
    ) -> None:
        self.text, self.transformer, self.autoencoder = text, transformer, autoencoder
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
        from .checkpoint import load_transformer

        if str(source) == "mini" and not (MINI / "transformer").is_dir():
            raise FileNotFoundError(
                f"the mini model is not in this installation: {MINI} is missing; name a --model folder"
            )
        root = MINI if str(source) == "mini" else Path(source)
        for part in ("transformer", "vae", "text_encoder"):
            if not (root / part).is_dir():
                raise FileNotFoundError(f"{root / part} is missing: {source} is not a pipeline folder")
        mini = "vocabulary" in read_json(root / "text_encoder" / "config.json")
        dtype = dtype or (torch.float32 if mini else torch.bfloat16)
        text: TextEncoder
        text = MiniTextEncoder.load(root / "text_encoder") if mini else GemmaTextEncoder.load(root)
        transformer = load_transformer(root / "transformer", dtype=dtype)
        pipe = Pipeline(text, transformer, Autoencoder.load(root / "vae"), _flow_shift(root), *_guidance(root))
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
        for part in (self.transformer, self.autoencoder, getattr(self.text, "model", self.text)):
            part.to(device)  # type: ignore[union-attr]
        return self

    @property
    def device(self) -> torch.device:
        return self.transformer.proj_out.weight.device

    @property
    def config(self) -> SanaConfig:
        return self.transformer.config

    def identity(self) -> dict[str, str]:
        """Name of the model and SHA-256 of its transformer's weight files; "unsaved" for a pipeline that has no folder."""
        from .checkpoint import weight_files

        if self.source is None:
            return {"name": "unsaved", "sha256": ""}
        digest = hashlib.sha256()
        for path in sorted(set(weight_files(self.source / "transformer").values())):
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return {"name": self.source.resolve().name, "sha256": digest.hexdigest()}

    def picture_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) in pixels, the native size for None; ValueError for a size that the model cannot make."""
        factor = self.autoencoder.factor * self.config.patch_size
        native = self.config.sample_size * self.autoencoder.factor
        for name, side in (("height", height), ("width", width)):
            if side is not None and not (
                isinstance(side, int) and factor <= side <= LARGEST * native and side % factor == 0
            ):
                raise ValueError(
                    f"{name} must be a multiple of {factor} from {factor} to {LARGEST * native} pixels, got {side}"
                )
        return height or native, width or native

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, h, w) of a picture's latents."""
        height, width = self.picture_size(height, width)
        return self.config.in_channels, height // self.autoencoder.factor, width // self.autoencoder.factor

    def guidance_of(self, settings: Sampling) -> tuple[float, tuple[float, float]]:
        """Scale and interval of guidance: the settings', or else the model's own."""
        scale, interval = settings.guidance, settings.guidance_interval
        return self.guidance if scale is None else scale, self.guidance_interval if interval is None else interval

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
        sampler: str = "flow_dpm",
        batch_size: int | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[list[Image.Image]]:
        """Pictures for each prompt.

        Args:
            prompts: one prompt or several; the empty prompt is allowed and means "anything".
            n: pictures per prompt; the candidates 0..n-1, whose noise depends on (seed, prompt index, candidate) only.
            steps, sampler: "flow_dpm" (Flow-DPM-Solver++, SANA's default of 20 steps) or "flow_euler" (28).
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
        if self.config.guidance_embeds:
            raise ValueError("this is a Sprint model; its few-step sampler is not part of sana15")
        shape = self.latent_shape(settings.height, settings.width)
        plan = flow.schedule(settings.steps, sampler=settings.sampler, flow_shift=self.flow_shift)
        self.text.check([*{item.prompt for item in items}, settings.negative_prompt])
        size = batch_size or max(len(items), 1)
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        return self._batches(chunks, settings, shape, plan, callback)

    @torch.no_grad()
    def _batches(
        self,
        chunks: list[Sequence[Item]],
        settings: Sampling,
        shape: tuple[int, int, int],
        plan: flow.Schedule,
        callback: Callable[[int, int], None] | None,
    ) -> Iterator[tuple[Item, Image.Image]]:
        guidance, interval = self.guidance_of(settings)
        guides = [flow.guidance_is_on(s, guidance, interval) for s in plan.sigmas[:-1]]
        for number, chunk in enumerate(chunks):
            velocity = self.guided_velocity(
                [item.prompt for item in chunk], settings.negative_prompt, guidance if any(guides) else 1.0
            )
            noises = [noise(settings.seed, item.index, item.candidate, shape) for item in chunk]
            state = flow.SamplerState(torch.stack(noises).to(self.device))
            for i, guide in enumerate(guides):
                state = flow.advance(state, velocity(state.latents, plan.timesteps[i], guide), plan)
                if callback is not None:
                    callback(number * plan.steps + i + 1, len(chunks) * plan.steps)
            yield from zip(chunk, self.decode(state.latents))

    def guided_velocity(self, prompts: list[str], negative_prompt: str, guidance: float) -> Callable[..., torch.Tensor]:
        """The velocity of a batch as a function of (latents, timestep, guide=True); the text is encoded once, and unless it
        is a very large batch, its keys and values are computed once too, with the weights of the first step.

        With guide=False, or guidance 1, it is the conditional model's, at half the cost.
        """
        dtype, device = self.transformer.proj_out.weight.dtype, self.device
        text, mask = (t.to(device) for t in self.text.encode(prompts))
        text = text.to(dtype)
        B = len(prompts)
        if guidance != 1.0:
            null, null_mask = (t.to(device) for t in self.text.encode([negative_prompt], negative=True))
            text = _stack(null.to(dtype).expand(B, -1, -1), text)  # [2B, T, width]
            mask = _stack(null_mask.expand(B, -1), mask)
        kept: list[Text] = []

        def of_text(rows: int) -> tuple[torch.Tensor | Text, torch.Tensor | None]:
            layers = 2 * self.config.num_layers * self.config.width
            if torch.is_grad_enabled() or text.shape[:2].numel() * layers * text.element_size() > KEPT_TEXT:
                return text[-rows:], mask[-rows:]
            if not kept:
                kept.append(self.transformer.project(text, mask))
            return kept[0] if rows == len(text) else kept[0].last(rows), None

        def velocity(latents: torch.Tensor, timestep: float, guide: bool = True) -> torch.Tensor:
            both = guide and guidance != 1.0
            x = torch.cat([latents, latents]) if both else latents
            t = torch.full((x.shape[0],), timestep * self.config.timestep_scale, device=device)
            states, text_mask = of_text(x.shape[0])
            v = self.transformer(x.to(dtype), states, t, text_mask)
            if not both:
                return v.float()
            unconditional, conditional = v.chunk(2)
            return flow.guided(conditional, unconditional, guidance)

        return velocity

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        pictures = self.autoencoder.decode(latents.float())
        values = (pictures.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(v) for v in values]


def _stack(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Concatenates two batches of text, the shorter padded with zeros (masked tokens) to the longer one's length."""
    length = max(a.shape[1], b.shape[1])

    def pad(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(t, (*[0] * (2 * (t.dim() - 2)), 0, length - t.shape[1]))

    return torch.cat([pad(a), pad(b)])


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30  # also an integer too long for a float


def _is_interval(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(_is_finite(v) for v in value):
        return False
    return 0 <= value[0] <= value[1] <= 1


def _guidance(root: Path) -> tuple[float, tuple[float, float]]:
    """Scale and interval of guidance in the folder's sana15.json; the published sizes' where none is recorded."""
    path = root / "sana15.json"
    recorded = read_json(path) if path.exists() else {}
    scale, interval = recorded.get("guidance", GUIDANCE), recorded.get("guidance_interval", [0.0, 1.0])
    if not _is_finite(scale):
        raise DataError(f"{path}: guidance must be a finite number, got {scale!r}")
    if not _is_interval(interval):
        raise DataError(f"{path}: guidance_interval must be two numbers 0 <= low <= high <= 1, got {interval!r}")
    return float(scale), (float(interval[0]), float(interval[1]))


def _flow_shift(root: Path) -> float:
    """The shift of the folder's scheduler; SANA's 3.0 where none is recorded."""
    path = root / "scheduler" / "scheduler_config.json"
    return float(read_json(path).get("flow_shift", 3.0)) if path.exists() else 3.0
