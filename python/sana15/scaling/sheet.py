"""A grid of candidates, a prompt a row, the best on the left, under each its score and what the judge says."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..evaluation.layout import picture_path
from .run import SearchResult

ROWS, COLUMNS = 12, 12
SIDE, GAP, TEXT = 128, 8, 46  # pixels: a tile, between tiles, below one
WORTH = {True: "#116611", False: "#992222", None: "#333333"}


@dataclass(frozen=True)
class Tile:
    picture: Image.Image
    score: float
    correct: bool | None
    reason: str
    picked: bool


def scored(result: SearchResult) -> list[tuple[str, list[Tile]]]:
    """The first prompts with their candidates, sorted by the score of the search; prompts without scores are left out."""
    rows: list[tuple[str, list[Tile]]] = []
    for f in result.found:
        if len(rows) == ROWS or not f.order:
            continue
        tiles = []
        for c in f.order[:COLUMNS]:
            with Image.open(picture_path(result.out / "candidates", f.index, c)) as picture:
                verdict = f.verdicts[c]
                tiles.append(
                    Tile(picture.convert("RGB"), verdict.score, verdict.correct, verdict.reason, c in f.picked)
                )
        rows.append((f.line["prompt"], tiles))
    return rows


def candidate_grid(rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """Picked candidates have a frame; the text is green for a picture that the judge thinks right, red for a wrong one."""
    columns = max(len(tiles) for _, tiles in rows)
    height = SIDE + TEXT + GAP + 18
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, len(rows) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (prompt, tiles) in enumerate(rows):
        top = GAP + r * height
        draw.text((GAP, top), prompt[: columns * 20], fill="black")
        for k, tile in enumerate(tiles):
            x, y = GAP + k * (SIDE + GAP), top + 16
            sheet.paste(tile.picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
            if tile.picked:
                draw.rectangle((x - 3, y - 3, x + SIDE + 2, y + SIDE + 2), outline="#116611", width=3)
            text = [f"{tile.score:.3f}", *textwrap.wrap(tile.reason, 22)[:2]]
            draw.multiline_text((x, y + SIDE + 4), "\n".join(text), fill=WORTH[tile.correct], spacing=1)
    return sheet
