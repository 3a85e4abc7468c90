"""Tells which sources a compiled library was built from: the build records it, the import compares it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Stands beside the libraries. sources: library -> fingerprint; why_no_cuda: why the build left the CUDA library out.
RECORD = "libsana_ext.json"


def fingerprint(root: Path) -> str | None:
    """The digest of all that a library is built from in the source tree `root`; None where there is no source tree."""
    folder = root / "csrc"
    if not folder.is_dir():
        return None
    files = [root / "setup.py", *folder.rglob("*")]
    names = {file.relative_to(root).as_posix(): file for file in files if _is_source(file)}
    digest = hashlib.sha256()
    for name in sorted(names):
        if not name.startswith("csrc/tests/"):
            content = names[name].read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _is_source(file: Path) -> bool:
    return file.suffix in (".cpp", ".h", ".cu", ".cuh", ".py") and file.is_file()


def read_record(package: Path) -> dict[str, Any]:
    """The record of the libraries in the folder `package`; empty where there is none that can be read."""
    try:
        record = json.loads((package / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    return record if isinstance(record, dict) and isinstance(record.get("sources", {}), dict) else {}


def write_record(package: Path, sources: dict[str, str], why_no_cuda: str | None) -> None:
    text = json.dumps({"sources": sources, "why_no_cuda": why_no_cuda}, indent=1)
    (package / RECORD).write_text(text + "\n", encoding="utf-8")


def has_libraries(package: Path) -> bool:
    return any((package / f"libsana_ext_{name}.so").exists() for name in ("cpu", "cuda"))


def home(package: Path) -> tuple[Path, str]:
    """The folder whose libraries belong to the Python files in `package`, and a remark on it, which may be empty.

    It is `package` itself, except in a source tree without libraries of its own that hides an installed copy, as the
    working folder does with ``python -m sana_ext``: then that copy, if it was built from the same sources.
    """
    if has_libraries(package) or (wanted := fingerprint(package.parent)) is None:
        return package, ""
    remark = ""
    for other in _copies(package):
        sources = read_record(other).get("sources", {})
        if sources and set(sources.values()) == {wanted}:
            return other, f"loaded from the installed copy, which was built from the sources of {package.parent}"
        remark = remark or f"those in {other} were built from other sources than {package.parent} has: install it again"
    return package, remark


def _copies(package: Path) -> Iterator[Path]:
    """Other folders of this name with libraries, in the order of sys.path."""
    seen = {package.resolve()}
    for entry in filter(None, sys.path):
        folder = (Path(entry) / package.name).resolve()
        if folder not in seen and has_libraries(folder):
            seen.add(folder)
            yield folder
