"""A grid of cells that can be run in pieces, killed, and shared by several processes; and the report on what is done.

An experiment names its cells for a budget. Each cell is computed once and kept as one JSON file, so that a kill costs one
cell. A cell is locked while it is computed: two processes on one folder work on different cells.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sana_ext

from ..storage.files import read_json, replacing

Results = Mapping[str, dict[str, Any]]  # cell -> what it returned
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Place:
    """The place where a cell works: a folder that all cells of the experiment share, one of all experiments, and the device."""

    folder: Path
    device: str
    common: Path = Path()


@dataclass(frozen=True)
class Cell:
    """A piece of at most some minutes.

    Attributes:
        name: a file name, unique in the experiment.
        run: computes the cell's JSON object. A cell that is killed is run again from its start.
        after: names of the cells whose files it reads.
        made: what it leaves for others, a path below the common folder. Where only results were kept (a checkout has no
            weights), a cell whose file is needed is computed again. "": it leaves nothing there.
    """

    name: str
    run: Callable[[Place], dict[str, Any]]
    after: tuple[str, ...] = ()
    made: str = ""


@dataclass(frozen=True)
class Report:
    """Markdown of what is done so far, and what draws it into a PNG (None where there is nothing to draw yet)."""

    text: str
    draw: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Experiment:
    """A question, the sizes and cells that answer it, and the report on them.

    Attributes:
        budgets: budget -> options, a dataclass of this experiment.
        cells: the cells of such options, in the order in which they are best run.
        report: from options, the results so far and the shared folder.
    """

    name: str
    budgets: Mapping[str, Any]
    cells: Callable[[Any], Sequence[Cell]]
    report: Callable[[Any, Results, Path], Report]


def run_cells(
    experiment: Experiment,
    options: Any,
    folder: Path,
    *,
    device: str = "cpu",
    only: str = "",
    progress: Callable[[str], None] = print,
) -> None:
    """Computes the cells that are not done yet, and those that they need.

    Args:
        folder: of this experiment alone; it must hold the same options, or none.
        only: cells with this in their name.

    Raises:
        ValueError: the folder holds cells of other options, or no cell is called so.
    """
    claim(folder, options)
    grid = _Grid(experiment, options, folder, device)
    asked = [name for name in grid.cells if only in name]
    if not asked:
        raise ValueError(f"no cell of {experiment.name} has {only!r} in its name; --list shows them")
    while todo := grid.waiting(asked):
        ready = [name for name in todo if all(map(grid.is_there, grid.cells[name].after))]
        if not any(grid.compute(name, progress) for name in ready):
            time.sleep(POLL_SECONDS)  # another process has them
    progress(f"{experiment.name}: {len(asked)} of {len(grid.cells)} cells are done")


class _Grid:
    """The cells of an experiment and what of them is in its folder."""

    def __init__(self, experiment: Experiment, options: Any, folder: Path, device: str) -> None:
        self.name, self.folder = experiment.name, folder
        self.cells = {cell.name: cell for cell in experiment.cells(options)}
        self.place = Place(folder / "shared", device, common_folder(folder))

    def is_done(self, name: str) -> bool:
        return _path(self.folder, name).exists()

    def is_there(self, name: str) -> bool:
        """Tells whether a cell is done and what it left for others can be read."""
        made = self.cells[name].made
        return self.is_done(name) and (not made or (self.place.common / made).exists())

    def waiting(self, asked: Sequence[str]) -> list[str]:
        """Those of the asked cells that are not done, and what must be computed for them, in the experiment's order."""
        found: set[str] = set()
        todo = [name for name in asked if not self.is_done(name)]
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += [a for a in self.cells[name].after if not self.is_there(a)]
        return [name for name in self.cells if name in found]

    def compute(self, name: str, progress: Callable[[str], None]) -> bool:
        """Computes the cell; False where another process computes it, or has just done so."""
        cell, path = self.cells[name], _path(self.folder, name)
        lock = self.folder / "locks" / name
        if cell.made:  # other experiments make it, too
            lock = self.place.common / "locks" / cell.made.replace("/", "--")
        with _locked(lock) as mine:
            if not mine or self.is_there(name):
                return False
            progress(f"{self.name}: {name} ...")
            began = time.process_time()  # of this process: what else the machine does, and pauses, do not count
            result = cell.run(self.place)
            record = {"cell": name, "seconds": round(time.process_time() - began, 1), **origin(), "result": result}
            if not path.exists():  # a result that was kept stays, where only its files were missing
                with replacing(path) as partial:
                    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            progress(f"{self.name}: {name} in {record['seconds']} s")
        return True


def common_folder(folder: Path) -> Path:
    """The folder beside an experiment's, with what several experiments read."""
    return folder.parent / "common"


def done(experiment: Experiment, options: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the cells that are there: cell -> its result with its seconds, date, machine, commit and threads."""
    names = [cell.name for cell in experiment.cells(options)]
    return {name: read_json(_path(folder, name)) for name in names if _path(folder, name).exists()}


def claim(folder: Path, options: Any) -> None:
    """Writes down the options of a folder's cells; ValueError where it holds cells of others."""
    path, ours = folder / "options.json", json.loads(json.dumps(dataclasses.asdict(options)))
    if path.exists():
        theirs = read_json(path)
        for name in dict.fromkeys([*ours, *theirs]):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{folder} holds cells with {name} {theirs.get(name)}, now it is {ours.get(name)}; another --out"
                )
        _restore(folder)
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else: there is no {path.name}; another --out")
    _make_folders(folder)
    with replacing(path) as partial:
        partial.write_text(json.dumps(ours) + "\n", encoding="utf-8")


def _make_folders(folder: Path) -> None:
    for part in (folder / "cells", folder / "locks", folder / "shared", common_folder(folder) / "locks"):
        part.mkdir(parents=True, exist_ok=True)


def _restore(folder: Path) -> None:
    """Makes the cells' files of the report's NAME.json: a checkout has that alone."""
    _make_folders(folder)
    ledger = folder / f"{folder.name}.json"
    for name, record in (read_json(ledger) if ledger.exists() else {}).items():
        if not _path(folder, name).exists():
            with replacing(_path(folder, name)) as partial:
                partial.write_text(json.dumps(record) + "\n", encoding="utf-8")


def write_report(experiment: Experiment, options: Any, folder: Path, command: str) -> str:
    """Writes NAME.md, NAME.json and NAME.png into the folder and returns the Markdown.

    Every table says with which machine, date, commit and command it was made, and the compute behind it.
    """
    records = done(experiment, options, folder)
    total = len(experiment.cells(options))
    report = experiment.report(options, {name: r["result"] for name, r in records.items()}, folder / "shared")
    text = f"{report.text.rstrip()}\n\n{_made(records, total, command)}\n"
    drawn = folder / f"{experiment.name}.png"
    if report.draw is not None:
        with replacing(drawn) as partial:
            report.draw(partial)
        text += f"\n![{experiment.name}]({drawn.name})\n"
    with replacing(folder / f"{experiment.name}.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with replacing(folder / f"{experiment.name}.json") as partial:
        partial.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return text


def _made(records: Mapping[str, Mapping[str, Any]], total: int, command: str) -> str:
    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[key]) for r in records.values()))

    if not records:
        return f"No cell of {total} is done."
    dates = sorted(r["date"] for r in records.values())
    between = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    minutes = sum(r["seconds"] for r in records.values()) / 60
    return (
        f"`{command}`, {between}; {len(records)} of {total} cells, {minutes:.1f} minutes in all (the longest "
        f"{max(r['seconds'] for r in records.values()) / 60:.1f}), threads {each('threads')}; {each('machine')}; "
        f"torch {each('torch')}; sana-ext {each('commit')}."
    )


def origin() -> dict[str, Any]:
    """Machine, date, commit, torch and threads of what is computed now."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "commit": _commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def _commit() -> str:
    """The commit of a checkout, else the version."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
    except OSError:
        return sana_ext.__version__
    return done.stdout.strip() or sana_ext.__version__


def _path(folder: Path, name: str) -> Path:
    return folder / "cells" / f"{name}.json"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Takes a lock; yields whether it could be had. It ends with the block, or with the process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
