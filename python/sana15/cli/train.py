"""sana15 train."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    train = commands.add_parser("train", help="train from a YAML configuration; the same command resumes")
    train.add_argument("config", nargs="?", help="YAML file (default: built-in defaults)")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as transformer.flow_shift=2"
    )
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..training.config import load_config
    from ..training.run import train

    config, overrides = args.config, args.overrides
    if config is not None and _is_override(config):  # the file is left out
        config, overrides = None, [config, *overrides]
    print(f"exported to {train(load_config(config, overrides))}")


def _is_override(text: str) -> bool:
    """Tells whether a command's file argument is none but key=value: no such file, and a key that could be one."""
    return re.match(r"[A-Za-z_][\w.]*=", text) is not None and not Path(text).exists()
