"""sana15 prune."""

from __future__ import annotations

import argparse
from typing import Any

from .options import calibration_options, require_calibration, require_positive


def add(commands: Any) -> None:
    prune = commands.add_parser("prune", help="a shallower model from a trained one, from folder to folder")
    prune.add_argument("source", metavar="SRC", help='"mini", a pipeline folder or a transformer folder')
    prune.add_argument("target", metavar="DST", help="folder; must not exist")
    prune.add_argument("--keep", type=int, metavar="K", help="blocks that stay")
    prune.add_argument(
        "--by", metavar="NAME", help="importance (default), loss, search, learned or indices (default with --indices)"
    )
    prune.add_argument("--importance", metavar="FILE", help="importance.json of SRC; else it is measured")
    prune.add_argument(
        "--indices", metavar="LIST", help="0,1,3 or a file: a JSON list, or a pruned folder's sana15.json"
    )
    prune.add_argument("--candidates", type=int, metavar="N", help="search: removals tried at each depth (default 4)")
    prune.add_argument(
        "--trial-steps", type=int, metavar="N", help="search: healing before each is judged (default 20)"
    )
    prune.add_argument("--learning-steps", type=int, metavar="N", help="learned: steps (default 200)")
    prune.add_argument("--group", type=int, metavar="M", help="learned: neighbours that share their places (default 4)")
    prune.add_argument("--rank", type=int, help="learned: of the changes that make up for missing blocks (default 8)")
    prune.add_argument(
        "--heal",
        type=int,
        nargs="?",
        const=100,
        metavar="STEPS",
        help="train the pruned model (default 100 steps)",
    )
    prune.add_argument(
        "--heal-on",
        choices=("scenes", "samples"),
        help="rendered scenes (default; mini text encoder only) or what SRC makes of the calibration prompts (else)",
    )
    prune.add_argument("--heal-batch", type=int, metavar="N", help="pictures of a step (default: 64 mini, else 4)")
    prune.add_argument("--heal-lr", type=float, metavar="RATE", help="default: by the depth taken away; else 1e-4")
    prune.add_argument(
        "--distill",
        type=float,
        metavar="W",
        help="of healing: weight of the distance from the source (default 10; 0: the flow loss instead)",
    )
    prune.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    calibration_options(prune)
    prune.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_positive(args, "candidates", "learning_steps", "group", "rank")
    if args.trial_steps is not None and args.trial_steps < 0:  # 0 judges without healing
        raise ValueError(f"trial_steps must be at least 0, got {args.trial_steps}")
    if (args.indices is None and args.importance is None) or args.heal_on == "samples":
        require_calibration(args)
    from ..pruning.folder import run

    run(args)
