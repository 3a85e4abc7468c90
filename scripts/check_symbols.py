"""Every weak symbol of an avx2 or avx512 kernel object belongs to that level's namespace.

The linker keeps one copy of a weak (inline or template) function. If std::max<int> or a shared helper were emitted by a
kernel compiled for AVX-512, that copy could end up in everybody's hands and crash on a lesser processor.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = ("avx2", "avx512")


def foreign(obj: Path, level: str) -> list[str]:
    """Weak or unique definitions outside sana_ext::cpu::<level>; DW.ref.* are pointers for the exception tables."""
    listing = subprocess.run(
        ["nm", "-C", "--defined-only", str(obj)], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for line in listing.splitlines():
        kind, name = re.match(r"[0-9a-f]* *(\S) (.*)", line).groups()
        if kind in "WVuwv" and f"sana_ext::cpu::{level}::" not in name and not name.startswith("DW.ref."):
            found.append(name)
    return found


def main() -> int:
    objects = [(p, level) for level in LEVELS for p in sorted(ROOT.glob(f"build/temp*/csrc/cpu/kernels/*.{level}.o"))]
    if not objects:
        print("no kernel objects under build/: run `make build` on x86-64 first")
        return 1
    problems = [f"{p.name}: {name}" for p, level in objects for name in foreign(p, level)]
    for problem in problems:
        print(f"FAILED: weak symbol outside its level: {problem}")
    print(f"{len(objects)} objects, {len(problems)} foreign weak symbols")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
