"""A pipeline folder with the mini model's parts at toy size and random weights: it reads every prompt and paints 64x64 noise."""

from pathlib import Path

import torch

from sana15 import SanaConfig, SanaTransformer
from sana15.autoencoder import MINI, Autoencoder
from sana15.checkpoint import save_transformer
from sana15.scenes.prompts import word_list
from sana15.text import MiniTextEncoder

SIZES = {
    "num_layers": 2, "num_attention_heads": 1, "num_cross_attention_heads": 1, "cross_attention_head_dim": 32,
    "in_channels": 16, "out_channels": 16, "caption_channels": 16, "sample_size": 8,
}  # fmt: skip


def make(folder: Path) -> Path:
    torch.manual_seed(0)
    save_transformer(SanaTransformer(SanaConfig(**SIZES)), folder / "transformer", dtype=torch.float16)
    MiniTextEncoder(list(word_list()), width=16, heads=2).save(folder / "text_encoder")
    Autoencoder.build(MINI).model.half().save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 1.0}')
    return folder
