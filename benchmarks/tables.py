"""The tables of benchmarks/README.md, made from results/*.json.

    python benchmarks/tables.py            writes them between the two marks in README.md
    python benchmarks/tables.py --check    fails where README.md shows anything else

A later run of the same command in one file takes the place of the earlier one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- tables.py writes from here -->\n", "<!-- tables.py writes to here -->\n"
HEADER = ("case", "shape", "dtype", "eager ms", "compile ms", "ours ms", "floor ms", "eager / ours", "compile / ours")
LINES = ("| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER))


def line(row: dict[str, Any]) -> str:
    """One measured case: medians in milliseconds, ratios with their quartiles."""
    ms, ratio = row["ms"], row["ratio"]
    times = [f"{ms[name]:.3g}" if name in ms else "-" for name in ("eager", "compile", "ours")]
    ratios = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio[name]) if name in ratio else "-" for name in ("eager", "compile")]
    return "| " + " | ".join([row["op"], row["shape"], row["dtype"], *times, f"{row['floor_ms']:.3g}", *ratios]) + " |"


def section(run: dict[str, Any]) -> str:
    """One run of one benchmark: its command, the machine, the rows."""
    forced = " ".join(f"{k}={v}" for k, v in run["forced"].items())
    limits = run["ceilings"]
    facts = [run["machine"], run["capability"], f"{run['threads']} threads", f"torch {run['torch']}"]
    about = ", ".join([*facts, f"commit {run['commit']}", run["date"]]) + (f"; forced: {forced}" if forced else "")
    about += f"; ceilings {limits['copy_GBps']} GB/s copy, {limits['fp32_GFLOPs']} GFLOP/s fp32, "
    about += f"{limits['bf16_GFLOPs']} GFLOP/s bf16."
    return "\n".join([f"## `{run['command']}`", "", about, "", *LINES, *(line(row) for row in run["rows"]), ""])


def tables(folder: Path = HERE / "results") -> str:
    sections = []
    for path in sorted(folder.glob("*.json")):
        latest = {(run["command"], *run["forced"].items()): run for run in json.loads(path.read_text())}
        sections += [section(run) for run in latest.values()]
    return "\n" + "\n".join(sections) + "\n"


def main() -> int:
    before, _, rest = README.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if "--check" in sys.argv[1:]:
        if shown != tables():
            print("benchmarks/README.md does not show results/*.json: run python benchmarks/tables.py")
            return 1
        return 0
    README.write_text(before + BEGIN + tables() + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
