"""Finds, loads and reports the compiled libraries. Missing is allowed and reported; broken raises."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

from . import _sources
from .ops._library import MISSING, NOT_COMPILED, OPS

#: Instruction set levels that SANA_EXT_CPU_ISA may name: x86-64's in rising order, and AArch64's only one.
ISA_LEVELS = ("baseline", "avx2", "avx512", "neon")


@dataclass(frozen=True)
class Library:
    """One compiled library: where it is expected, and whether it was loaded or why not."""

    name: str
    path: Path
    loaded: bool
    reason: str


_libraries: dict[str, Library] = {}
_isa: tuple[str | None, str | None] = (None, None)  # in use, best
_package = Path(__file__).parent
_home = _package  # where the libraries are
_remark = ""  # why it is another folder than the package's, or why another one is not used


def load() -> None:
    """Loads the libraries that belong to this torch; called once by ``import sana_ext``."""
    global _home, _isa, _remark
    wanted = os.environ.get("SANA_EXT_CPU_ISA", "")
    if wanted and wanted not in ISA_LEVELS:
        raise ValueError(f"SANA_EXT_CPU_ISA={wanted!r} is not a known level; choose one of {', '.join(ISA_LEVELS)}")
    _home, _remark = _sources.home(_package)
    emulated = os.environ.get("SANA_EXT_EMULATOR", "") == "1"
    _libraries["cpu"] = _load_emulator() if emulated else _load("cpu")
    _libraries["cuda"] = _load("cuda", _why_no_cuda)
    MISSING.update({library.name: _warning(library) for library in _libraries.values() if not library.loaded})
    if _libraries["cpu"].loaded and not emulated:
        _isa = _isa_levels(_libraries["cpu"].path)
        if _isa[0] is None:
            raise ValueError(
                f"SANA_EXT_CPU_ISA={wanted!r} is not available here; this processor's best level is {_isa[1]!r}"
            )


def _why_no_cuda() -> str | None:
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    built = (build_info() or {}).get("cuda", "")
    if built and built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"built with CUDA {built}, this torch uses CUDA {torch.version.cuda}"
    return None


def _warning(library: Library) -> str:
    """Words what the first op says that would have used this library."""
    return (
        f"sana_ext: libsana_ext_{library.name}.so is missing ({library.reason}): ops on {library.name} run their PyTorch "
        "default, correct but slower; `python -m sana_ext` tells more"
    )


def _load_emulator() -> Library:
    """For tests: the CUDA kernels, emulated on the host, answer for CPU tensors in place of the CPU's own."""
    library = _load("emulator")
    if not library.loaded:
        raise ImportError(f"sana_ext: SANA_EXT_EMULATOR=1, but {library.path} is {library.reason}")
    return Library("cpu", library.path, True, "the CUDA kernels, emulated")


def _load(device: str, why_not: Callable[[], str | None] | None = None) -> Library:
    path = (_package if device == "emulator" else _home) / f"libsana_ext_{device}.so"
    if not path.exists():
        return Library(device, path, False, _why_not_built(device))
    if why_not and (reason := why_not()):
        return Library(device, path, False, reason)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"sana_ext: {path} was built but cannot be loaded: {error}") from error
    if wrong := _mismatch(device):
        raise _other_version(path, wrong)
    return Library(device, path, True, _remark if _home != _package else "loaded")


def _why_not_built(device: str) -> str:
    """Returns what the build said, which installers hide; else what is against the copy that another folder has."""
    why = _sources.read_record(_home).get("why_no_cuda") if device == "cuda" else None
    against = _remark if _home == _package else ""
    return "; ".join(["not built", *filter(None, (why, against))])


def _mismatch(device: str) -> str | None:
    """Says what shows that the library just loaded was built from other sources. CUDA kernels may be fewer, emulated or not."""
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("sana_ext::") for name in names if name.startswith("sana_ext::")}
    if unknown := sorted(registered - OPS.keys()):
        return f"it has kernels of unknown ops ({', '.join(unknown)})"
    if device != "cpu":
        return None
    missing = [op for op in OPS if op not in NOT_COMPILED["cpu"] and not has_kernel(op, device)]
    return f"it lacks kernels ({', '.join(missing)})" if missing else None


def _other_version(path: Path, wrong: str) -> ImportError:
    return ImportError(f"sana_ext: {path} belongs to another version of this package: {wrong}; build it again")


def _isa_levels(path: Path) -> tuple[str | None, str | None]:
    library = ctypes.CDLL(str(path))
    levels = []
    for symbol in ("sana_ext_cpu_isa", "sana_ext_cpu_best_isa"):
        try:
            function = getattr(library, symbol)
        except AttributeError:
            raise _other_version(path, f"it has no {symbol}()") from None
        function.restype = ctypes.c_char_p
        name = function()
        levels.append(None if name is None else name.decode())
    return levels[0], levels[1]


def libraries() -> dict[str, Library]:
    """Every compiled library of this installation, loaded or not, with the reason."""
    return dict(_libraries)


def isa() -> str | None:
    """The instruction set level of the CPU kernels in this process; None where they were not built."""
    return _isa[0]


def best_isa() -> str | None:
    """The best level of this processor; None where the CPU kernels were not built."""
    return _isa[1]


def has_kernel(op: str, device: str) -> bool:
    """Tells whether a compiled kernel of ``torch.ops.sana_ext.<op>`` is registered for ``cpu`` or ``cuda``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"sana_ext::{op}", device.upper()))


def build_info() -> dict[str, Any] | None:
    """Returns what the build recorded (compiler, torch, nvcc, architectures), or None where the module ``_C`` was not built."""
    # Only the file beside the libraries counts: an editable install's finder would offer another copy's.
    name = "sana_ext._C"
    if name not in sys.modules:
        spec = PathFinder.find_spec(name, [str(_home)])
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return dict(sys.modules[name].build_info())


def outdated() -> list[str]:
    """The libraries in the source tree of this package that were built from other sources than it has now."""
    now = _sources.fingerprint(_package.parent)
    recorded = _sources.read_record(_package).get("sources", {})
    return [f"libsana_ext_{name}.so" for name, of in recorded.items() if now is not None and of != now]
