"""GenEval's scores with confidence intervals.

A category's score is the mean over its pictures; the overall score is the mean of the categories' scores, as GenEval has
it, or the mean over all prompts. The pictures of one prompt are not independent, so the bootstrap draws prompts: within
each category as many as there are, with replacement. The interval is from the 2.5th to the 97.5th percentile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scenes.vocabulary import CATEGORIES
from .layout import Judged

RESAMPLES = 10_000


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval, over `pictures` pictures of `prompts` prompts."""

    value: float
    low: float
    high: float
    prompts: int
    pictures: int


def score_table(judged: Sequence[Judged], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, dict[str, Score]]:
    """Row -> column -> Score.

    Rows: the categories that are there, "mean of categories", "mean of prompts". Columns: "all", "seen", "held out"
    (combinations that training shows or holds out) and "any": the part of prompts with at least one correct picture. A
    column is left out where it has no prompts.
    """
    rng = np.random.default_rng(seed)
    columns = {
        "all": list(judged),
        "seen": [j for j in judged if j.held_out is False],
        "held out": [j for j in judged if j.held_out],
    }
    table: dict[str, dict[str, Score]] = {}
    for column, chosen in columns.items():
        _fill(table, column, chosen, [float(np.mean(j.correct)) for j in chosen], rng, resamples)
    _fill(table, "any", columns["all"], [float(any(j.correct)) for j in judged], rng, resamples)
    return table


def means(
    values: Sequence[float], tags: Sequence[str], pictures: Sequence[int], rng: np.random.Generator, resamples: int
) -> dict[str, Score]:
    """Row -> Score of one value per prompt, such as its share of right pictures or a paired difference.

    Rows: the categories that are there, "mean of categories", "mean of prompts". values, tags, pictures: by prompt.
    """
    table: dict[str, Score] = {}
    middle, draws, weights = [], [], []
    for category in [c for c in CATEGORIES if c in tags] + sorted(set(tags) - set(CATEGORIES)):
        here = np.array([v for v, tag in zip(values, tags) if tag == category])
        resampled = here[rng.integers(0, len(here), (resamples, len(here)))].mean(axis=1)
        total = sum(count for count, tag in zip(pictures, tags) if tag == category)
        table[category] = _score(here.mean(), resampled, len(here), total)
        middle.append(here.mean())
        draws.append(resampled)
        weights.append(len(here))
    if middle:
        for row, w in (("mean of categories", np.ones(len(middle))), ("mean of prompts", np.array(weights))):
            value, resampled = np.average(middle, weights=w), np.average(draws, axis=0, weights=w)
            table[row] = _score(value, resampled, len(values), sum(pictures))
    return table


def _fill(
    table: dict[str, dict[str, Score]],
    column: str,
    judged: Sequence[Judged],
    values: Sequence[float],
    rng: np.random.Generator,
    resamples: int,
) -> None:
    scores = means(values, [j.tag for j in judged], [len(j.correct) for j in judged], rng, resamples)
    for row, score in scores.items():
        table.setdefault(row, {})[column] = score


def compare(
    first: Sequence[Judged], second: Sequence[Judged], seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, dict[str, Score]]:
    """Row -> column -> Score of two runs on the same prompts. Columns: "first", "second", "difference" (first - second).

    The interval of the difference is that of the prompts' own differences: what makes a prompt hard for both runs cancels.

    Raises:
        ValueError: the prompts are not the same; the first that differs is named.
    """
    for i, (a, b) in enumerate(zip(first, second)):
        if (a.prompt, a.tag) != (b.prompt, b.tag):
            raise ValueError(
                f"prompt {i} differs: {a.prompt!r} and {b.prompt!r}; only runs on the same prompts compare"
            )
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} prompts; only runs on the same prompts compare")
    rates = [[float(np.mean(j.correct)) for j in run] for run in (first, second)]
    rng = np.random.default_rng(seed)
    table: dict[str, dict[str, Score]] = {}
    _fill(table, "first", first, rates[0], rng, resamples)
    _fill(table, "second", second, rates[1], rng, resamples)
    _fill(table, "difference", first, [a - b for a, b in zip(*rates)], rng, resamples)
    return table


def _score(value: float, resampled: NDArray[np.float64], prompts: int, pictures: int) -> Score:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Score(float(value), float(low), float(high), prompts, pictures)


def show(table: dict[str, dict[str, Score]], n: int) -> str:
    """The table as text: score and interval of all prompts, the scores of seen and of held-out combinations."""
    titles = ["category", "prompts", "score", "95 % interval", "seen", "held out"] + [f"any of {n}"] * (n > 1)
    rows = []
    for row, cells in table.items():
        score = cells["all"]
        others = [
            f"{cells[name].value:.3f}" if name in cells else "-"
            for name in ("seen", "held out", "any")[: len(titles) - 4]
        ]
        rows.append((row, str(score.prompts), f"{score.value:.3f}", f"{score.low:.3f} - {score.high:.3f}", *others))
    return _aligned(titles, rows)


def show_comparison(table: dict[str, dict[str, Score]]) -> str:
    """Text of what compare returned: both scores, their difference and its interval."""
    rows = []
    for row, cells in table.items():
        first, second, d = (cells[name] for name in ("first", "second", "difference"))
        interval = f"{d.low:+.3f} - {d.high:+.3f}"
        rows.append((row, str(d.prompts), f"{first.value:.3f}", f"{second.value:.3f}", f"{d.value:+.3f}", interval))
    return _aligned(["category", "prompts", "first", "second", "difference", "95 % interval"], rows)


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width, the means below a rule of their own."""
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        for r in (titles, *rows)
    ]
    rule = "-" * len(lines[0])
    last = sum(row[0].startswith("mean of") for row in rows)
    return "\n".join([lines[0], rule, *lines[1 : len(lines) - last], rule, *lines[len(lines) - last :]])


def as_json(table: dict[str, dict[str, Score]], judged: Sequence[Judged], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured: settings, scores, and each prompt's verdicts."""
    return {
        "settings": settings,
        "scores": {row: {column: vars(score) for column, score in cells.items()} for row, cells in table.items()},
        "prompts": [vars(j) for j in judged],
    }
