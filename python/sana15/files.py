"""Files that are read with one clear line when they are bad, and written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class DataError(ValueError):
    """A file is damaged, incomplete, or does not fit what it is used for. The command line exits with 3."""


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: it is missing. DataError: it is no JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: no JSON object")
    return values


def open_tensors(path: Path):  # type: ignore[no-untyped-def]
    """An open safetensors file (safe_open); DataError where it is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    with open_tensors(path) as stored:
        names = stored.keys()
        return {name: stored.get_tensor(name) for name in names}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file with the permissions that any new file gets; the library's own are for the owner alone."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; renamed to it when the block succeeds, removed when it fails.

    A reader sees the old file or the whole new one. The temporary name starts with a dot.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
