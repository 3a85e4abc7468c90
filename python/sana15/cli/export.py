"""sana15 export."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    export = commands.add_parser("export", help="a folder of pictures in the format of a benchmark's own program")
    export.add_argument("format", choices=("geneval", "geneval2", "dpg", "t2icompbench", "hpsv2"))
    export.add_argument("source", metavar="DIR", help="what sana15 sample --prompts or sana15 search (picks/) wrote")
    export.add_argument("target", metavar="OUT", help="folder; must not exist")
    export.add_argument("--prompts", metavar="DIR", help="the benchmark's own prompts, for dpg and hpsv2")
    export.add_argument("--rule", default="strict", choices=("strict", "geneval"), help="of geneval's results.jsonl")
    export.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..evaluation.export import run

    run(args)
