"""sana15 <command>: the command line. Exit code 2 for a wrong argument, 3 for a missing or damaged file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _train(args: argparse.Namespace) -> None:
    from .train import train
    from .train_config import load_config

    print(f"exported to {train(load_config(args.config, args.overrides))}")


def _sample(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.model)
    out = Path(args.out)
    with tqdm(desc="sampling", unit="step", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        pictures = pipe(
            args.prompts, n=args.n, seed=args.seed, steps=args.steps, guidance=args.guidance, height=args.height,
            width=args.width, negative_prompt=args.negative, sampler=args.sampler, batch_size=args.batch_size,
            callback=progress,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for p, row in enumerate(pictures):
        for c, picture in enumerate(row):
            picture.save(out / f"{p:05d}-{c:03d}.png", pnginfo=_png_info(args, args.prompts[p], p, c))
    print(f"{sum(map(len, pictures))} pictures in {out}/")


def _png_info(args: argparse.Namespace, prompt: str, index: int, candidate: int):  # type: ignore[no-untyped-def]
    """`parameters` as other tools write it, and the same as JSON under `sana15`."""
    import json

    from PIL.PngImagePlugin import PngInfo

    values = {
        "prompt": prompt, "negative_prompt": args.negative, "seed": args.seed, "prompt_index": index,
        "candidate": candidate, "steps": args.steps, "guidance": args.guidance, "sampler": args.sampler,
        "model": str(args.model),
    }  # fmt: skip
    info = PngInfo()
    info.add_text(
        "parameters",
        f"{prompt}\nSteps: {args.steps}, Sampler: {args.sampler}, CFG scale: {args.guidance}, Seed: {args.seed}",
    )
    info.add_text("sana15", json.dumps(values))
    return info


def _info(args: argparse.Namespace) -> None:
    import torch

    from .config import SanaConfig
    from .model import SanaTransformer

    config = SanaConfig.load(args.model) if Path(args.model).is_dir() else SanaConfig.named(args.model)
    with torch.device("meta"):
        model = SanaTransformer(config)
    block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    heads = f"{config.num_attention_heads} heads of {config.attention_head_dim}"
    print(f"{total:,} parameters, {config.num_layers} blocks of {block:,}; width {config.width}, {heads}, ", end="")
    print(f"Mix-FFN {config.hidden}, qk-norm {config.qk_norm or 'none'}")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="sana15", description="SANA-1.5: train and sample.")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train from a YAML configuration; the same command resumes")
    train.add_argument("config", nargs="?", help="YAML file (default: built-in defaults)")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as transformer.flow_shift=2"
    )
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="pictures for prompts")
    sample.add_argument("prompts", nargs="+", metavar="PROMPT")
    sample.add_argument("--model", default="mini", help='"mini" or a pipeline folder')
    sample.add_argument("--out", required=True, metavar="DIR")
    sample.add_argument("--n", type=int, default=1, help="pictures per prompt")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--steps", type=int, default=20)
    sample.add_argument("--guidance", type=float, default=4.5)
    sample.add_argument("--height", type=int, metavar="PIXELS")
    sample.add_argument("--width", type=int, metavar="PIXELS")
    sample.add_argument("--negative", default="", metavar="PROMPT")
    sample.add_argument("--sampler", default="flow_dpm")
    sample.add_argument("--batch-size", type=int)
    sample.set_defaults(run=_sample)

    info = commands.add_parser("info", help="parameters and sizes of a published size or a transformer folder")
    info.add_argument("model", metavar="SIZE|DIR")
    info.set_defaults(run=_info)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except FileNotFoundError as error:
        print(f"sana15 {args.command}: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"sana15 {args.command}: {error}", file=sys.stderr)
        return 3 if "damaged" in str(error) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
