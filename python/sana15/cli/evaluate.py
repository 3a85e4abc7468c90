"""sana15 eval."""

from __future__ import annotations

import argparse
from typing import Any

from .options import bootstrap_options, device_option, require_seed


def add(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="score a folder of pictures in GenEval's layout")
    evaluate.add_argument(
        "folder", metavar="DIR", help="what sana15 sample --prompts FILE --out DIR wrote, or GenEval's results.jsonl"
    )
    evaluate.add_argument("--against", metavar="DIR", help="another run on the same prompts: the paired difference")
    evaluate.add_argument(
        "--detector",
        metavar="MODEL",
        help="photos: a Mask2Former for COCO judges by GenEval's rules, into DIR/results.jsonl",
    )
    evaluate.add_argument(
        "--clip",
        metavar="MODEL",
        help="that tells colours to --detector: open_clip:ViT-L-14:openai, or one of transformers",
    )
    device_option(evaluate)
    evaluate.add_argument("--json", metavar="FILE", help="write scores and verdicts there; - for standard output")
    bootstrap_options(evaluate)
    evaluate.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.resamples < 1:
        raise ValueError(f"--resamples must be at least 1, got {args.resamples}")
    require_seed(args)
    from ..evaluation.results import run

    run(args)
