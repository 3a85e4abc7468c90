"""sana15 search."""

from __future__ import annotations

import argparse
from typing import Any

from .options import require_positive, require_seed, sampling_options


def add(commands: Any) -> None:
    search = commands.add_parser(
        "search", help="many pictures per prompt, judged, the best picked; the same command resumes"
    )
    search.add_argument(
        "--prompts", required=True, metavar="FILE", help='as for sample; "test" is the shipped test set'
    )
    search.add_argument("--model", default="mini", metavar="DIR", help='"mini" (default) or a pipeline folder')
    search.add_argument("--out", required=True, metavar="DIR", help="the run's folder")
    search.add_argument("--n", type=int, default=32, help="candidates per prompt (default 32)")
    search.add_argument("--pick", type=int, default=4, help="how many of them are picked (default 4)")
    search.add_argument(
        "--judge", action="append", metavar="NAME",
        help="scenes, learned[:DIR], clip:MODEL, vlm:MODEL or http://HOST/v1#MODEL (default learned); several vote by rank",
    )  # fmt: skip
    search.add_argument(
        "--policy", default="best_of_n", help="best_of_n (default), tournament, stop, halving or bandit"
    )
    search.add_argument(
        "--budget",
        type=int,
        metavar="UNITS",
        help="of the run: transformer evaluations and judge calls (default: no limit)",
    )
    search.add_argument("--stop-at", type=float, metavar="SCORE", help="good enough, for stop and bandit")
    search.add_argument("--shard", default="0/1", metavar="I/N", help="only prompts I, I + N, ... (default 0/1: all)")
    search.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures computed at once (default: 32 mini, else 1)"
    )
    search.add_argument("--attempts", type=int, default=3, help="how often a failing judge is asked (default 3)")
    search.add_argument("--timeout", type=float, default=120.0, help="seconds for a judge's answer (default 120)")
    sampling_options(search)
    search.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_positive(args, "n", "pick", "steps", "batch_size")
    require_seed(args)
    from ..scaling.command import run

    return run(args)
