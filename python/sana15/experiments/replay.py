"""Replays on recorded scores of many candidates what stopping and halving would have picked.

Noise depends on seed, prompt and candidate only, so disjoint sets of the candidates stand for searches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..evaluation.scores import Score, means
from ..sampling.pipeline import PipelineGenerator
from ..scaling.curve import OVERALL, Recorded, picked_worth, sets_of
from ..scaling.policies import calibrate_stop, stopped

TOLERANCES = (0.01, 0.005, 0.0)  # what stopping may cost on the prompts that its threshold is calibrated on


def preview_steps(steps: int) -> list[int]:
    """Returns the steps at which halving looks."""
    return sorted({max(steps // 4, 1), max(steps // 2, 1)} - {steps})


def overall(values: NDArray[np.float64], tags: Sequence[str]) -> Score:
    """Mean of the categories, with the interval of a bootstrap over prompts; differences by prompt make it a paired one."""
    return means(values.tolist(), tags, [0] * len(tags), np.random.default_rng(0), 10_000)[OVERALL]


def shown(score: Score, sign: str = "") -> str:
    return f"{score.value:{sign}.3f} ({score.low:{sign}.3f} - {score.high:{sign}.3f})"


def stop_replayed(
    scores: NDArray[np.float64], worth: NDArray[np.float64], n: int, tolerance: float = TOLERANCES[0]
) -> tuple[list[float], NDArray[np.float64], NDArray[np.float64]]:
    """stop with at most n pictures, its threshold calibrated on the other half of the prompts to cost `tolerance` there.

    Args:
        scores, worth: [P, candidates].

    Returns:
        (the two thresholds, [P] worth of what is picked, [P] pictures made), the means over disjoint sets.
    """
    P = len(scores)
    sets = sets_of(scores.shape[1], n, scores.shape[1] // n)
    levels, value, made = [], np.zeros(P), np.zeros(P)
    for half in range(2):
        others, mine = np.arange(P) % 2 != half, np.flatnonzero(np.arange(P) % 2 == half)
        level, _ = calibrate_stop(
            np.concatenate([scores[others][:, s] for s in sets]),
            np.concatenate([worth[others][:, s] for s in sets]),
            tolerance=tolerance,
        )
        levels.append(level)
        for s in sets:
            count, chosen = stopped(scores[mine][:, s], level)
            value[mine] += worth[mine][:, s][np.arange(len(mine)), chosen] / len(sets)
            made[mine] += count / len(sets)
    return levels, value, made


def stop_table(recorded: Recorded, n: int) -> tuple[str, list[float]]:
    """Markdown, a row for each tolerance, and the thresholds of the first."""
    best = picked_worth(recorded.finished, recorded.worth, n, recorded.worth.shape[1] // n)
    lines = [
        f"Best of {n}: {shown(overall(best, recorded.tags))}.",
        "",
        f"| tolerance | threshold | stop | minus best of {n}, paired | pictures of stop |",
        "|---|---|---|---|---|",
    ]
    chosen: list[float] = []
    for tolerance in TOLERANCES:
        levels, value, made = stop_replayed(recorded.finished[0], recorded.worth, n, tolerance)
        chosen = chosen or levels
        used = overall(made, recorded.tags)
        lines.append(
            f"| {tolerance} | {levels[0]:.4f} / {levels[1]:.4f} | {shown(overall(value, recorded.tags))} | "
            f"{shown(overall(value - best, recorded.tags), '+')} | {used.value:.1f} ({used.low:.1f} - {used.high:.1f}), "
            f"{used.value / n:.0%} |"
        )
    return "\n".join(lines), chosen


def halving_replayed(previews: Sequence[NDArray[np.float64]], final: NDArray[np.float64]) -> NDArray[np.int64]:
    """[P] the candidate that halving picks: of each preview's scores [P, n] the better half goes on, the best final one is it."""
    chosen = []
    for p, finals in enumerate(final):
        alive = np.arange(len(finals))
        for scores in previews:
            order = np.argsort(-scores[p, alive], kind="stable")
            alive = np.sort(alive[order[: -(-len(alive) // 2)]])
        chosen.append(alive[finals[alive].argmax()])
    return np.array(chosen)


def halving_price(generator: PipelineGenerator, n: int) -> int:
    """Transformer evaluations plus judge calls of halving from n candidates down to one of a quarter."""
    price, done = 0, 0
    for step in [*preview_steps(generator.steps), generator.steps]:
        price += n * (generator.evaluations(done, step) + 1)
        n, done = -(-n // 2), step
    return price


def halving_table(recorded: Recorded, generator: PipelineGenerator, sizes: Sequence[int]) -> str:
    *early, last = sorted(recorded.scores)
    P, total = recorded.worth.shape
    lines = [
        "| halving from | units | best of n at that price | halving | best of n | difference, paired |",
        "|---|---|---|---|---|---|",
    ]
    for n in sizes:
        price = halving_price(generator, n)
        equal = min(price // (generator.evaluations(0, generator.steps) + 1), total)
        value = np.zeros(P)
        parts = sets_of(total, n, total // n)
        for s in parts:
            chosen = halving_replayed(
                [recorded.scores[step][0][:, s] for step in early], recorded.scores[last][0][:, s]
            )
            value += recorded.worth[:, s][np.arange(P), chosen] / len(parts)
        best = picked_worth(recorded.finished, recorded.worth, equal, total // max(n, equal))
        cells = [
            str(n),
            str(price),
            str(equal),
            shown(overall(value, recorded.tags)),
            shown(overall(best, recorded.tags)),
        ]
        lines.append("| " + " | ".join([*cells, shown(overall(value - best, recorded.tags), "+")]) + " |")
    return "\n".join(lines)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal values share their ranks' mean."""
    below, equal = values[None] < values[:, None], values[None] == values[:, None]
    return below.sum(1) + (equal.sum(1) - 1) / 2


def correlation_table(recorded: Recorded) -> str:
    """Tabulates how well a preview's score tells the finished image's: over all pictures, and among a prompt's own."""
    final = recorded.finished[0]
    lines = [
        "| preview after | Pearson, all pictures | Spearman within a prompt, mean | prompts |",
        "|---|---|---|---|",
    ]
    for step in sorted(recorded.scores)[:-1]:
        early = recorded.scores[step][0]
        spread = [p for p in range(len(final)) if np.ptp(early[p]) > 0 and np.ptp(final[p]) > 0]
        within = [np.corrcoef(ranks(early[p]), ranks(final[p]))[0, 1] for p in spread]
        pearson = np.corrcoef(early.ravel(), final.ravel())[0, 1]
        lines.append(f"| {step} steps | {pearson:.3f} | {np.mean(within):.3f} | {len(spread)} |")
    return "\n".join(lines)
