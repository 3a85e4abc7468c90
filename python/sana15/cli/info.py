"""sana15 info."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import require_positive


def add(commands: Any) -> None:
    info = commands.add_parser("info", help="parameters and sizes of a published size or a transformer folder")
    info.add_argument("model", metavar="SIZE|DIR")
    info.add_argument("--memory", action="store_true", help="what training takes, by precision and optimizer")
    info.add_argument("--batch", type=int, default=1, help="pictures of a training step (default 1)")
    info.add_argument(
        "--latent", type=int, metavar="SIDE", help="of the latents, pixels / 32 (default: the model's own)"
    )
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.memory:
        require_positive(args, "batch", "latent", words="at least 1")
    import torch

    from ..model.config import SanaConfig
    from ..model.transformer import SanaTransformer

    config = SanaConfig.load(args.model) if Path(args.model).is_dir() else SanaConfig.named(args.model)
    with torch.device("meta"):
        model = SanaTransformer(config)
    block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    heads = f"{config.num_attention_heads} heads of {config.attention_head_dim}"
    print(f"{total:,} parameters, {config.num_layers} blocks of {block:,}; width {config.width}, {heads}, ", end="")
    print(f"Mix-FFN {config.hidden}, qk-norm {config.qk_norm or 'none'}")
    if args.memory:
        from ..training.memory import table, training_memory

        latent = args.latent or config.sample_size
        print(f"\nGiB of a training step, {args.batch} x {latent}x{latent} latents:\n")
        print(table(training_memory(config, batch=args.batch, latent=latent)))
        print("\nleast: with gradient checkpointing, and for an 8-bit optimizer with sana_ext.optim.fuse_backward")
