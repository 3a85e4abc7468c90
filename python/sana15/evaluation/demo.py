"""`sana15 demo`: prompts of the test set to pictures, judged; a contact sheet, the scores, and the time stock and with our kernels."""

from __future__ import annotations

import argparse
import copy
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn

import sana_ext

from ..device import resolved
from ..model.config import SanaConfig
from ..sampling.pipeline import Pipeline, describe
from ..sampling.settings import Item, Sampling
from ..scenes.spec import spec_from_metadata
from ..scenes.testset import is_held_out
from ..scenes.testset import load as test_set
from ..scenes.vocabulary import CATEGORIES, IMAGE_SIZE
from ..storage.concurrency import claiming
from ..storage.png import save_png
from .layout import judge_folder, picture_path, write_metadata
from .sample import progress_bar
from .scores import score_table, show

PER_CATEGORY = 8
SCALE = 3  # of the contact sheet: 64 x 64 pixels are too small to see
BATCH = 24
ROUNDS = 3  # of the timing


@claiming(lambda given: given["args"].out)
def run(args: argparse.Namespace) -> None:
    begin = time.perf_counter()
    settings, lines = Sampling(seed=args.seed, steps=args.steps), chosen_prompts(args.per_category)
    pipe = Pipeline.from_pretrained(args.model, device=resolved(args.device))
    if pipe.picture_size(None, None) != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"--model {args.model} does not make {IMAGE_SIZE}x{IMAGE_SIZE} pictures, which the checker judges"
        )
    out = Path(args.out)
    items = [Item(line["prompt"], index, 0) for index, line in enumerate(lines)]
    model = pipe.identity()
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    print(
        f"{model['name']}: {parameters / 1e6:.1f}M parameters, {pipe.config.num_layers} blocks; {torch.get_num_threads()} threads"
    )
    with progress_bar("sampling") as progress:
        pictures = pipe.sample(items, settings, batch_size=BATCH, callback=progress)
        write_metadata(out / "pictures", lines)
        for item, picture in pictures:
            path = picture_path(out / "pictures", item.index, 0)
            save_png(picture, path, describe(pipe, settings, item, model))

    judged, shared = judge_folder(out / "pictures")
    tiles = []
    for item, verdict in zip(items, judged):
        with Image.open(picture_path(out / "pictures", item.index, 0)) as picture:
            tiles.append(Tile(picture.copy(), item.prompt, settings.seed, verdict.reasons[0]))
    about = {"prompt": "; ".join(item.prompt for item in items)} | shared
    about["tiles"] = [{"prompt": tile.prompt, "seed": tile.seed, "wrong": tile.wrong} for tile in tiles]
    save_png(contact_sheet(tiles, args.per_category), out / "sheet.png", about)
    print(f"\n{len(items)} prompts of the test set, one picture each; the exact checker's verdicts:\n")
    print(show(score_table(judged), 1))
    print(
        "\nFew prompts, wide intervals. The whole test set: sana15 sample --prompts test --n 4 --out DIR; sana15 eval DIR"
    )
    if not args.no_timing:
        print("\n" + timing_table(pipe, settings, lines))
    print(
        f"\n{out / 'sheet.png'} shows the pictures with prompts, seeds and verdicts ({time.perf_counter() - begin:.0f} s in all)"
    )


def chosen_prompts(per_category: int) -> list[dict[str, Any]]:
    """A fixed choice of prompts of each category of the test set, half of them held-out combinations where there are such."""
    if per_category < 1:
        raise ValueError(f"--per-category must be at least 1, got {per_category}")
    chosen = []
    for category in CATEGORIES:
        lines = [line for line in test_set() if line["tag"] == category]
        seen = [line for line in lines if not is_held_out(spec_from_metadata(line))]
        held_out = [line for line in lines if is_held_out(spec_from_metadata(line))]
        half = per_category // 2 if held_out else 0
        chosen += _some(seen, per_category - half) + _some(held_out, half)
    return chosen


def _some(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    if count > len(lines):
        raise ValueError(f"--per-category is too large: there are {len(lines)} prompts of a kind")
    return Random("demo").sample(lines, count)


@dataclass(frozen=True)
class Tile:
    """A picture of the contact sheet; `wrong` is the checker's reason, empty for a correct picture."""

    picture: Image.Image
    prompt: str
    seed: int
    wrong: str


def contact_sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """The pictures enlarged without smoothing, under each its prompt, its seed and the verdict (green or red)."""
    side = tiles[0].picture.width * SCALE
    gap, line_height, lines = 10, 15, 5
    height = side + lines * line_height + gap
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = gap + number % columns * (side + gap), gap + number // columns * height
        sheet.paste(tile.picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        width = side // 7  # characters
        prompt = textwrap.wrap(tile.prompt, width, max_lines=3, placeholder=" ...")
        verdict = f"seed {tile.seed}: " + (f"no, {tile.wrong}" if tile.wrong else "yes")
        verdicts = textwrap.wrap(verdict, width, max_lines=2, placeholder=" ...")
        color = "#b00020" if tile.wrong else "#00701a"
        for place, (text, fill) in enumerate([(t, "black") for t in prompt] + [(t, color) for t in verdicts]):
            draw.text((left, top + side + 2 + place * line_height), text, fill=fill, font_size=13)
    return sheet


class Stock(nn.Module):
    """diffusers' SanaTransformer2DModel, untouched, behind SanaTransformer's interface: the same weights in eager PyTorch."""

    projects = False  # it projects the text anew at every step

    def __init__(self, folder: Path) -> None:
        from diffusers import SanaTransformer2DModel

        super().__init__()
        self.config = SanaConfig.load(folder)
        self.model = SanaTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
        self.proj_out = self.model.proj_out

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return self.model(latents, text, timestep, encoder_attention_mask=mask, return_dict=False)[0]


def timing_table(pipe: Pipeline, settings: Sampling, lines: list[dict[str, Any]]) -> str:
    """Seconds per whole picture (text, denoising, decoding), stock and ours in turn, for one picture and for eight at once.

    No time is given where the pictures differ: at most 0.1 % of the values may, by more than 1 of 255.
    """
    assert pipe.source is not None
    stock = copy.copy(pipe)
    stock.transformer = Stock(pipe.source / "transformer").to(pipe.device)  # type: ignore[assignment]
    both = {"stock": stock, "ours": pipe}
    text = [
        f"Time per picture, {settings.steps} steps with guidance, fp32, median of {ROUNDS} interleaved rounds:",
        f"{'pictures at once':>16}  {'diffusers, eager':>16}  {'sana15':>8}  {'ratio':>5}",
    ]
    for count in (1, 8):
        items = [Item(line["prompt"], index, 0) for index, line in enumerate(lines[-count:])]
        pixels = {name: _pixels(one, items, settings) for name, one in both.items()}  # warms up, too
        apart = float((np.abs(pixels["stock"] - pixels["ours"]) > 1).mean())
        if apart > 1e-3:
            text.append(f"{count:>16}  no times: {100 * apart:.1f} % of the values of the two pictures differ")
            continue
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(ROUNDS):
            for name, one in both.items():
                begin = time.perf_counter()
                _pixels(one, items, settings)
                seconds[name].append((time.perf_counter() - begin) / count)
        ratio = statistics.median(a / b for a, b in zip(seconds["stock"], seconds["ours"]))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        text.append(f"{count:>16}  {medians['stock']:>14.3f} s  {medians['ours']:>6.3f} s  {ratio:>5.2f}")
    compiled = [k for k in sana_ext.kernel_info() if k.device == pipe.device.type and k.forward == "compiled"]
    names = ", ".join(k.op for k in compiled) or "none (python -m sana_ext says why)"
    return "\n".join([*text, f"compiled kernels: {names}"])


def _pixels(pipe: Pipeline, items: Sequence[Item], settings: Sampling) -> NDArray[np.int64]:
    return np.stack([np.asarray(picture, dtype=np.int64) for _, picture in pipe.sample(items, settings)])
