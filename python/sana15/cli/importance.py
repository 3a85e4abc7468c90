"""sana15 importance."""

from __future__ import annotations

import argparse
from typing import Any

from .options import calibration_options, require_calibration


def add(commands: Any) -> None:
    importance = commands.add_parser("importance", help="how much each block does: JSON, a figure, a table")
    importance.add_argument("source", metavar="SRC", help='"mini" or a pipeline folder')
    importance.add_argument("--out", required=True, metavar="DIR", help="folder for importance.json and importance.png")
    calibration_options(importance)
    importance.add_argument("--bins", type=int, default=10, help="timestep bins of equal width (default 10)")
    importance.add_argument(
        "--no-loss", action="store_true", help="leave out the loss without each block, most of the time"
    )
    importance.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_calibration(args)
    if not 1 <= args.bins <= 1000:
        raise ValueError(f"bins must be 1 to 1000, got {args.bins}")
    from ..pruning.report import run

    run(args)
