"""sana15 grow."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    grow = commands.add_parser("grow", help="a deeper model from a trained one, from folder to folder")
    grow.add_argument("source", metavar="SRC", help='"mini", a transformer folder or a pipeline folder')
    grow.add_argument("target", metavar="DST", help="folder; must not exist")
    grow.add_argument("--layers", type=int, required=True, help="blocks of the grown model")
    grow.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="blocks kept, the first K (default: all; partial_preservation: all but two)",
    )
    grow.add_argument(
        "--strategy", default="partial_preservation", metavar="NAME",
        help="partial_preservation (default), interleave, cyclic, block_replication or stack",
    )  # fmt: skip
    grow.add_argument("--seed", type=int, default=0, help="of the new blocks (default 0)")
    grow.add_argument("--add-qk-norm", action="store_true", help="give a SANA-1.0 model the norms of SANA-1.5")
    grow.add_argument("--shard-size", metavar="SIZE", help="largest file, such as 5GB")
    grow.add_argument(
        "--check", action="store_true", help="read everything back and compare with the source's function"
    )
    grow.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..growth.folder import run

    run(args)
