"""sana15 convert."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .options import DTYPES


def add(commands: Any) -> None:
    convert = commands.add_parser("convert", help="the authors' .pth to a diffusers folder, and back")
    convert.add_argument(
        "source", metavar="IN", help=".pth or .safetensors in the release's layout, or a transformer folder"
    )
    convert.add_argument(
        "target", metavar="OUT", help="folder, or FILE.safetensors or FILE.pth for the release's layout; must not exist"
    )
    convert.add_argument(
        "changes", nargs="*", metavar="key=value", help="what a release file does not tell, such as sample_size=16"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    convert.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB (default: one file)")
    convert.add_argument("--ema", action="store_true", help="the averaged weights of a .pth")
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import torch
    import yaml

    from ..model.release import convert, needed_changes, parameter_shapes, read_release
    from ..storage import files
    from ..storage.values import parse_bytes
    from ..training.config import parse_overrides

    dtype = files.DTYPES[args.dtype] if args.dtype else None
    shard_bytes = parse_bytes(args.shard_size) if args.shard_size else None
    changes = parse_overrides(args.changes)
    config = convert(args.source, args.target, dtype=dtype, shard_bytes=shard_bytes, ema=args.ema, changes=changes)
    total = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    print(
        f"{args.target}: {total:,} parameters, {config.num_layers} blocks of width {config.width}, "
        f"{config.num_cross_attention_heads} cross-attention heads, qk-norm {config.qk_norm or 'none'}, made for "
        f"{config.sample_size}x{config.sample_size} latents, position embedding {config.interpolation_scale or 'none'}"
    )
    if Path(args.target).is_file() and (needed := needed_changes(read_release(Path(args.target)), config)):
        words = (f"{name}={yaml.safe_dump(value).splitlines()[0]}" for name, value in needed.items())
        print(f"to read it back: sana15 convert {shlex.quote(args.target)} FOLDER {' '.join(words)}")
