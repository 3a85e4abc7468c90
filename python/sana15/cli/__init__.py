"""The command line: `sana15 <command>`. One file per command, with its options (`add`) and what it does (`run`)."""

from .main import main, parser

__all__ = ["main", "parser"]
