"""sana15 curve."""

from __future__ import annotations

import argparse
from typing import Any

from .options import bootstrap_options, require_seed


def add(commands: Any) -> None:
    curve = commands.add_parser(
        "curve", help="score against pictures per prompt, from a search's folder: PNG and table"
    )
    curve.add_argument("folder", metavar="DIR", help="of a search for scenes that judged every candidate (best_of_n)")
    curve.add_argument("--out", metavar="FILE", help="the PNG (default DIR/curve.png)")
    bootstrap_options(curve)
    curve.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.resamples < 1:
        raise ValueError(f"--resamples must be at least 1, got {args.resamples}")
    require_seed(args)
    from ..scaling.curve import run

    run(args)
