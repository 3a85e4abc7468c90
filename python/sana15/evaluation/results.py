"""`sana15 eval`: the exact checker's score of a folder of pictures in GenEval's layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..device import resolved
from ..storage.concurrency import claimed
from ..storage.files import replacing
from .layout import Judged, judge_folder, read_results
from .scores import as_json, compare, score_table, show, show_comparison


def run(args: argparse.Namespace) -> None:
    if args.json and args.json != "-" and not Path(args.json).parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {Path(args.json).parent}")
    if args.device != "auto" and not args.detector:
        raise ValueError("--device belongs to --detector: the checker of the scenes needs none")
    if args.detector:
        args.folder = _detected(args)
    judged, settings = _judged(args.folder, args.rule)
    if args.against:
        _compare(args, judged, settings)
        return
    table = score_table(judged, args.seed, args.resamples)
    result = as_json(table, judged, settings | {"rule": args.rule, "resamples": args.resamples})
    if args.json == "-":
        print(json.dumps(result))
        return
    n = len(judged[0].correct)
    print(_words(args.folder, judged, args.rule))
    if "model" in settings:
        low, high = settings.get("guidance_interval", (0.0, 1.0))
        print(
            f"model {settings['model']} {settings.get('model_sha256', '')[:10]}, seed {settings.get('seed')}, "
            f"{settings.get('steps')} steps of {settings.get('sampler')}, guidance {settings.get('guidance')} in [{low:g}, {high:g}]"
        )
    print()
    print(show(table, n))
    if args.json:
        _write(result, Path(args.json))


def _write(result: dict[str, Any], path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")


def _detected(args: argparse.Namespace) -> str:
    """Writes GenEval's results.jsonl into the folder; returns its path."""
    root = Path(args.folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder of pictures")
    with claimed(root):
        return _detected_in(root, args)


def _detected_in(root: Path, args: argparse.Namespace) -> str:
    from .detector import ClipColors, PhotoDetector, photo_results
    from .export import read_folder, results_line

    device = resolved(args.device)
    colors = ClipColors.load(args.clip, device) if args.clip else None
    rows = photo_results(read_folder(root), PhotoDetector.load(args.detector, device), colors)
    path = root / "results.jsonl"
    with replacing(path) as partial:
        partial.write_text("".join(results_line(row) for row in rows), encoding="utf-8")
    return str(path)


def _judged(source: str, rule: str) -> tuple[list[Judged], dict[str, Any]]:
    """A folder of pictures, or GenEval's results.jsonl with verdicts that are taken as they are."""
    path = Path(source)
    return (read_results(path), {}) if path.suffix == ".jsonl" else judge_folder(path, rule)


def _words(source: str, judged: list[Judged], rule: str) -> str:
    counts = sorted({len(j.correct) for j in judged})
    pictures = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    by = "verdicts of the file" if source.endswith(".jsonl") else f"rule {rule}"
    return f"{len(judged)} prompts, {pictures} pictures each, {by}"


def _compare(args: argparse.Namespace, judged: list[Judged], settings: dict[str, Any]) -> None:
    """Both runs' scores and their paired difference."""
    others, other_settings = _judged(args.against, args.rule)
    table = compare(judged, others, args.seed, args.resamples)
    result = {
        "settings": settings, "against": other_settings, "rule": args.rule, "resamples": args.resamples,
        "scores": {row: {column: vars(score) for column, score in cells.items()} for row, cells in table.items()},
    }  # fmt: skip
    if args.json == "-":
        print(json.dumps(result))
        return
    for name, folder, run in (("first", args.folder, judged), ("second", args.against, others)):
        print(f"{name}: {folder}, {_words(folder, run, args.rule)}")
    print(f"\n{show_comparison(table)}")
    if args.json:
        _write(result, Path(args.json))
