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

from .geneval import Judged
from .scenes.vocabulary import CATEGORIES

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
        "seen": [j for j in judged if not j.held_out],
        "held out": [j for j in judged if j.held_out],
    }
    table: dict[str, dict[str, Score]] = {}
    for column, chosen in columns.items():
        _fill(table, column, chosen, [float(np.mean(j.correct)) for j in chosen], rng, resamples)
    _fill(table, "any", columns["all"], [float(any(j.correct)) for j in judged], rng, resamples)
    return {row: table[row] for row in (*CATEGORIES, "mean of categories", "mean of prompts") if row in table}


def _fill(
    table: dict[str, dict[str, Score]],
    column: str,
    judged: Sequence[Judged],
    values: Sequence[float],
    rng: np.random.Generator,
    resamples: int,
) -> None:
    means, draws, weights = [], [], []
    total_pictures = sum(len(j.correct) for j in judged)
    for category in CATEGORIES:
        here = np.array([v for j, v in zip(judged, values) if j.tag == category])
        if not len(here):
            continue
        resampled = here[rng.integers(0, len(here), (resamples, len(here)))].mean(axis=1)
        pictures = sum(len(j.correct) for j in judged if j.tag == category)
        table.setdefault(category, {})[column] = _score(here.mean(), resampled, len(here), pictures)
        means.append(here.mean())
        draws.append(resampled)
        weights.append(len(here))
    if means:
        for row, w in (("mean of categories", np.ones(len(means))), ("mean of prompts", np.array(weights))):
            value, resampled = np.average(means, weights=w), np.average(draws, axis=0, weights=w)
            table.setdefault(row, {})[column] = _score(value, resampled, len(judged), total_pictures)


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
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths)))
        for r in (titles, *rows)
    ]
    rule = "-" * len(lines[0])
    means = sum(row.startswith("mean of") for row in table)
    return "\n".join([lines[0], rule, *lines[1 : len(lines) - means], rule, *lines[len(lines) - means :]])


def as_json(table: dict[str, dict[str, Score]], judged: Sequence[Judged], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured: settings, scores, and each prompt's verdicts."""
    return {
        "settings": settings,
        "scores": {row: {column: vars(score) for column, score in cells.items()} for row, cells in table.items()},
        "prompts": [vars(j) for j in judged],
    }
