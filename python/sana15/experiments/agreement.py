"""Measures how well the exact checker agrees with the renderer.

Half of the pairs show what their prompt asks for; the other half is wrong in exactly one attribute, count or relation.
`measure(..., transform=f)` puts any function image batch -> image batch in between, for example an autoencoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import hypot
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..model.autoencoder import Autoencoder
from ..model.folder import MINI
from ..scenes.checker import Verdict, check_batch
from ..scenes.corrupt import KINDS, MALFORMED, malformed_picture, wrong_spec
from ..scenes.prompts import parse, wording
from ..scenes.render import contact_sheet, render_batch
from ..scenes.scene import Scene, sample_scene
from ..scenes.training import sample_spec
from ..scenes.vocabulary import CATEGORIES, COLOR_NAMES, SHAPES
from .grid import Cell, Experiment, Place, Report, Results

Transform = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
MINI_AUTOENCODER = MINI / "vae"
_BATCH = 256


@dataclass(frozen=True)
class Options:
    """Pairs of scene and prompt, and damaged images of each kind."""

    pairs: int = 10_000
    damaged: int = 1_000
    seed: int = 0


BUDGETS = {"smoke": Options(60, 10), "small": Options(2_000, 200), "full": Options()}


@dataclass
class Agreement:
    """Counts over scene-prompt pairs; the confusion matrices count objects (truth, seen), seen "-" if not found."""

    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (category, kind or "right")
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)  # the same, where the verdict was wrong
    shapes: Counter[tuple[str, str]] = field(default_factory=Counter)
    colors: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def agreement(self) -> float:
        return 1 - self.errors.total() / self.pairs.total()

    def rate(self, right: bool, category: str | None = None) -> tuple[int, int]:
        """(wrong verdicts, pairs) of the right or the corrupted pairs, of one category or of all."""
        keys = [k for k in self.pairs if (k[1] == "right") == right and category in (None, k[0])]
        return sum(self.errors[k] for k in keys), sum(self.pairs[k] for k in keys)


def measure(pairs: int, seed: int = 0, transform: Transform | None = None, rule: str = "strict") -> Agreement:
    """The agreement over `pairs` pairs, the categories in turn, every other pair corrupted.

    Args:
        transform: uint8 [B, 64, 64, 3] -> the same, applied to every picture before the checker sees it.
    """
    result = Agreement()
    rng = Random(seed)
    for start in range(0, pairs, _BATCH):
        cases = [_pair(number, rng) for number in range(start, min(start + _BATCH, pairs))]
        pictures = render_batch([scene for _, _, _, scene in cases])
        verdicts = check_batch(transform(pictures) if transform else pictures, [case[2] for case in cases], rule)
        for (category, kind, _, scene), verdict in zip(cases, verdicts):
            result.pairs[category, kind] += 1
            result.errors[category, kind] += verdict.correct != (kind == "right")
            _confusions(scene, verdict, result)
    return result


def _pair(number: int, rng: Random) -> tuple[str, str, dict, Scene]:
    """Category, "right" or the kind of corruption, the prompt's metadata, and the scene."""
    category = CATEGORIES[number // 2 % len(CATEGORIES)]
    spec = sample_spec(category, rng)
    prompt = wording(spec, rng)
    metadata = parse(prompt).metadata(prompt)
    if number % 2 == 0:
        return category, "right", metadata, sample_scene(spec, rng)
    kinds = KINDS[category]
    kind = kinds[number // (2 * len(CATEGORIES)) % len(kinds)]
    return category, kind, metadata, sample_scene(wrong_spec(spec, kind, rng), rng)


def _confusions(scene: Scene, verdict: Verdict, result: Agreement) -> None:
    for truth in scene.objects:
        seen = [
            (hypot((o.box[0] + o.box[2]) / 2 - truth.cx, (o.box[1] + o.box[3]) / 2 - truth.cy), o)
            for o in verdict.objects
            if o.problem is None
        ]
        distance, nearest = min(seen, key=lambda pair: pair[0], default=(float("inf"), None))
        found = nearest is not None and distance < truth.diameter / 2
        result.shapes[truth.shape, nearest.shape if found and nearest else "-"] += 1
        result.colors[truth.color, nearest.color if found and nearest else "-"] += 1


def malformed_rejected(count: int, seed: int = 0) -> dict[str, float]:
    """For each kind of damage the part of `count` damaged pictures that the checker rejects."""
    rng = Random(seed)
    rates = {}
    for kind in MALFORMED:
        pictures, specs = zip(*(malformed_picture(kind, rng) for _ in range(count)))
        verdicts = check_batch(np.stack(pictures), [spec.metadata("") for spec in specs])
        rates[kind] = 1 - sum(verdict.correct for verdict in verdicts) / count
    return rates


def through_autoencoder(folder: str | Path) -> Transform:
    """Encodes and decodes with the autoencoder of `folder`, a folder saved by diffusers."""
    model = Autoencoder.load(folder)

    @torch.no_grad()
    def transform(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        back = model(values).clamp(-1, 1) * 127.5 + 127.5
        return back.round().byte().permute(0, 2, 3, 1).numpy()

    return transform


def _record(result: Agreement) -> dict[str, Any]:
    """Counts as JSON has them: lists of [key, key, count]."""
    return {name: [[*key, n] for key, n in sorted(vars(result)[name].items())] for name in _COUNTERS}


def _agreement(record: Mapping[str, Any]) -> Agreement:
    return Agreement(**{name: Counter({(a, b): n for a, b, n in record[name]}) for name in _COUNTERS})


_COUNTERS = ("pairs", "errors", "shapes", "colors")


def cells(options: Options) -> list[Cell]:
    def rendered(place: Place) -> dict[str, Any]:
        return _record(measure(options.pairs, options.seed))

    def decoded(place: Place) -> dict[str, Any]:
        return _record(measure(options.pairs, options.seed, through_autoencoder(MINI_AUTOENCODER)))

    def damaged(place: Place) -> dict[str, Any]:
        return {"rejected": malformed_rejected(options.damaged, options.seed)}

    return [Cell("rendered", rendered), Cell("decoded", decoded), Cell("damaged", damaged)]


def report(options: Options, results: Results, folder: Path) -> Report:
    titles = {"rendered": "As rendered", "decoded": "After encoding and decoding by the mini model's autoencoder"}
    text = "\n".join(table(_agreement(results[name]), title) for name, title in titles.items() if name in results)
    if "damaged" in results:
        text += f"\n### Damaged objects ({options.damaged:,} images each)\n\n| damage | rejected |\n|---|---|\n"
        rates = results["damaged"]["rejected"]
        text += "".join(f"| {kind} | {100 * rate:.1f} % |\n" for kind, rate in rates.items())
    return Report(text, sheet)


def table(result: Agreement, title: str) -> str:
    """The measured figures as Markdown."""
    wrong, total = result.errors.total(), result.pairs.total()
    summary = f"Agreement **{100 * result.agreement:.2f} %**: {wrong} of {total:,} verdicts wrong."
    lines = [f"### {title}", "", summary, ""]
    lines += ["| category | false rejects | false accepts | by corruption |", "|---|---|---|---|"]
    for category in (*CATEGORIES, None):
        keys = [(category, kind) for kind in KINDS[category]] if category else []
        kinds = [f"{key[1]} {result.errors[key]} / {result.pairs[key]}" for key in keys]
        cells = ["{} / {:,}".format(*result.rate(right, category)) for right in (True, False)]
        lines.append(f"| {category or 'all'} | {' | '.join(cells)} | {', '.join(kinds)} |")
    for name, names, matrix in (("shape", SHAPES, result.shapes), ("colour", COLOR_NAMES, result.colors)):
        lines += ["", f"| {name}: drawn, seen as | {' | '.join(names)} | not found |", "|---" * (len(names) + 2) + "|"]
        for truth in names:
            lines.append(f"| {truth} | " + " | ".join(str(matrix[truth, seen] or ".") for seen in (*names, "-")) + " |")
    return "\n".join(lines) + "\n"


def sheet(path: Path, count: int = 100, seed: int = 2) -> None:
    """Writes `count` images with their prompts and verdicts, half of them corrupted."""
    rng = Random(seed)
    cases = [_pair(number, rng) for number in range(count)]
    pictures = render_batch([scene for _, _, _, scene in cases])
    verdicts = check_batch(pictures, [case[2] for case in cases])
    captions = []
    for (_, _, metadata, _), verdict in zip(cases, verdicts):
        words = metadata["prompt"].split()
        middle = next((i for i in range(len(words)) if len(" ".join(words[: i + 1])) > 27), len(words))
        text = f"{'yes' if verdict.correct else 'NO: ' + verdict.reason}"
        captions.append("\n".join((" ".join(words[:middle]), " ".join(words[middle:])[:30], text[:30])))
    contact_sheet(pictures, 10, path, captions)


EXPERIMENT = Experiment("agreement", BUDGETS, cells, report)
