"""sana15 demo."""

from __future__ import annotations

import argparse
from typing import Any

from .options import device_option, require_positive, require_seed


def add(commands: Any) -> None:
    demo = commands.add_parser("demo", help="prompts to pictures with the embedded model: contact sheet, scores, times")
    demo.add_argument("--out", default="out/demo", metavar="DIR", help="default out/demo")
    demo.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    demo.add_argument("--per-category", type=int, default=8, help="prompts of each category (default 8)")
    demo.add_argument("--no-timing", action="store_true", help="skip the comparison with stock diffusers")
    device_option(demo)
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_positive(args, "steps")
    require_seed(args)
    from ..evaluation.demo import run

    run(args)
