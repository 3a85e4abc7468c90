"""The tasks of the training loop: the autoencoder, and the transformer together with its text encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..growth.optimizer import block_groups, block_multipliers
from ..model.autoencoder import MINI_SIZES, Autoencoder
from ..model.checkpoint import load_transformer, save_transformer
from ..model.config import SanaConfig
from ..model.folder import record, record_scheduler, recorded_kept, recorded_map
from ..model.text import MiniTextEncoder
from ..model.transformer import SanaTransformer
from ..sampling.pipeline import Pipeline
from ..scenes.checker import check
from ..scenes.prompts import word_list
from ..scenes.testset import load as test_set
from ..storage.files import DTYPES
from .config import TrainConfig, TransformerConfig
from .data import Batch, SceneBatches
from .distillation import Distillation, training_loss

VALIDATION_SEED = 10_000_019  # pictures that training never renders


class AutoencoderTask:
    """Reconstruction of rendered scenes by the mini autoencoder."""

    def __init__(self, config: TrainConfig, device: str) -> None:
        self.config, self.device = config.autoencoder, device
        self.module = Autoencoder.build(MINI_SIZES).to(device)
        self.validation = SceneBatches(VALIDATION_SEED, 64, 1)[0].pictures.to(device)

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        pictures = batch.pictures.to(self.device)
        latents = self.module.encode(pictures)
        if self.config.latent_noise:
            noise = torch.randn(latents.shape, generator=generator).to(self.device)
            latents = latents + self.config.latent_noise * latents.detach().std() * noise
        error = self.module.decode(latents).float() - pictures
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        return error.abs().mean() + self.config.edge_weight * edges

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        out = self.module(self.validation).clamp(-1, 1)
        error = ((out - self.validation) / 2).square().mean()
        rows = torch.cat([self.validation[:16], out[:16]])
        _grid(rows, 16).save(_made(folder) / f"{step:08d}.png")
        return {"psnr": -10 * torch.log10(error).item()}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.module.parameters() if p.requires_grad]}]

    def export(self, folder: Path) -> None:
        """Fixes the scaling factor so that latents have unit variance, and saves in half precision."""
        latents = torch.cat(
            [self.module.model.encode(SceneBatches(VALIDATION_SEED, 256, 2)[1].pictures.to(self.device)).latent]
        )
        model = copy.deepcopy(self.module.model)  # what is trained keeps its precision and its factor
        model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        model.half().save_pretrained(_made(folder))


class TransformerTask:
    """Flow matching on the latents of rendered scenes, with a trained text encoder or one that is trained along."""

    def __init__(
        self,
        run: TrainConfig,
        device: str,
        text: MiniTextEncoder,
        transformer: SanaTransformer,
        autoencoder: Autoencoder,
        *,
        growth_map: Sequence[int | None] = (),
        distillation: Distillation | None = None,
    ) -> None:
        self.config, self.device, self.run = run.transformer, device, run
        self.autoencoder, self.growth_map, self.distillation = autoencoder, list(growth_map), distillation
        self.module: Any = nn.ModuleDict({"text": text, "transformer": transformer}).to(device)
        self.denoise = torch.compile(transformer) if self.config.compile else transformer

    @staticmethod
    def of_config(run: TrainConfig, device: str) -> TransformerTask:
        """The task that a configuration describes, its parts loaded or initialised."""
        c = run.transformer
        if not c.autoencoder:
            raise ValueError("transformer.autoencoder must name the folder of a trained autoencoder")
        autoencoder = Autoencoder.load(c.autoencoder).requires_grad_(False).to(device)
        growth_map: list[int | None] = []
        if c.start:
            text, model, growth_map = _started(run, autoencoder.channels)
        else:
            text = _text_encoder(run)
            sizes = {"caption_channels": text.width, "in_channels": autoencoder.channels}
            model = SanaTransformer(SanaConfig.named(c.size, out_channels=autoencoder.channels, **sizes))
            initialise(model)
        model.gradient_checkpointing = c.gradient_checkpointing
        text, model = text.to(device), model.to(device)
        distillation = _distillation(c, model, device)
        return TransformerTask(run, device, text, model, autoencoder, growth_map=growth_map, distillation=distillation)

    def groups(self) -> list[dict[str, Any]]:
        c = self.config
        rates = c.block_lr
        if (c.old_lr, c.new_lr) != (1.0, 1.0):
            if rates or not self.growth_map:
                raise ValueError(
                    "transformer.old_lr and new_lr need a grown model in transformer.start, and no block_lr"
                )
            rates = block_multipliers(self.growth_map, c.old_lr, c.new_lr)
        layers = len(self.module["transformer"].transformer_blocks)
        if rates and len(rates) != layers:
            raise ValueError(f"transformer.block_lr must have one number for each of the {layers} blocks")
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        return block_groups(trained, rates, self.growth_map, c.freeze_old)

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        c = self.config
        count = len(batch.prompts) * c.noises
        dropped = torch.rand(count, generator=generator) < c.caption_drop
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), batch.prompts * c.noises)]
        with torch.no_grad(), torch.autocast(self.device, enabled=False):
            x0 = self.autoencoder.encode(batch.pictures.to(self.device)).repeat(c.noises, 1, 1, 1)
        text, mask = self.module["text"].encode(prompts)
        if c.compile:  # the longest prompt differs from batch to batch: one compilation for all
            for tensor in (text, mask):
                torch._dynamo.mark_dynamic(tensor, 1)
        return training_loss(
            lambda x, t: self.denoise(x, text, t, mask), x0, generator, flow_shift=c.flow_shift,
            stratified=c.stratified, flow_weight=c.flow_weight, distillation=self.distillation, distill=c.distill,
        )  # fmt: skip

    def pipeline(self) -> Pipeline:
        return Pipeline(self.module["text"], self.module["transformer"], self.autoencoder, self.config.flow_shift)

    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """A grid of fixed prompts and seeds, and the exact checker's score on a fixed part of the test set."""
        entries, (low, high) = test_set()[::5], self.run.sample_guidance_interval
        made = self.pipeline()(
            [entry["prompt"] for entry in entries], n=1, seed=1, steps=self.run.sample_steps,
            guidance=self.run.sample_guidance, guidance_interval=(low, high),
            batch_size=64,
        )  # fmt: skip
        correct: dict[str, list[bool]] = {}
        for entry, pictures in zip(entries, made):
            correct.setdefault(entry["tag"], []).append(check(np.asarray(pictures[0]), entry).correct)
        sheet = Image.new("RGB", (10 * 66, 6 * 66), "white")
        for i, pictures in enumerate(made[:60]):
            sheet.paste(pictures[0], (i % 10 * 66, i // 10 * 66))
        sheet.save(_made(folder) / f"{step:08d}.png")
        scores = {f"score_{tag}": sum(c) / len(c) for tag, c in correct.items()}
        return scores | {"score": sum(scores.values()) / len(scores)}

    def export(self, folder: Path) -> None:
        """A pipeline folder in diffusers' layout, the parts beside the transformer in half precision."""
        dtype = DTYPES[self.config.export]
        save_transformer(self.module["transformer"], _made(folder) / "transformer", dtype=dtype)
        self.module["text"].save(folder / "text_encoder")
        copy.deepcopy(self.autoencoder.model).half().save_pretrained(folder / "vae")
        record_scheduler(folder, self.config.flow_shift)
        settings = {
            "guidance": self.run.sample_guidance, "guidance_interval": self.run.sample_guidance_interval,
            "trained_steps": self.run.steps,
        }  # fmt: skip
        record(folder, settings)


def _distillation(c: TransformerConfig, model: SanaTransformer, device: str) -> Distillation | None:
    if (c.distill > 0) != bool(c.teacher):
        raise ValueError("transformer.teacher and a transformer.distill above 0 belong together")
    if not c.teacher:
        return None
    if not c.start or c.compile:
        raise ValueError("transformer.distill needs a pruned transformer.start, and does not go with compile")
    teacher = load_transformer(Path(c.teacher) / "transformer").to(device)
    return Distillation(model, teacher, recorded_kept(Path(c.start)))


def _started(run: TrainConfig, channels: int) -> tuple[MiniTextEncoder, SanaTransformer, list[int | None]]:
    """Both parts of the pipeline folder to start from, and its growth map where it has one."""
    folder, given = Path(run.transformer.start), bool(run.transformer.text_encoder)
    text = _text_encoder(run) if given else MiniTextEncoder.load(folder / "text_encoder")
    model = load_transformer(folder / "transformer")
    if model.config.in_channels != channels:
        raise ValueError(f"{folder} has {model.config.in_channels} latent channels, the autoencoder {channels}")
    if not given:
        text.train()  # with the transformer; a given one stays as it is, in its mode too
    return text, model.train(), recorded_map(folder, model.config.num_layers)


def _text_encoder(run: TrainConfig) -> MiniTextEncoder:
    if run.transformer.text_encoder:
        return MiniTextEncoder.load(run.transformer.text_encoder).requires_grad_(False)
    return MiniTextEncoder(list(word_list()), run.text.width, run.text.heads, run.text.passes)


def initialise(model: SanaTransformer) -> None:
    """SANA's initialisation for training from scratch (released code): Xavier linear layers, N(0, 0.02) embedders.

    Its text norm starts at 0.01, which tames Gemma's large features. Ours are of unit size and start at 1, while the
    projections to keys and values start at a tenth: at full size the text is noise to the first steps, which learned to
    suppress it (the norm's weight fell to 0.10 in a run with a text encoder trained along).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embed.proj.weight.view(model.config.width, -1))
    blocks: list[Any] = list(model.transformer_blocks)
    for block in blocks:
        for projection in (block.attn2.to_k, block.attn2.to_v):
            projection.weight.data.mul_(0.1)
    for part in (model.time_embed, model.caption_projection):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)


def _grid(pictures: torch.Tensor, columns: int) -> Image.Image:
    """[K, 3, H, W] in [-1, 1] as rows of `columns` pictures."""
    values = (pictures * 127.5 + 127.5).round().byte().cpu()
    K, _, H, W = values.shape
    rows = values.view(K // columns, columns, 3, H, W).permute(0, 3, 1, 4, 2).reshape(K // columns * H, columns * W, 3)
    return Image.fromarray(rows.numpy())


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
