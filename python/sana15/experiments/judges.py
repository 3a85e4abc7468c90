"""Measures how well the learned judge tells right images of the mini model from wrong ones: its AUC, the exact checker as truth.

Intervals are by bootstrap over prompts, whose images are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..judges.learned import LearnedJudge
from ..judges.scene import SceneJudge
from ..sampling.pipeline import Pipeline
from ..scenes.testset import load
from .figure import axes_of
from .grid import Cell, Experiment, Place, Report, Results


@dataclass(frozen=True)
class Options:
    """Sizes of the experiment: every how many prompts of the test set, images per prompt."""

    every: int = 4
    n: int = 8
    steps: int = 20
    seed: int = 777


BUDGETS = {
    "smoke": Options(every=60, n=2, steps=2),
    "small": Options(every=16),
    "full": Options(),
}


def auc(scores: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The part of the pairs (right picture, wrong picture) that the scores put in order; ties count half."""
    right, wrong = scores[correct], np.sort(scores[~correct])
    if not len(right) or not len(wrong):
        return float("nan")
    below, upto = np.searchsorted(wrong, right, "left"), np.searchsorted(wrong, right, "right")
    return float((below + upto).mean() / 2 / len(wrong))


def interval(scores: NDArray[np.float64], correct: NDArray[np.bool_], draws: int = 1000) -> tuple[float, float]:
    """95 % over prompts; scores and correct [prompts, images]."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(scores), size=(draws, len(scores)))
    values = np.array([auc(scores[r].ravel(), correct[r].ravel()) for r in rows])
    defined = values[np.isfinite(values)]  # of draws with images of both kinds
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)


def judged(place: Place, options: Options) -> dict[str, Any]:
    entries = load()[:: options.every]
    pipe = Pipeline.from_pretrained("mini", device=place.device)
    made = pipe([e["prompt"] for e in entries], n=options.n, seed=options.seed, steps=options.steps, batch_size=64)
    learned, exact = LearnedJudge.load(), SceneJudge()
    pairs = list(zip(entries, made))
    return {
        "tags": [entry["tag"] for entry in entries],
        "scores": [[v.score for v in learned.judge(images, entry)] for entry, images in pairs],
        "correct": [[bool(v.correct) for v in exact.judge(images, entry)] for entry, images in pairs],
    }


def cells(options: Options) -> list[Cell]:
    return [Cell("judged", partial(judged, options=options))]


def report(options: Options, results: Results, folder: Path) -> Report:
    if "judged" not in results:
        return Report("Nothing is judged yet.")
    tags, scores, correct = (np.array(results["judged"][key]) for key in ("tags", "scores", "correct"))
    lines = [
        f"Images of the mini model, {options.steps} steps, seed {options.seed}.",
        "",
        f"| category | prompts | AUC | 95 % | score | best 1 of {options.n} | any of {options.n} |",
        "|---" * 7 + "|",
    ]
    lines += [_line(tag, scores[tags == tag], correct[tags == tag]) for tag in dict.fromkeys(tags.tolist())]
    lines.append(_line("all", scores, correct))
    return Report("\n".join(lines), partial(_draw, scores, correct))


def _line(name: str, scores: NDArray[np.float64], correct: NDArray[np.bool_]) -> str:
    low, high = interval(scores, correct)
    rows = np.arange(len(scores))
    best, oracle = correct[rows, scores.argmax(1)].mean(), correct.any(1).mean()
    return (
        f"| {name} | {len(scores)} | {auc(scores.ravel(), correct.ravel()):.3f} | {low:.3f} - {high:.3f} "
        f"| {correct.mean():.3f} | {best:.3f} | {oracle:.3f} |"
    )


def _draw(scores: NDArray[np.float64], correct: NDArray[np.bool_], path: Path) -> None:
    with axes_of(path, xlabel="learned judge's score", ylabel="images") as axes:
        for name, chosen in (("right", correct), ("wrong", ~correct)):
            axes.hist(scores[chosen], bins=np.linspace(0, 1, 41).tolist(), alpha=0.6, label=name)


EXPERIMENT = Experiment("judges", BUDGETS, cells, report)
