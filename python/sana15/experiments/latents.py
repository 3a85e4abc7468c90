"""The data set of the experiments that train: scenes rendered and encoded once, in parts that are cells of a grid.

A training step then costs the transformer alone. Latents are the mini autoencoder's, kept in fp16; prompts are encoded
by the mini text encoder when they are asked for, since captions are dropped at random.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch

from ..model.autoencoder import Autoencoder
from ..model.folder import MINI
from ..model.text import MiniTextEncoder
from ..storage.files import open_tensors, staging, write_tensors
from ..training.data import SceneBatches
from .grid import Cell, Place

PART = 16_384  # scenes of a part: about a minute of one core
SEED = 4_242
#: Seed of the scenes that no run trains on, and of the noise that judges there.
HELD_OUT = 987_654_321
ENCODED = 64  # scenes that are encoded at once


def part_path(scenes: int, part: int) -> str:
    """Returns the path of a part below the common folder."""
    return f"scenes-{scenes}/{part:02d}"


def cells(scenes: int) -> list[Cell]:
    """The cells that make a data set of so many scenes, a part each."""
    return [
        Cell(f"scenes-{scenes}-{part:02d}", partial(_make, scenes=scenes, part=part), made=part_path(scenes, part))
        for part in range(-(-scenes // PART))
    ]


def _make(place: Place, scenes: int, part: int) -> dict[str, int]:
    target, count = place.common / part_path(scenes, part), min(PART, scenes - part * PART)
    if target.exists():  # another experiment of this folder has made it
        return {"scenes": count}
    encoder = Autoencoder.load(MINI / "vae").to(place.device)
    found, prompts = [], []
    for batch in (SceneBatches(SEED + part, ENCODED, -(-count // ENCODED))[i] for i in range(-(-count // ENCODED))):
        found.append(encoded(encoder, batch.pictures.to(place.device)).half().cpu())
        prompts += batch.prompts
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target) as partial_folder:
        partial_folder.mkdir()
        write_tensors({"latents": torch.cat(found)[:count].contiguous()}, partial_folder / "latents.safetensors", {})
        (partial_folder / "prompts.json").write_text(json.dumps(prompts[:count]), encoding="utf-8")
        partial_folder.rename(target)
    return {"scenes": count}


@torch.no_grad()
def encoded(encoder: Autoencoder, pictures: torch.Tensor) -> torch.Tensor:
    """Returns the pictures' latents, fp32."""
    return encoder.encode(pictures).float()


class Latents:
    """The data set in memory, and the text encoder of its prompts.

    Args:
        common: the folder that holds it. scenes: their number; as many were made.
    """

    def __init__(self, common: Path, scenes: int, device: str) -> None:
        parts = [common / part_path(scenes, part) for part in range(-(-scenes // PART))]
        self.latents = torch.cat([_tensor(part / "latents.safetensors") for part in parts])
        self.prompts = [p for part in parts for p in json.loads((part / "prompts.json").read_text(encoding="utf-8"))]
        self.text, self.device = MiniTextEncoder.load(MINI / "text_encoder").requires_grad_(False).to(device), device

    def batch(
        self, count: int, drop: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws scenes with repetition: latents [B, C, h, w] fp32, text features [B, T, width] and mask [B, T].

        Args:
            drop: share of the prompts that are replaced by the empty one. generator: on the CPU.
        """
        chosen = torch.randint(len(self.latents), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < drop
        prompts = ["" if d else self.prompts[i] for i, d in zip(chosen.tolist(), dropped.tolist())]
        return self.latents[chosen].float().to(self.device), *self.encode(prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text.encode(list(prompts))


@cache
def load(common: Path, scenes: int, device: str) -> Latents:
    """The data set, loaded once in a process."""
    return Latents(common, scenes, device)


@cache
def held_out(count: int, device: str) -> tuple[torch.Tensor, list[str]]:
    """Latents and prompts of scenes that no run trains on; `count` is a multiple of 64."""
    encoder = Autoencoder.load(MINI / "vae").to(device)
    batches = [SceneBatches(HELD_OUT, ENCODED, count // ENCODED)[i] for i in range(count // ENCODED)]
    latents = torch.cat([encoded(encoder, batch.pictures.to(device)) for batch in batches])
    return latents, [prompt for batch in batches for prompt in batch.prompts]


def _tensor(path: Path) -> torch.Tensor:
    with open_tensors(path) as stored:
        tensor: torch.Tensor = stored.get_tensor("latents")
        return tensor
