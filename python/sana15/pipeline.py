"""Prompts to pictures: text encoder, transformer under guidance, sampler, autoencoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import flow
from .autoencoder import Autoencoder
from .config import SanaConfig
from .model import SanaTransformer
from .text import GemmaTextEncoder, MiniTextEncoder, TextEncoder

MINI = Path(__file__).parent / "assets" / "mini"


def noise(seed: int, prompt_index: int, candidate: int, shape: Sequence[int]) -> torch.Tensor:
    """Initial noise of one picture, fp32, made on the CPU: it depends on (seed, prompt index, candidate) and on nothing else."""
    sequence = np.random.SeedSequence([seed, prompt_index, candidate])
    generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    return torch.randn(*shape, generator=generator)


class Pipeline:
    """Text encoder + transformer + autoencoder, and the flow shift they were trained with.

    Build one with `Pipeline.from_pretrained("mini")` or from a folder in diffusers' layout.
    """

    def __init__(
        self, text: TextEncoder, transformer: SanaTransformer, autoencoder: Autoencoder, flow_shift: float = 3.0
    ) -> None:
        self.text, self.transformer, self.autoencoder = text, transformer, autoencoder
        self.flow_shift = flow_shift

    @staticmethod
    def from_pretrained(source: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Pipeline:
        """`source` is "mini" or a pipeline folder (transformer/, vae/, text_encoder/, and tokenizer/ for Gemma).

        dtype: of the transformer; default float32 for the mini model, bfloat16 for the published ones. The autoencoder
        stays float32 and Gemma bfloat16, as SANA requires.

        Raises:
            FileNotFoundError: a part is missing; ValueError: a file is damaged or does not fit the config.
        """
        from .checkpoint import load_transformer

        root = MINI if str(source) == "mini" else Path(source)
        for part in ("transformer", "vae", "text_encoder"):
            if not (root / part).is_dir():
                raise FileNotFoundError(f"{root / part} is missing: {source} is not a pipeline folder")
        mini = (root / "text_encoder" / "config.json").exists() and "vocabulary" in json.loads(
            (root / "text_encoder" / "config.json").read_text()
        )
        dtype = dtype or (torch.float32 if mini else torch.bfloat16)
        text: TextEncoder = MiniTextEncoder.load(root / "text_encoder") if mini else GemmaTextEncoder.load(root)
        transformer = load_transformer(root / "transformer", dtype=dtype)
        pipe = Pipeline(text, transformer, Autoencoder.load(root / "vae"), _flow_shift(root))
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

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(channels, h, w) of a picture's latents; ValueError for a size that the model cannot make."""
        factor = self.autoencoder.factor * self.config.patch_size
        native = self.config.sample_size * self.autoencoder.factor
        for name, side in (("height", height), ("width", width)):
            if side is not None and (not isinstance(side, int) or side < factor or side % factor):
                raise ValueError(f"{name} must be a positive multiple of {factor} pixels, got {side}")
        scale = self.autoencoder.factor
        return self.config.in_channels, (height or native) // scale, (width or native) // scale

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 4.5,
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
            guidance: classifier-free guidance scale; 1 switches the unconditional branch off.
            height, width: pixels; default the size the model was made for.
            batch_size: pictures computed at once; default all. It changes pictures by rounding only.
            callback: called as callback(done, total) after every denoising step.

        Returns:
            For each prompt a list of n PIL images.

        Raises:
            ValueError: a prompt, size, count or sampler that the model cannot serve.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for name, value in (("n", n), ("batch_size", 1 if batch_size is None else batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        shape = self.latent_shape(height, width)
        plan = flow.schedule(steps, sampler=sampler, flow_shift=self.flow_shift)
        items = [(p, c) for p in range(len(prompts)) for c in range(n)]
        size = batch_size or max(len(items), 1)
        total = len(range(0, len(items), size)) * steps
        pictures: list[Image.Image] = []
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            velocity = self.guided_velocity([prompts[p] for p, _ in chunk], negative_prompt, guidance)
            latents = torch.stack([noise(seed, p, c, shape) for p, c in chunk]).to(self.device)
            state = flow.SamplerState(latents)
            for i in range(steps):
                state = flow.advance(state, velocity(state.latents, plan.timesteps[i]), plan)
                if callback is not None:
                    callback(start // size * steps + i + 1, total)
            pictures += self.decode(state.latents)
        return [pictures[i * n : (i + 1) * n] for i in range(len(prompts))]

    def guided_velocity(
        self, prompts: list[str], negative_prompt: str, guidance: float
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """The guided velocity of a batch as a function of (latents, timestep); the text is encoded once."""
        dtype, device = self.transformer.proj_out.weight.dtype, self.device
        text, mask = self.text.encode(prompts)
        both = guidance != 1.0
        if both:
            null, null_mask = self.text.encode([negative_prompt] * len(prompts), negative=True)
            text, mask = _stack(null, text), _stack(null_mask, mask)
        text, mask = text.to(device, dtype), mask.to(device)

        def velocity(latents: torch.Tensor, timestep: float) -> torch.Tensor:
            x = torch.cat([latents, latents]) if both else latents
            t = torch.full((x.shape[0],), timestep * self.config.timestep_scale, device=device)
            v = self.transformer(x.to(dtype), text, t, mask)
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


def _flow_shift(root: Path) -> float:
    """The shift of the folder's scheduler; SANA's 3.0 where none is recorded."""
    path = root / "scheduler" / "scheduler_config.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return float(values.get("flow_shift", 3.0))
