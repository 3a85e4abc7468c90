"""Finds, loads and reports the compiled libraries. Missing is allowed and reported; broken raises."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Instruction set levels that SANA_EXT_CPU_ISA may name, in rising order per architecture.
ISA_LEVELS = ("baseline", "avx2", "avx512", "neon")


@dataclass(frozen=True)
class Library:
    """One compiled library: where it is expected, and whether it was loaded or why not."""

    name: str
    path: Path
    loaded: bool
    reason: str


_libraries: dict[str, Library] = {}


def load() -> None:
    """Loads the libraries that belong to this torch; called once by ``import sana_ext``."""
    wanted = os.environ.get("SANA_EXT_CPU_ISA", "")
    if wanted and wanted not in ISA_LEVELS:
        raise ValueError(f"SANA_EXT_CPU_ISA={wanted!r} is not a known level; choose one of {', '.join(ISA_LEVELS)}")
    _libraries["cpu"] = _load("cpu", None)
    without_cuda = None if torch.version.cuda else "this torch is built without CUDA"
    _libraries["cuda"] = _load("cuda", without_cuda)


def _load(device: str, reason_against: str | None) -> Library:
    path = Path(__file__).parent / f"libsana_ext_{device}.so"
    if not path.exists():
        return Library(device, path, False, "not built")
    if reason_against:
        return Library(device, path, False, reason_against)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"sana_ext: {path} was built but cannot be loaded: {error}") from error
    return Library(device, path, True, "loaded")


def libraries() -> dict[str, Library]:
    """Every compiled library of this installation, loaded or not, with the reason."""
    return dict(_libraries)


def build_info() -> dict[str, Any] | None:
    """What the build recorded (compiler, flags, torch, CUDA), or None where the module ``_C`` was not built."""
    if importlib.util.find_spec("sana_ext._C") is None:
        return None
    return dict(importlib.import_module("sana_ext._C").build_info())
