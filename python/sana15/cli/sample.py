"""sana15 sample."""

from __future__ import annotations

import argparse
from typing import Any

from .options import require_positive, require_seed, sampling_options


def add(commands: Any) -> None:
    sample = commands.add_parser("sample", help="pictures for prompts; the same command resumes")
    sample.add_argument("prompt", nargs="*", metavar="PROMPT", help='what to paint, such as "a red circle"')
    sample.add_argument(
        "--prompts", metavar="FILE", help='prompts: GenEval\'s *.jsonl, a text file, or "test" for the shipped test set'
    )
    sample.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    sample.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures; the same run's are kept")
    sample.add_argument("--n", type=int, default=1, help="pictures per prompt (default 1)")
    sample.add_argument("--batch-size", type=int, metavar="N", help="pictures computed at once")
    sampling_options(sample)
    sample.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if bool(args.prompt) == bool(args.prompts):
        raise ValueError("give prompts or --prompts FILE, one of the two")
    if args.n < 1:
        raise ValueError(f"--n must be at least 1, got {args.n}")
    require_positive(args, "steps", "batch_size")
    require_seed(args)
    from ..evaluation.sample import run

    run(args)
