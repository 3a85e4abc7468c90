"""`sana15 export`: a folder of pictures as the benchmarks' own programs read it.

Only files are written; the benchmarks' programs, each with an environment of its own, do the scoring. The formats are those
that these programs read: GenEval (djghosh13/geneval), GenEval 2 (facebookresearch/GenEval2), DPG-Bench (TencentQQGYLab/ELLA),
T2I-CompBench (Karine-Huang/T2I-CompBench) and HPSv2 (tgxs002/HPSv2).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..scenes.checker import check_batch
from ..scenes.vocabulary import IMAGE_SIZE, SHAPES
from ..storage.concurrency import claiming
from ..storage.files import DataError, read_text_lines, rename_durably, staging
from ..storage.png import read_png
from .layout import candidates, prompt_folders, read_metadata

STYLES = ("anime", "concept-art", "paintings", "photo")  # HPSv2's
TILES = 4  # pictures of a DPG-Bench file, two by two


@dataclass(frozen=True)
class Shown:
    """One prompt of a folder, and its pictures in the order of the candidates."""

    line: dict[str, Any]
    paths: list[Path]

    @property
    def prompt(self) -> str:
        return self.line["prompt"]


def read_folder(root: Path, least: int = 1) -> list[Shown]:
    """Every prompt of a folder in GenEval's layout.

    Raises:
        FileNotFoundError: it is none, or a prompt has fewer than `least` pictures. DataError: damaged metadata.
    """
    shown = [Shown(read_metadata(root, i), candidates(root, i)) for i in range(prompt_folders(root))]
    for i, s in enumerate(shown):
        if len(s.paths) < least:
            raise FileNotFoundError(f"{root}: prompt {i} has {len(s.paths)} pictures, {least} are needed")
    return shown


def geneval(shown: list[Shown], target: Path, final: Path, prompts: Path | None, rule: str) -> str:
    """00000/metadata.jsonl, 00000/samples/00000.png; for scenes also results.jsonl, judged by the exact checker."""
    for i, s in enumerate(shown):
        folder = target / f"{i:05d}" / "samples"
        folder.mkdir(parents=True)
        (folder.parent / "metadata.jsonl").write_text(json.dumps(s.line), encoding="utf-8")
        for k, path in enumerate(s.paths):
            shutil.copyfile(path, folder / f"{k:05d}.png")
    written = f"{len(shown)} prompts, {sum(len(s.paths) for s in shown)} pictures"
    if not all(_is_scene(s.line) for s in shown):
        return f"{written}; no results.jsonl, the exact checker knows only scenes"
    rows = [row for i, s in enumerate(shown) for row in _results(s, final / f"{i:05d}" / "samples", rule)]
    (target / "results.jsonl").write_text("".join(results_line(row) for row in rows), encoding="utf-8")
    return f"{written}; results.jsonl by the exact checker, rule {rule}"


def _is_scene(line: Mapping[str, Any]) -> bool:
    return "include" in line and all(entry["class"] in SHAPES for entry in line["include"])


def _results(s: Shown, folder: Path, rule: str) -> list[dict[str, Any]]:
    pixels = [read_png(path)[0] for path in s.paths]
    if any(p.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE) for p in pixels):
        raise DataError(f"{s.paths[0].parent}: the checker judges {IMAGE_SIZE}x{IMAGE_SIZE} pictures")
    rows = []
    for k, verdict in enumerate(check_batch(np.stack(pixels), [s.line] * len(pixels), rule)):
        details: dict[str, list[list[float]]] = {}
        for o in sorted(verdict.objects, key=lambda o: -o.score):
            if o.problem is None:
                details.setdefault(o.shape, []).append([*map(float, o.box), float(o.score)])
        rows.append(result_row(str(folder / f"{k:05d}.png"), s.line, verdict.correct, verdict.reason, details))
    return rows


def result_row(
    filename: str, line: Mapping[str, Any], correct: bool, reason: str, details: Mapping[str, list[list[float]]]
) -> dict[str, Any]:
    """A row of GenEval's results.jsonl; details: class -> its boxes [x1, y1, x2, y2, score], the surest first."""
    return {
        "filename": filename, "tag": line["tag"], "prompt": line["prompt"], "correct": bool(correct), "reason": reason,
        "metadata": json.dumps(line), "details": json.dumps(details),
    }  # fmt: skip


def results_line(row: Mapping[str, Any]) -> str:
    """The bytes that pandas writes for a row, slashes escaped, which is how GenEval's own file is written."""
    return json.dumps(row, separators=(",", ":")).replace("/", "\\/") + "\n"


def geneval2(shown: list[Shown], target: Path, final: Path, prompts: Path | None, rule: str) -> str:
    """images.json, from prompt to the path of its first picture in images/; of a prompt that is listed twice the first counts."""
    (target / "images").mkdir()
    found: dict[str, str] = {}
    for i, s in enumerate(shown):
        if s.prompt in found:
            continue
        shutil.copyfile(s.paths[0], target / "images" / f"{i:05d}.png")
        found[s.prompt] = str(final.absolute() / "images" / f"{i:05d}.png")
    (target / "images.json").write_text(json.dumps(found), encoding="utf-8")
    return f"{len(found)} prompts, one picture each"


def dpg(shown: list[Shown], target: Path, final: Path, prompts: Path | None, rule: str) -> str:
    """<name of the prompt's text file>.png, four pictures two by two; nothing else may lie in the folder."""
    names: dict[str, str] = {}
    for path in sorted(_needed(prompts, "--prompts must be DPG-Bench's folder of prompts (*.txt)").glob("*.txt")):
        names[_words("\n".join(read_text_lines(path)))] = path.stem
    sides = set()
    for i, s in enumerate(shown):
        if _words(s.prompt) not in names:
            raise ValueError(f"prompt {i} is none of {prompts}: {s.prompt[:60]!r}")
        tiles = [_picture(path) for path in s.paths[:TILES]]
        sides |= {size for tile in tiles for size in tile.size}
        if len(sides) != 1:
            raise ValueError(f"DPG-Bench cuts squares of one size; prompt {i} has {tiles[0].width}x{tiles[0].height}")
        side = tiles[0].width
        sheet = Image.new("RGB", (2 * side, 2 * side))
        for k, tile in enumerate(tiles):
            sheet.paste(tile, (k % 2 * side, k // 2 * side))
        sheet.save(target / f"{names[_words(s.prompt)]}.png", format="PNG")
    return f"{len(shown)} of {len(names)} prompts; --resolution {sides.pop()} --pic-num {TILES}"


def t2icompbench(shown: list[Shown], target: Path, final: Path, prompts: Path | None, rule: str) -> str:
    """samples/<prompt>_<six digits>.png, numbered through; one category of the benchmark a folder."""
    (target / "samples").mkdir()
    number = 0
    for i, s in enumerate(shown):
        for path in s.paths:
            name = f"{s.prompt}_{number:06d}.png"
            if re.search(r"[_/\0]", s.prompt) or len(name.encode()) > 255:
                raise ValueError(
                    f"prompt {i} cannot be a file name of T2I-CompBench (no _, no /, 244 bytes): {s.prompt!r}"
                )
            shutil.copyfile(path, target / "samples" / name)
            number += 1
    return f"{len(shown)} prompts, {number} pictures"


def hpsv2(shown: list[Shown], target: Path, final: Path, prompts: Path | None, rule: str) -> str:
    """<style>/<five digits>.jpg, numbered as in the style's list of prompts; a style is there whole or not at all."""
    root = _needed(prompts, f"--prompts must be HPSv2's folder of prompts ({'.json, '.join(STYLES)}.json)")
    pictures = {_words(s.prompt): s.paths[0] for s in reversed(shown)}  # the first of a prompt that is listed twice
    used: set[str] = set()
    counts = []
    for style in STYLES:
        if not (root / f"{style}.json").exists():
            continue
        try:
            texts = json.loads("\n".join(read_text_lines(root / f"{style}.json")))
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError("no list of prompts")
        except ValueError as error:
            raise DataError(f"{root / style}.json is damaged: {error}") from None
        there = [text for text in texts if _words(text) in pictures]
        if not there:
            continue
        if len(there) < len(texts):
            first = next(i for i, text in enumerate(texts) if _words(text) not in pictures)
            raise FileNotFoundError(
                f"{len(texts) - len(there)} pictures of style {style} are missing, the first is {first}"
            )
        (target / style).mkdir()
        for i, text in enumerate(texts):
            _picture(pictures[_words(text)]).save(
                target / style / f"{i:05d}.jpg", format="JPEG", quality=95, subsampling=0
            )
        used |= set(map(_words, texts))
        counts.append(f"{style} {len(texts)}")
    if strange := [s.prompt for s in shown if _words(s.prompt) not in used]:
        raise ValueError(f"{len(strange)} prompts are none of {root}, the first is {strange[0][:60]!r}")
    return ", ".join(counts)


FORMATS = {"geneval": geneval, "geneval2": geneval2, "dpg": dpg, "t2icompbench": t2icompbench, "hpsv2": hpsv2}


def _needed(folder: Path | None, message: str) -> Path:
    if folder is None or not folder.is_dir():
        raise ValueError(message)
    return folder


def _words(text: str) -> str:
    return " ".join(text.split())


def _picture(path: Path) -> Image.Image:
    return Image.fromarray(read_png(path)[0])


@claiming(lambda given: given["target"], new=True)
def export(
    name: str, source: str | Path, target: str | Path, *, prompts: str | Path | None = None, rule: str = "strict"
) -> str:
    """Writes a new folder in a benchmark's format, whole or not at all; returns what it holds, in words.

    Args:
        name: geneval, geneval2, dpg, t2icompbench or hpsv2.
        source: a folder in GenEval's layout, as sample and search write it. Formats with one picture for a prompt take the
            first, which is the best in a search's picks.
        prompts: the benchmark's own folder of prompts, for dpg and hpsv2, whose files are named after them.
        rule: of the exact checker, for geneval's results.jsonl.

    Raises:
        ValueError: the folder is there already or being written, or prompts that do not fit. FileNotFoundError, DataError:
        bad pictures.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; the formats are {', '.join(FORMATS)}")
    final = Path(target)
    if final.exists():
        raise ValueError(f"{final} is there already; choose another folder")
    shown = read_folder(Path(source), TILES if name == "dpg" else 1)
    with staging(final) as partial:
        partial.mkdir()
        words = FORMATS[name](shown, partial, final, None if prompts is None else Path(prompts), rule)
        rename_durably(partial, final)
    return words


def run(args: argparse.Namespace) -> None:
    words = export(args.format, args.source, args.target, prompts=args.prompts, rule=args.rule)
    print(f"{args.target}: {words}")
