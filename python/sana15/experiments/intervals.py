"""Means over seeds with 95 % intervals, and the point at which one curve reaches the level of another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Quantile 0.975 of Student's t, by degrees of freedom; beyond the table the normal distribution's.
QUANTILES = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval (Student's t); the half is infinite for one seed."""
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.inf
    t = QUANTILES[n - 1] if n <= len(QUANTILES) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def shown(values: Sequence[float], places: int = 3, sign: str = "") -> str:
    """Returns "mean ± half" of a table; the mean alone for one seed, "-" for none."""
    if not values:
        return "-"
    mean, half = over_seeds(values)
    return f"{mean:{sign}.{places}f}" + (f" ± {half:.{places}f}" if math.isfinite(half) else "")


def crossing(xs: Sequence[float], ys: Sequence[float], level: float) -> float | None:
    """Returns the least x at which a falling curve reaches a level; None where it does not.

    Between points the curve is straight in the logarithm of x, as learning curves nearly are.

    Args:
        xs: ascending, above 0. ys: as many.
    """
    for i, (x, y) in enumerate(zip(xs, ys)):
        if y <= level:
            if i == 0 or ys[i - 1] == y:
                return x
            part = (ys[i - 1] - level) / (ys[i - 1] - y)
            return math.exp(math.log(xs[i - 1]) + part * (math.log(x) - math.log(xs[i - 1])))
    return None
