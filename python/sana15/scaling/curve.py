"""The scaling curve: how good the picked picture is, against the number of pictures that it was picked from.

`sana15 curve DIR` draws it from the folder of a search that judged every candidate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.layout import picture_path
from ..evaluation.scores import RESAMPLES, Score, means
from ..judges import mean_ranks
from ..judges.scene import scene_line
from ..scenes.checker import check_batch
from ..scenes.spec import spec_from_metadata
from ..storage.files import DataError, read_json, replacing
from ..storage.png import read_png

OVERALL = "mean of categories"


@dataclass(frozen=True)
class Recorded:
    """A search's verdicts, and the metric's. P prompts with n candidates each.

    Attributes:
        tags: of the prompts, their categories. names: of the judges.
        scores: step -> [judges, P, n]; the last step's are those of the finished pictures, earlier ones of previews.
        worth: [P, n], 1 where the exact checker finds the picture right, else 0.
    """

    tags: list[str]
    names: list[str]
    scores: dict[int, NDArray[np.float64]]
    worth: NDArray[np.float64]

    @property
    def finished(self) -> NDArray[np.float64]:
        return self.scores[max(self.scores)]


def read_run(root: Path, rule: str = "strict") -> Recorded:
    """The verdicts in a search's folder, and the exact checker's on its candidates.

    Raises:
        FileNotFoundError: no such folder, or a picture is missing. DataError: a damaged file.
        ValueError: candidates that were not made or not judged (a policy that gave some up, or a run that is not done), or
            prompts that are no scenes: no exact metric is known for them.
    """
    run = read_json(root / "run.json")
    try:
        lines, n, shards = list(run["prompts"]), int(run["n"]), int(run["shards"])
        names = [str(judge["judge"]) for judge in run["judges"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / 'run.json'} is damaged: {error!r}") from None
    seen: dict[int, NDArray[np.float64]] = {}
    for shard in range(shards):
        path = root / f"ledger-{shard:03d}-of-{shards:03d}.jsonl"
        if not path.exists():
            raise ValueError(f"{root} is not done: {path.name} is missing")
        for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(text)
                if record["kind"] != "verdicts":
                    continue
                table = seen.setdefault(record["step"], np.full((len(names), len(lines), n), np.nan))
                scores = [verdict[0] for verdict in record["verdicts"]]
                table[record["judge"], record["prompt"], record["candidates"]] = scores
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise DataError(f"{path}:{number} is damaged: {error!r}") from None
    unjudged = int(np.isnan(seen[max(seen)]).any(0).sum()) if seen else len(lines) * n
    if unjudged:
        raise ValueError(
            f"{root}: {unjudged} of {len(lines) * n} candidates were not finished and judged; a curve needs them all (best_of_n, "
            "run to its end)"
        )
    asked = [scene_line(line) for line in lines]
    worth = np.array([_checked(root / "candidates", i, n, line, rule) for i, line in enumerate(asked)])
    return Recorded([spec_from_metadata(line).tag for line in asked], names, seen, worth)


def _checked(root: Path, index: int, n: int, line: Mapping[str, Any], rule: str) -> list[float]:
    pixels = np.stack([read_png(picture_path(root, index, c))[0] for c in range(n)])
    return [float(v.correct) for v in check_batch(pixels, [line] * n, rule)]


def sets_of(n: int, count: int, sets: int) -> list[slice]:
    """`sets` disjoint sets of `count` candidates: the beginnings of equal parts, so that a smaller set lies in a larger one."""
    if count < 1 or sets < 1 or count * sets > n:
        raise ValueError(f"{sets} disjoint sets of {count} need {sets * count} candidates, there are {n}")
    return [slice(k * (n // sets), k * (n // sets) + count) for k in range(sets)]


def picked_worth(scores: NDArray[np.float64], worth: NDArray[np.float64], count: int, sets: int) -> NDArray[np.float64]:
    """[P] the worth of the candidate that the judges pick out of `count`, the mean over `sets` disjoint sets.

    Of equal scores the first counts, as in a search. scores: [judges, P, n]; worth: [P, n].
    """
    rows = np.arange(len(worth))
    found = []
    for part in sets_of(worth.shape[1], count, sets):
        here = scores[:, :, part]
        ranked = here[0] if len(here) == 1 else np.stack([mean_ranks(here[:, p]) for p in rows])
        found.append(worth[:, part][rows, ranked.argmax(1)])
    return np.mean(found, axis=0)


@dataclass(frozen=True)
class Curve:
    """name -> row (category or mean) -> Scores by count. "oracle" picks by the metric itself: what a perfect judge would."""

    counts: list[int]
    scores: dict[str, dict[str, list[Score]]]


def scaling_curve(
    recorded: Recorded, counts: Sequence[int], sets: int | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Curve:
    """The score of picking one of `count`, for each count, with intervals by a bootstrap over prompts.

    Args:
        sets: disjoint sets per prompt and count; None takes as many as there are.
    """
    P, n = recorded.worth.shape
    selectors = {" + ".join(recorded.names): recorded.finished, "oracle": recorded.worth[None]}
    scores: dict[str, dict[str, list[Score]]] = {}
    for name, by in selectors.items():
        for count in counts:
            used = sets or n // count
            values = picked_worth(by, recorded.worth, count, used).tolist()
            # The same draws for every point: what differs between them is not the draw of prompts.
            rng = np.random.default_rng(seed)
            for row, score in means(values, recorded.tags, [used * count] * P, rng, resamples).items():
                scores.setdefault(name, {}).setdefault(row, []).append(score)
    return Curve(list(counts), scores)


def draw(curve: Curve, path: Path, row: str = OVERALL) -> None:
    """A PNG: score against pictures per prompt (logarithmic), with 95 % intervals. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for (name, rows), color in zip(curve.scores.items(), ("tab:blue", "tab:gray")):
        points = rows[row]
        axes.plot(curve.counts, [s.value for s in points], "o-", color=color, label=f"picked by {name}")
        axes.fill_between(curve.counts, [s.low for s in points], [s.high for s in points], color=color, alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve.counts, [str(count) for count in curve.counts])
    axes.set(xlabel="pictures per prompt, one picked", ylabel=f"exact checker, {row}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def markdown(curve: Curve) -> str:
    """Each selector's scores, a category a row, with the interval of the mean of categories."""
    lines = [
        "| picked by | |" + "".join(f" {count} |" for count in curve.counts),
        "|---|---|" + "---|" * len(curve.counts),
    ]
    for name, rows in curve.scores.items():
        for row, points in rows.items():
            wide = row.startswith("mean of")
            cells = [f"{s.value:.3f}" + (f" ({s.low:.3f} - {s.high:.3f})" if wide else "") for s in points]
            lines.append(f"| {name} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """`sana15 curve`."""
    root = Path(args.folder)
    path = Path(args.out) if args.out else root / "curve.png"
    if args.out and not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")
    recorded = read_run(root, args.rule)
    n = recorded.worth.shape[1]
    counts = [2**k for k in range(n.bit_length())]
    curve = scaling_curve(recorded, counts, seed=args.seed, resamples=args.resamples)
    print(markdown(curve))
    try:
        draw(curve, path)
    except ModuleNotFoundError as error:
        print(f"no figure without matplotlib ({error})")
    else:
        print(f"written: {path}")
