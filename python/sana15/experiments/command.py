"""`sana15 reproduce`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..device import resolved
from . import EXPERIMENTS, load
from .grid import claim, done, run_cells, write_report


def run(args: argparse.Namespace) -> None:
    names = args.name or list(EXPERIMENTS)
    experiments = [load(name) for name in names]  # a wrong name is refused before anything runs
    out = Path(args.out or f"out/reproduce-{args.budget}")
    device = resolved(args.device)
    for experiment in experiments:
        options, folder = experiment.budgets[args.budget], out / experiment.name
        if args.list:
            there = done(experiment, options, folder)
            for cell in experiment.cells(options):
                print(
                    f"{experiment.name}: {cell.name}"
                    + (f" done, {there[cell.name]['seconds']} s" if cell.name in there else "")
                )
            continue
        if args.report:
            claim(folder, options)
        else:
            run_cells(experiment, options, folder, device=device, only=args.only)
        command = shlex.join(["sana15", "reproduce", experiment.name, "--budget", args.budget])
        print(write_report(experiment, options, folder, command))
        print(f"written: {folder / experiment.name}.md, .json, .png")
