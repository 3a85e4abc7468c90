"""GenEval's files: prompts as JSON lines, and a folder of pictures for each prompt.

DIR/00012/metadata.jsonl     one line: prompt, tag, include, and for counting exclude
DIR/00012/samples/0003.png   candidate 3 for that prompt
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..scenes.checker import check_batch
from ..scenes.spec import spec_from_metadata
from ..scenes.testset import is_held_out
from ..scenes.testset import load as test_set
from ..scenes.vocabulary import IMAGE_SIZE
from ..storage.files import DataError, read_text_lines, replacing
from ..storage.png import read_png

TEST = "test"  # the name of the shipped test set


def read_prompts(source: str) -> list[dict[str, Any]]:
    """One metadata line per prompt: "test" is the shipped test set, *.jsonl holds GenEval's lines, any other file one prompt a line.

    Raises:
        FileNotFoundError; DataError: a line that is no JSON object with a prompt, or no line at all.
    """
    if source == TEST:
        return test_set()
    path = Path(source)
    try:
        text = read_text_lines(path)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f'{path} is no file of prompts (the shipped test set is "{TEST}")') from None
    numbered = [(number, line.strip()) for number, line in enumerate(text, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} holds no prompts")
    if path.suffix != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_metadata(line, f"{path}:{number}") for number, line in numbered]


def _metadata(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise DataError(f'{where}: no JSON object with a text "prompt"')
    return values


def metadata_path(root: Path, index: int) -> Path:
    return root / f"{index:05d}" / "metadata.jsonl"


def picture_path(root: Path, index: int, candidate: int) -> Path:
    return root / f"{index:05d}" / "samples" / f"{candidate:04d}.png"


def write_metadata(root: Path, lines: list[dict[str, Any]]) -> None:
    """Makes every prompt's folder, before the first picture: what a run still lacks is seen from the folders alone.

    Raises:
        ValueError: the folder has other prompts.
    """
    texts = {metadata_path(root, index): json.dumps(line) + "\n" for index, line in enumerate(lines)}
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} has another prompt; choose another --out")
    if metadata_path(root, len(lines)).exists():
        raise ValueError(f"{root} has more than these {len(lines)} prompts; choose another --out")
    for path, text in texts.items():
        path.parent.joinpath("samples").mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Judged:
    """One prompt's pictures as the exact checker sees them."""

    index: int
    prompt: str
    tag: str
    held_out: bool | None  # None: no scene, nothing was held out
    correct: tuple[bool, ...]  # by candidate
    reasons: tuple[str, ...]  # why not; empty where correct


def judge_folder(root: Path, rule: str = "strict") -> tuple[list[Judged], dict[str, Any]]:
    """Every prompt of a folder judged, and the settings that all its pictures share (empty where they have none).

    Raises:
        FileNotFoundError: no such folder, or prompts or pictures are missing (the first is named).
        DataError: a damaged picture or metadata line, or a picture of the wrong size.
    """
    prompts = prompt_folders(root)
    names = [candidates(root, index) for index in range(prompts)]
    n = max(map(len, names))
    lacking = [picture_path(root, i, len(found)) for i, found in enumerate(names) if len(found) < n]
    if n == 0 or lacking:
        missing = sum(n - len(found) for found in names) if n else prompts
        first = lacking[0] if lacking else picture_path(root, 0, 0)
        raise FileNotFoundError(f"{missing} pictures are missing, the first is {first}; `sana15 sample` resumes a run")
    judged = []
    shared: dict[str, Any] | None = None
    for index, paths in enumerate(names):
        line = read_metadata(root, index)
        pixels = []
        for path in paths:
            picture, values = read_png(path)
            if picture.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
                size = f"{picture.shape[1]}x{picture.shape[0]}"
                raise DataError(f"{path} is {size} pixels; the checker judges {IMAGE_SIZE}x{IMAGE_SIZE}")
            pixels.append(picture)
            shared = _shared(shared, values or {})
        try:
            spec = spec_from_metadata(line)
            verdicts = check_batch(np.stack(pixels), [line] * n, rule)
        except ValueError as error:
            raise DataError(f"{metadata_path(root, index)}: {error}") from None
        correct, reasons = zip(*((verdict.correct, verdict.reason) for verdict in verdicts))
        judged.append(Judged(index, line["prompt"], spec.tag, is_held_out(spec), correct, reasons))
    return judged, shared or {}


def prompt_folders(root: Path) -> int:
    """The number of prompt folders, which must be 00000 and on without a gap."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    numbers = {int(path.name) for path in root.iterdir() if re.fullmatch(r"\d+", path.name)}
    if not numbers:
        raise FileNotFoundError(f"{root} has no folder 00000 with metadata.jsonl and samples/: not GenEval's layout")
    gaps = sorted(set(range(max(numbers))) - numbers)
    if gaps:
        raise FileNotFoundError(f"{len(gaps)} prompts are missing, the first is {metadata_path(root, gaps[0])}")
    return max(numbers) + 1


def candidates(root: Path, index: int) -> list[Path]:
    """The pictures of a prompt: every numbered PNG in samples/, whatever its number of digits, up to the first gap."""
    folder = root / f"{index:05d}" / "samples"
    numbered = sorted(p for p in folder.glob("*.png") if re.fullmatch(r"\d+", p.stem)) if folder.is_dir() else []
    found: dict[int, Path] = {}
    for path in numbered:
        if (other := found.setdefault(int(path.stem), path)) != path:
            raise DataError(f"{other} and {path.name} are the same candidate; remove one of them")
    paths: list[Path] = []
    while len(paths) in found:
        paths.append(found[len(paths)])
    if len(paths) < len(found):
        raise FileNotFoundError(f"{picture_path(root, index, len(paths))} is missing, later ones are there")
    return paths


def read_metadata(root: Path, index: int) -> dict[str, Any]:
    """The metadata line of a prompt. FileNotFoundError, DataError: it is missing, damaged."""
    path = metadata_path(root, index)
    try:
        return _metadata("\n".join(read_text_lines(path)).strip(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None


def read_results(path: Path) -> list[Judged]:
    """GenEval's results.jsonl: a row for each picture, judged by whoever wrote it. Prompts are told apart by their metadata.

    Raises:
        FileNotFoundError; DataError: a row without tag, prompt, metadata and a verdict, or none at all.
    """
    prompts: dict[str, list[dict[str, Any]]] = {}
    try:
        lines = read_text_lines(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _metadata(line, f"{path}:{number}")
        if not isinstance(row.get("correct"), bool) or not all(
            isinstance(row.get(k), str) for k in ("tag", "metadata")
        ):
            raise DataError(f"{path}:{number}: no row of GenEval's results (tag, prompt, correct, metadata)")
        prompts.setdefault(row["metadata"], []).append(row)
    if not prompts:
        raise DataError(f"{path} holds no results")
    judged = []
    for index, rows in enumerate(prompts.values()):
        rows = sorted(rows, key=lambda row: str(row.get("filename", "")))
        correct, reasons = zip(*((row["correct"], str(row.get("reason", ""))) for row in rows))
        judged.append(Judged(index, rows[0]["prompt"], rows[0]["tag"], None, correct, reasons))
    return judged


def _shared(before: dict[str, Any] | None, values: dict[str, Any]) -> dict[str, Any]:
    """Returns what two descriptions have in common, less what differs from picture to picture by nature."""
    own = ("prompt", "prompt_index", "candidate")
    if before is None:
        return {k: v for k, v in values.items() if k not in own}
    return {k: v for k, v in before.items() if k in values and values[k] == v}
