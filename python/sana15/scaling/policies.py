"""Searches a prompt's candidates. Each policy picks, best first, and never asks for more than the budget holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..judges import JudgeFailed
from .prompt import PromptSearch

ROUND = 4  # candidates between two looks, for stop and bandit


@dataclass(frozen=True)
class Policy:
    """run(searches, stop_at) -> for each prompt the picked candidates, or why it was not judged."""

    run: Callable[[Sequence[PromptSearch], float | None], list[list[int] | JudgeFailed]]
    previews: bool = False  # needs a generator that can pause
    threshold: bool = False  # needs stop_at, and so scores that mean the same for every prompt: one judge


def _each(
    policy: Callable[[PromptSearch, float], list[int]],
) -> Callable[[Sequence[PromptSearch], float | None], list[list[int] | JudgeFailed]]:
    """A policy that looks at one prompt after the other."""

    def run(searches: Sequence[PromptSearch], stop_at: float | None) -> list[list[int] | JudgeFailed]:
        results: list[list[int] | JudgeFailed] = []
        for search in searches:
            try:
                results.append(policy(search, math.inf if stop_at is None else stop_at))
            except JudgeFailed as error:
                results.append(error)
        return results

    return run


def best_of_n(search: PromptSearch, stop_at: float) -> list[int]:
    """Every candidate is judged once; the best of all are picked."""
    search.make(range(search.affordable(lambda count: count * search.price, search.n)))
    return search.ranked(search.made)[: search.pick]


def stop(search: PromptSearch, stop_at: float) -> list[int]:
    """Best of n, but no more is made once as many candidates as are picked have reached the score `stop_at`."""
    while len(search.made) < search.n:
        begin = len(search.made)
        more = search.affordable(lambda count: count * search.price, min(ROUND, search.n - begin))
        if more == 0 or solved(search, stop_at):
            break
        search.make(range(begin, begin + more))
    return search.ranked(search.made)[: search.pick]


def solved(search: PromptSearch, stop_at: float) -> bool:
    if len(search.made) < search.pick:
        return False
    return bool(np.sort(search.scores(search.made, search.verdicts))[-search.pick] >= stop_at)


def tournament(search: PromptSearch, stop_at: float) -> list[int]:
    """Neighbours meet, the better one goes on, until as many are left as are picked (SANA-1.5, section 2.4).

    A judge that compares two pictures is asked in both orders; if its answers disagree it is a tie, and the earlier
    candidate goes on. Other judges see each picture once, and scores decide. Any number of candidates will do: who has no
    opponent goes on.
    """
    compares = len(search.judges) == 1 and search.judges[0].compares
    evaluations = search.generator.evaluations(0, search.generator.steps)

    def price_of(count: int) -> int:
        return count * evaluations + 2 * max(count - search.pick, 0) if compares else count * search.price

    search.make(range(search.affordable(price_of, search.n)), judged=not compares)
    left = list(search.made)
    if not compares and left:
        place = {c: i for i, c in enumerate(search.ranked(left))}
    while len(left) > search.pick:
        meetings = min(len(left) // 2, len(left) - search.pick)
        on = []
        for a, b in zip(left[: 2 * meetings : 2], left[1 : 2 * meetings : 2]):
            first_is_better = search.prefers(a, b) >= 0 if compares else place[a] < place[b]
            on.append(a if first_is_better else b)
        left = on + left[2 * meetings :]
    return left if compares else search.ranked(left)


def halving(search: PromptSearch, stop_at: float) -> list[int]:
    """Previews are judged after a quarter and a half of the steps; each time the worse half is given up."""
    steps = search.generator.steps
    at = sorted({max(steps // 4, 1), max(steps // 2, 1)} - {steps})
    judges = len(search.judges)

    def rounds(count: int) -> list[tuple[int, int]]:
        kept, found = count, []
        for step in at:
            fewer = max(-(-kept // 2), min(search.pick, kept))
            if fewer < kept:  # else there is nothing to look for
                found.append((step, fewer))
            kept = fewer
        return found

    def price_of(count: int) -> int:
        price, alive, done = 0, count, 0
        for step, kept in [*rounds(count), (steps, 0)]:
            price += alive * (search.generator.evaluations(done, step) + judges)
            alive, done = kept, step
        return price

    count = search.affordable(price_of, search.n)
    if count:
        search.race(range(count), rounds(count))
    return search.ranked(search.made)[: search.pick]


def bandit(searches: Sequence[PromptSearch], stop_at: float | None) -> list[list[int] | JudgeFailed]:
    """One budget for all prompts: every prompt gets a round; then always the one that is likely to gain most by another.

    A prompt whose picks have reached `stop_at` gets no more. The gain of a round is the expected improvement of the worst
    pick, for scores that are normal with the prompt's own mean and spread (drawn towards those of all prompts).
    """
    threshold = math.inf if stop_at is None else stop_at
    total = None if any(s.budget is None for s in searches) else sum(s.budget or 0 for s in searches)
    failed: dict[int, JudgeFailed] = {}

    def one_round(i: int, most: int) -> bool:
        search = searches[i]
        begin = len(search.made)
        count = min(ROUND, search.n - begin, most)
        if total is not None:
            count = min(count, (total - sum(s.spent.total for s in searches)) // search.price)
        if count <= 0:
            return False
        try:
            search.make(range(begin, begin + count))
        except JudgeFailed as error:
            failed[i] = error
        return True

    for i, search in enumerate(searches):
        one_round(i, search.affordable(lambda count, price=search.price: count * price, ROUND))
    while True:
        open_ = [
            i for i, s in enumerate(searches)
            if i not in failed and 0 < len(s.made) < s.n and not solved(s, threshold)
        ]  # fmt: skip
        known = [searches[i].scores(searches[i].made, searches[i].verdicts) for i in open_]
        if not open_ or not one_round(open_[int(np.argmax(expected_gains(known, searches[0].pick)))], ROUND):
            break
    return [failed[i] if i in failed else s.ranked(s.made)[: s.pick] for i, s in enumerate(searches)]


def expected_gains(scores: Sequence[NDArray[np.float64]], pick: int) -> NDArray[np.float64]:
    """[prompts] of how much one more draw is expected to improve the pick-th best score: E max(X - it, 0), X normal.

    A prompt's mean and variance count as if ROUND more draws with the mean and variance of all had been seen.
    """
    pooled = np.concatenate(scores)
    gains = []
    for s in scores:
        mean = (s.sum() + ROUND * pooled.mean()) / (len(s) + ROUND)
        variance = (((s - mean) ** 2).sum() + ROUND * pooled.var()) / (len(s) + ROUND)
        deviation = math.sqrt(max(variance, 1e-12))
        worst = np.sort(s)[-pick] if len(s) >= pick else s.min()
        z = (mean - worst) / deviation
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        gains.append(deviation * (density + z * 0.5 * math.erfc(-z / math.sqrt(2))))
    return np.array(gains)


def stopped(scores: NDArray[np.float64], stop_at: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Replays `stop` on recorded candidates, for pick 1: [prompts] how many it makes, and which one it picks.

    scores: [prompts, n].
    """
    P, n = scores.shape
    reached = np.maximum.accumulate(scores, axis=1) >= stop_at
    made = np.full(P, n)
    for looked in range(min(ROUND, n), n, ROUND):
        made = np.where((made == n) & reached[:, looked - 1], looked, made)
    return made, np.array([row[:m].argmax() for row, m in zip(scores, made)])


def calibrate_stop(
    scores: NDArray[np.float64], correct: NDArray[np.float64], *, tolerance: float = 0.01
) -> tuple[float, float]:
    """The lowest stop_at at which stopping costs at most `tolerance` of best-of-n's score, on recorded candidates.

    For pick 1. Use prompts that are not those of the measurement.

    Args:
        scores: [prompts, n] the judge's. correct: [prompts, n] what the picture is really worth, 0 to 1.

    Returns:
        (stop_at, the mean number of pictures that stop makes with it).
    """
    rows = np.arange(len(scores))
    best = correct[rows, scores.argmax(1)].mean()
    for level in np.unique(scores):  # ascending
        made, chosen = stopped(scores, level)
        if correct[rows, chosen].mean() >= best - tolerance:
            return float(level), float(made.mean())
    raise ValueError("no score reaches best-of-n")  # not with finite scores: at the highest, hardly anything stops


POLICIES = {
    "best_of_n": Policy(_each(best_of_n)),
    "tournament": Policy(_each(tournament)),
    "stop": Policy(_each(stop), threshold=True),
    "halving": Policy(_each(halving), previews=True),
    "bandit": Policy(bandit),
}
