"""A transformer's folder in diffusers' layout: config.json and weights, both ways."""

from __future__ import annotations

from pathlib import Path

import torch

from ..storage.weights import Weight, load_weights, write_folder
from .config import SanaConfig
from .transformer import SanaTransformer


def load_transformer(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> SanaTransformer:
    """A SanaTransformer in eval mode from a diffusers `transformer/` folder; raises as load_weights does."""
    config = SanaConfig.load(folder)
    with torch.device("meta"):
        model = SanaTransformer(config)
    load_weights(model, folder, dtype)
    return model.eval()


def save_transformer(
    model: SanaTransformer, folder: str | Path, *, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> None:
    """Writes a folder that diffusers' SanaTransformer2DModel.from_pretrained loads; complete or not at all."""
    weights = {name: Weight.of(t) for name, t in model.state_dict().items()}
    write_folder(model.config.to_dict(), weights, folder, dtype=dtype, shard_bytes=shard_bytes)
