"""sana15 reproduce."""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import BUDGETS, EXPERIMENTS
from .options import device_option


def add(commands: Any) -> None:
    reproduce = commands.add_parser("reproduce", help="this project's experiments; the same command resumes")
    reproduce.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    reproduce.add_argument("--budget", default="small", choices=BUDGETS, help="sizes: smoke, small (default) or full")
    reproduce.add_argument("--out", metavar="DIR", help="default out/reproduce-BUDGET; processes may share it")
    reproduce.add_argument("--only", default="", metavar="TEXT", help="only cells with this in their name")
    reproduce.add_argument("--list", action="store_true", help="name the cells, and say which are done")
    reproduce.add_argument(
        "--report", action="store_true", help="write tables and figures of what is done; compute nothing"
    )
    device_option(reproduce)
    reproduce.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..experiments.command import run

    run(args)
