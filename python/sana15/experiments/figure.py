"""One small figure as a PNG: axes to draw on, saved when the block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def axes_of(path: Path, **settings: Any) -> Iterator[Any]:
    """Matplotlib axes with a grid; `settings` as Axes.set takes them, such as xlabel and yscale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    try:
        yield axes
        axes.set(**settings)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.savefig(path, dpi=110, format="png")
    finally:
        plt.close(figure)
