"""Training batches of rendered scenes. Batch number `step` depends on (seed, step) only, so a resumed run sees the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..scenes.render import render_batch
from ..scenes.training import sample_training


class Batch(NamedTuple):
    step: int
    prompts: list[str]
    pictures: torch.Tensor  # [B, 3, 64, 64], fp32 in [-1, 1]


class SceneBatches(Dataset):
    """Item `step` is the batch of that step, rendered when asked for."""

    def __init__(self, seed: int, batch_size: int, steps: int) -> None:
        self.seed, self.batch_size, self.steps = seed, batch_size, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        prompts, scenes = zip(*(sample_training(rng) for _ in range(self.batch_size)))
        pictures = torch.from_numpy(render_batch(list(scenes))).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Batch(step, list(prompts), pictures)


def scene_batches(seed: int, batch_size: int, first: int, last: int, workers: int) -> Iterator[Batch]:
    """Batches first..last-1 in order, rendered ahead by `workers` processes (0: in this one)."""
    loader = DataLoader(
        SceneBatches(seed, batch_size, last),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
        generator=torch.Generator(),  # else it draws from the process's, between another training's first weights
    )
    return iter(loader)
