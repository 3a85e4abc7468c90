"""The parser of all commands, and how their errors end.

Exit code 2: a wrong argument; 3: a missing or damaged file; 4: prompts that no judge judged. Help is printed without loading
torch, so nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from ..storage.redaction import guard_tracebacks, redacted
from . import (
    convert,
    curve,
    demo,
    evaluate,
    export,
    grow,
    importance,
    info,
    prune,
    reproduce,
    sample,
    search,
    train,
)  # fmt: skip

COMMANDS = (train, demo, sample, search, curve, evaluate, export, grow, importance, prune, convert, info, reproduce)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))  # it repeats the argument, such as a judge's URL with a password


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="sana15", description="SANA-1.5: train, grow, make pictures, score them, convert checkpoints.")
    root.add_argument("--version", action="version", version=f"sana15 {_version()}")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return root


def _version() -> str:
    try:
        return version("sana-ext")
    except PackageNotFoundError:  # a source tree on the path
        return "of a source tree"


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:  # the program, not a caller in Python
        guard_tracebacks()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_of_kernels)
    args = parser().parse_args(arguments)
    try:
        with _messages_on_stderr():
            return args.run(args) or 0
    except Exception as error:
        found = _explained(error)
        if found is None:
            raise
        return _fail(args.command, *found)
    except KeyboardInterrupt:
        return _fail(args.command, "interrupted", 130)


def _is_not_of_kernels(record: logging.LogRecord) -> bool:
    """Drops one line: diffusers imports bitsandbytes, which then misses an optional package that sana15 never uses."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


class _Stderr(logging.StreamHandler[Any]):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Shows what the commands say beside their result; every module of sana15 says it to its logger."""
    logger = logging.getLogger("sana15")
    handler, ours = _Stderr(sys.stderr), logger.level == logging.NOTSET
    logger.addHandler(handler)
    if ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if ours:  # not what was found: another thread's command may have set that
            logger.setLevel(logging.NOTSET)


def _explained(error: Exception) -> tuple[object, int] | None:
    """A user's error as what is said of it and the exit code; None for every other error."""
    if type(error) is ValueError:  # such as an option that is refused before torch, which files needs, is imported
        return error, 2
    from ..device import trouble
    from ..storage.files import DataError

    if isinstance(error, (OSError, DataError)):
        return error, 3
    if isinstance(error, ValueError):
        return error, 2
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; pip install 'sana-ext[sana15]'", 3
    if isinstance(error, RuntimeError) and (message := trouble(error)) is not None:
        return message, 3
    return None


def _fail(command: str, error: object, code: int) -> int:
    print(f"sana15 {command}: {' '.join(redacted(error).split())}", file=sys.stderr)
    return code
